"""The files of a running job that the flow's machine follows: copied from the job's own folder as they grow."""

from __future__ import annotations

import codecs
import os
from pathlib import Path

from radlads.tasks.contracts.parsing.files import write_private
from radlads.tasks.launchers.remote.wire import Message

RECORD = "metrics.jsonl"
WHOLE = ("progress.json", "metrics-notes.json")
"""Small files that the job replaces."""
CONTINUED = (RECORD, "metrics-notes.json")
"""Files of earlier attempts that a job goes on with."""
_MOST_BYTES = 1 << 20


class Papers:
    """What changed in a job's folder since the last look. log: its file; records: whether the job's first rank, which
    writes the record, is here."""

    def __init__(self, folder: Path, log: Path, *, records: bool) -> None:
        self._folder, self._log, self._records = folder, log, records
        self._log_read = log.stat().st_size if log.exists() else 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._record: tuple[int, int] = (0, 0)
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
        """Complete lines of the record: new ones, or all where the job has replaced the file."""
        try:
            stream = (self._folder / RECORD).open("rb")
        except FileNotFoundError:
            return []
        with stream:
            inode, read = self._record
            status = os.fstat(stream.fileno())
            if status.st_ino != inode or status.st_size < read:
                read = 0
            stream.seek(read)
            data = stream.read(_MOST_BYTES)
        lines = data[: data.rfind(b"\n") + 1]
        if not lines and status.st_ino == inode:
            return []
        self._record = (status.st_ino, read + len(lines))
        return [{"file": RECORD, "at": read, "text": lines.decode(errors="replace")}]

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
