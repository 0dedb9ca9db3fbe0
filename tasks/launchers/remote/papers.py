"""The files of a running job that the flow's machine follows: copied from the job's own folder as they grow."""

from __future__ import annotations

import codecs
from pathlib import Path

from radlads.tasks.contracts.parsing.files import write_private
from radlads.tasks.launchers.remote.wire import Message

RECORD = "metrics.jsonl"
WHOLE = ("progress.json", "metrics-notes.json")
"""Small files that the job replaces."""
CONTINUED = (RECORD, "metrics-notes.json")
"""Files of earlier attempts that a job goes on with."""
_MOST_BYTES = 1 << 20
_END_BYTES = 4096
"""Of the record, compared before its new lines are taken; rows have their time, so no two files have the same ones."""


class Papers:
    """What changed in a job's folder since the last look. log: its file; records: whether the job's first rank, which
    writes the record, is here."""

    def __init__(self, folder: Path, log: Path, *, records: bool) -> None:
        self._folder, self._log, self._records = folder, log, records
        self._log_read = log.stat().st_size if log.exists() else 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._record_read, self._record_end = 0, b""
        self._seen: dict[str, bytes] = {}

    def changes(self) -> list[Message]:
        """Messages for `apply`; call it until it returns nothing to have everything."""
        found = [{"log": text} for text in self._new_log()]
        if self._records:
            found += [*self._new_record(), *self._replaced()]
        return found

    def _new_log(self) -> list[str]:
        with self._log.open("rb") as stream:
            stream.seek(self._log_read)
            data = stream.read(_MOST_BYTES)
        self._log_read += len(data)
        text = self._decoder.decode(data)
        return [text] if text else []

    def _new_record(self) -> list[Message]:
        """Complete lines of the record: new ones, or all where the job has rewritten the file. It is known by what it
        holds: a file that replaces another may have the same inode and be longer."""
        try:
            stream = (self._folder / RECORD).open("rb")
        except FileNotFoundError:
            return []
        with stream:
            stream.seek(self._record_read - len(self._record_end))
            grown = stream.read(len(self._record_end)) == self._record_end
            first = self._record_read if grown else 0
            stream.seek(first)
            data = stream.read(_MOST_BYTES)
        lines = data[: data.rfind(b"\n") + 1]
        if grown and not lines:
            return []
        self._record_read = first + len(lines)
        self._record_end = ((self._record_end if grown else b"") + lines)[-_END_BYTES:]
        return [{"file": RECORD, "at": first, "text": lines.decode(errors="replace")}]

    def _replaced(self) -> list[Message]:
        found: list[Message] = []
        for name in WHOLE:
            try:
                data = (self._folder / name).read_bytes()
            except FileNotFoundError:
                continue
            if data != self._seen.get(name):
                self._seen[name] = data
                found.append({"file": name, "text": data.decode(errors="replace")})
        return found


def apply(scratch: Path, message: Message, prefix: str = "") -> None:
    """Write a change into the caller's scratch folder. prefix: of every line of the log, naming the host."""
    if "log" in message:
        with (scratch / "log.txt").open("a", encoding="utf-8") as log:
            log.write("".join(prefix + line for line in message["log"].splitlines(keepends=True)))
    elif message.get("file") == RECORD:
        with (scratch / RECORD).open("ab") as record:
            record.truncate(int(message["at"]))
            record.write(message["text"].encode())
    elif message.get("file") in WHOLE:
        write_private(scratch / message["file"], message["text"])
