"""Messages between the flow's machine and a host: JSON objects, one a line, over the pipes of an ssh connection.

An end that has nothing to say for a second sends a beat, so that each notices when the other is gone, also where no
connection is closed: a machine without power or a cut network sends nothing at all.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Iterator
from typing import IO, Any

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 20.0
"""After so many seconds without a message the other end is taken for dead."""
_MOST_BYTES = 64 << 20
Message = dict[str, Any]


class Sender:
    """Writes messages, and beats, from a thread of its own: a reader that has stalled never blocks the caller."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._waiting: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        """Whether everything was written; otherwise what is large or repeats can wait."""
        return self._waiting.empty()

    def send(self, **message: Any) -> None:
        """Send a message; lost if the other end is gone."""
        self._waiting.put(message)

    def close(self, seconds: float) -> None:
        """Write what is waiting, within a time limit, then close the stream."""
        self._waiting.put(None)
        self._thread.join(seconds)

    def _write(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._stream:
            while True:
                try:
                    message = self._waiting.get(timeout=BEAT_SECONDS)
                except queue.Empty:
                    message = {"beat": True}
                if message is None:
                    return
                self._stream.write(json.dumps(message).encode() + b"\n")
                self._stream.flush()


def receive(stream: IO[bytes]) -> Iterator[Message]:
    """The messages of a stream, to its end. Other lines, such as a login shell's greeting, are skipped."""
    with contextlib.suppress(OSError, ValueError):
        while line := stream.readline(_MOST_BYTES):
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict):
                    yield message
