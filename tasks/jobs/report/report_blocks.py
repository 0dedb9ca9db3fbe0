"""The blocks of a report, and their Markdown form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["good", "note", "warning"]
MARKS: dict[Level, str] = {"good": "OK", "note": "Note", "warning": "Warning"}


@dataclass(frozen=True)
class Heading:
    """A section heading."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph; backticks mark code."""

    text: str


@dataclass(frozen=True)
class Verdict:
    """One conclusion, with its level."""

    level: Level
    text: str


@dataclass(frozen=True)
class Table:
    """Rows of strings; the first column names the row, the others are right-aligned unless named in `words`."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A PNG file in the report's folder."""

    file: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Code:
    """A listing, optionally folded."""

    text: str
    language: str = ""
    folded: str = ""
    """Summary of the fold; empty: not folded."""


Block = Heading | Text | Verdict | Table | Picture | Code


def render_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The report as GitHub-flavoured Markdown."""
    return "\n\n".join([f"# {title}", *map(_markdown, blocks)]) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {text}"
        case Text(text):
            return text
        case Verdict(level, text):
            return f"- **{MARKS[level]}:** {text}"
        case Table(header, rows, caption, words):
            lines = [_row(header), _row([":--" if i == 0 or h in words else "--:" for i, h in enumerate(header)])]
            lines += [_row(row) for row in rows]
            return "\n".join(lines) + (f"\n\n_{caption}_" if caption else "")
        case Picture(file, alt, caption):
            return f"![{alt}]({file})\n\n_{caption}_"
        case Code(text, language, folded):
            listing = f"```{language}\n{text.rstrip()}\n```"
            return f"<details><summary>{folded}</summary>\n\n{listing}\n\n</details>" if folded else listing


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
