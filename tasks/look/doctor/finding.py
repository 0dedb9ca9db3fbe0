"""What a check of this machine found, and what mends it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["good", "note", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """what: the part of the machine. cure: a command or a setting, where something is to be mended."""

    what: str
    level: Level
    text: str
    cure: str = ""
