"""A request on its way between the event loop, which talks with clients, and the thread that has the model."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from radlads.tasks.contracts.requests.talk import Drawing
from radlads.tasks.jobs.serve.refusal import ApiError

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class AnswerPart:
    """A piece of an answer. tokens: of the answer so far. finish: why it ends with this piece, or None."""

    text: str
    tokens: int
    finish: Finish | None = None


class Ticket:
    """One request: what is asked, and the parts of its answer as they come."""

    def __init__(self, ids: Sequence[int], drawing: Drawing, stops: Sequence[str], *, continues: bool) -> None:
        """To be made on the event loop. continues: whether the answer goes on with the text of `ids`."""
        self.ids, self.drawing, self.stops, self.continues = tuple(ids), drawing, tuple(stops), continues
        self.is_cancelled = False
        """Whether nobody waits for the answer any more."""
        self._loop = asyncio.get_running_loop()
        self._parts: asyncio.Queue[AnswerPart | ApiError] = asyncio.Queue()

    def cancel(self) -> None:
        """From any thread."""
        self.is_cancelled = True

    def tell(self, part: AnswerPart | ApiError) -> None:
        """From the model's thread."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody is there to be told
            self._loop.call_soon_threadsafe(self._parts.put_nowait, part)

    async def next_part(self) -> AnswerPart:
        """The next part. Raises ApiError where the answer fails."""
        part = await self._parts.get()
        if isinstance(part, ApiError):
            raise part
        return part
