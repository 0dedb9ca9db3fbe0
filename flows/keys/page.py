"""Every key of a recipe as a page of Markdown: `radlads recipes --keys`, which makes docs/keys.md.

Names, types and defaults are those of the sections (tasks/contracts/recipe), meanings the texts that stand there.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic.fields import FieldInfo

from radlads.flows.keys.meanings import said_of
from radlads.flows.keys.mixers import variant_options
from radlads.flows.keys.words import default_words, type_words
from radlads.tasks.contracts.recipe.base import OPERATIONAL, PLACE, Section, Undigested
from radlads.tasks.contracts.recipe.sections import DocumentSource, MixedSource, Recipe
from radlads.tasks.contracts.recipe.training import Training
from radlads.tasks.contracts.stages import STAGES

_HEAD = """\
# Every key of a recipe

<!-- Made by `radlads recipes --keys`; do not edit. The texts stand below the keys in tasks/contracts/recipe. -->

What a recipe may say, section by section: the type and the default of each key, its meaning, and where the default
comes from. A key without a source has a default of our own. *In no digest*: it may change between attempts, and nothing
is made again for it ([store.md](store.md)).

"""
_COLUMNS = ("key", "type", "default", "meaning", "source")
_READ_BY = {
    "teacher": "every stage that copies or runs the teacher",
    "student": "`plan`, `transplant`, `align` (calibration), `choose` and the training stages",
    "data.NAME": "`tokenize`, once for each dataset",
    "publish": "`publish`",
    "resources": "every stage: where its job runs",
}
# Keys of several kinds of sources come once, before the kinds.
_SHARED = {MixedSource: "all kinds", DocumentSource: "`hub` and `files`"}


@dataclass(frozen=True)
class KeyTable:
    """Keys of one class below a heading. besides: the heading that has its other keys."""

    heading: str
    depth: int
    section: type[Section]
    fields: dict[str, FieldInfo]
    besides: str | None = None


def keys_page() -> str:
    """The page, as docs/keys.md has it."""
    tables = key_tables()
    headings = {table.section: table.heading for table in tables}
    parts = [_HEAD]
    for table in tables:
        parts += _table(table, headings)
        if table.heading == "`student.calibrate`":
            parts += _mixer_tables()
    return "".join(parts).rstrip("\n") + "\n"


def key_tables() -> list[KeyTable]:
    """All tables in the order of a recipe. A class that several sections share comes once, where it is met first."""
    found = _Tables()
    found.add("The recipe", 2, Recipe)
    for name, field in Recipe.model_fields.items():
        for section in sections_in(field.annotation):
            if issubclass(section, Training):
                found.walk("Every training stage", "", 2, Training)
            path = f"{name}.NAME" if name == "data" else name
            found.walk(f"`{path}`", path, 2, section)
    return found.tables


class _Tables:
    def __init__(self) -> None:
        self.tables: list[KeyTable] = []
        self._headings: dict[type[Section], str] = {}

    def add(self, heading: str, depth: int, section: type[Section]) -> dict[str, FieldInfo]:
        base = next((one for one in section.__mro__[1:] if one in self._headings), None)
        fields = {n: f for n, f in section.model_fields.items() if base is None or _differs(section, base, n)}
        besides = None if base is None else self._headings[base]
        self._headings[section] = heading
        self.tables.append(KeyTable(heading, depth, section, fields, besides))
        return fields

    def walk(self, heading: str, path: str, depth: int, section: type[Section]) -> None:
        """The section's table, then those of the sections in it."""
        if section in self._headings:
            return
        for shared, those in _SHARED.items():
            if issubclass(section, shared) and shared not in self._headings:
                self.add(f"`{path}`, {those}", depth, shared)
        fields = self.add(heading, depth, section)
        for name in sorted(fields, key=lambda name: name == "phases"):  # whose sections are mostly the stage's
            for inner in sections_in(fields[name].annotation):
                where = f"{path}.{name}".lstrip(".")
                kinds = get_args(inner.model_fields["kind"].annotation) if "kind" in inner.model_fields else ()
                said = f" of kind `{kinds[0]}`" if len(kinds) == 1 else ""
                self.walk(f"`{where}`{said}", where, 3, inner)


def sections_in(annotation: Any) -> list[type[Section]]:
    """The section classes in a type, in its order."""
    if inspect.isclass(annotation) and issubclass(annotation, Section):
        return [annotation]
    return list(dict.fromkeys(one for inner in get_args(annotation) for one in sections_in(inner)))


def _differs(section: type[Section], base: type[Section], name: str) -> bool:
    """Whether a key is not one of the base, or another one there."""
    if name not in base.model_fields:
        return True
    own, theirs = section.model_fields[name], base.model_fields[name]
    words = _shown(section, name, own) != _shown(base, name, theirs)
    return words or sections_in(own.annotation) != sections_in(theirs.annotation)


def _shown(section: type[Section], name: str, field: FieldInfo) -> tuple[str, ...]:
    return type_words(field.annotation, field.metadata), default_words(field), *said_of(section, name)


def _table(table: KeyTable, headings: Mapping[type[Section], str]) -> Iterator[str]:
    yield f"{'#' * table.depth} {table.heading}\n\n"
    about = inspect.cleandoc(table.section.__doc__ or "").split("\n\n")[0]
    yield f"{_plain(about)}\n\n"
    name = table.heading.strip("`")
    stages = ", ".join(f"`{stage.name}`" for stage in STAGES.values() if stage.section == name) or _READ_BY.get(name)
    yield f"Read by {stages}.\n\n" if stages else ""
    if table.besides is not None and table.fields:
        yield f"Besides the keys of [{table.besides}](#{_anchor(table.besides)}):\n\n"
    if table.fields:
        yield from _rows(_cells(table.section, name, field, headings) for name, field in table.fields.items())


def _cells(
    section: type[Section], name: str, field: FieldInfo, headings: Mapping[type[Section], str]
) -> tuple[str, ...]:
    words, default, meaning, source = _shown(section, name, field)
    inner = sections_in(field.annotation)
    if inner:
        words = words.replace("section", f"[section](#{_anchor(headings[inner[0]])})")
    for mark in field.metadata:
        if isinstance(mark, Undigested):
            meaning += " *In no digest.*" if mark in (OPERATIONAL, PLACE) else " *In no digest, unless it rolls back.*"
    return f"`{name}`", words, default, _plain(meaning), _plain(source)


def _mixer_tables() -> Iterator[str]:
    yield "### `student.options`\n\nOf `student.variant`, whose file in model/mixers has the equations.\n\n"
    for variant, options in variant_options().items():
        yield f"#### `{variant}`\n\n"
        yield from _rows((f"`{o.name}`", o.type, o.default, _plain(o.meaning), _plain(o.source)) for o in options)


def _rows(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(_COLUMNS)} |\n|{' --- |' * len(_COLUMNS)}\n"
    for cells in rows:
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |\n"
    yield "\n"


def _anchor(heading: str) -> str:
    """As git hosts and the site make it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _plain(text: str) -> str:
    """Text of code in one line, in which nothing but `code` is taken for markup."""
    pieces = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(piece if piece.startswith("`") else re.sub(r"([<_[\]])", r"\\\1", piece) for piece in pieces)
