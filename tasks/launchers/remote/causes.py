"""Why a job on several hosts ended: the first cause among the endings of its hosts.

One rank that dies takes the others with it, whose errors then only say that a connection was closed. Clocks and polls
are too coarse to tell which ending was first, so they are ordered by what they say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from radlads.tasks.launchers.local import FINAL, describe_code

_CONSEQUENCE = re.compile(r"(?i)connection|broken pipe|\bpeer\b|gloo|nccl|recvvalue|socket|DistBackend|timed? ?out")


@dataclass(frozen=True)
class PartEnding:
    """How one host's part ended. code: exit code of its supervisor. record: exit.json. lost: why its connection ended;
    asked: it was stopped by the launcher, so this ending is no cause."""

    host: str
    code: int = 0
    record: dict[str, Any] | None = None
    lost: str | None = None
    asked: bool = False

    @property
    def is_done(self) -> bool:
        """Whether all ranks of the host completed."""
        return self.lost is None and self.code == 0


def job_ending(endings: Sequence[PartEnding]) -> tuple[int, dict[str, Any] | None]:
    """(exit code, exit.json) of the whole job. endings: of all hosts, the first host's first."""
    if all(one.is_done for one in endings):
        return 0, endings[0].record
    first = min(endings, key=_order)
    where = f"on host {first.host}: "
    if first.lost is not None:
        return 1, {"reason": "crash", "message": f"host {first.host} was lost: {first.lost}", "rank": -1}
    if first.record is not None and first.record.get("reason") not in (None, "done"):
        message = str(first.record.get("message", ""))
        told = first.record["reason"] == "preempted" or len(endings) == 1
        return first.code or 1, first.record | {"message": message if told else where + message}
    return first.code or 1, {
        "reason": "crash", "message": f"{where}ended with {describe_code(first.code)} and gave no reason", "rank": -1,
    }  # fmt: skip


def _order(ending: PartEnding) -> int:
    reason = (ending.record or {}).get("reason")
    message = str((ending.record or {}).get("message", ""))
    if reason in FINAL:
        return 0
    if ending.is_done:
        return 9
    if ending.lost is not None and not ending.asked:
        return 1
    if reason == "preempted":
        return 2
    if reason == "crash":
        return 7 if _CONSEQUENCE.search(message) else 4
    return 8 if ending.asked else 3 if ending.code > 128 else 5
