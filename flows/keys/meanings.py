"""What stands below a field in the body of its class: the meaning of a key, and the source of its default."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from functools import cache
from typing import NamedTuple

from radlads.tasks.contracts.recipe.base import Section
from radlads.tasks.contracts.recipe.training import TrainingPhase

SOURCE = "Source: "
"""Begins the last sentence of a field's text, where its default comes from a paper or a program."""


class Said(NamedTuple):
    """meaning, source: "" where nothing is said."""

    meaning: str
    source: str


def said_of(section: type[Section], name: str) -> Said:
    """Of a key, by the nearest class of the section that says something; a phase has the words of its stage."""
    for one in section.__mro__:
        text = _texts(one).get(name) if issubclass(one, Section) else None
        if text:
            return split(text)
    return Said("As in the stage.", "") if issubclass(section, TrainingPhase) else Said("", "")


def split(text: str) -> Said:
    """The two parts of a field's text, in a recipe's words."""
    meaning, _, source = re.sub(r"\bNone\b", "null", " ".join(text.split())).partition(SOURCE)
    return Said(meaning.strip(), source.strip().removesuffix("."))


def texts_below(body: list[ast.stmt]) -> dict[str, str]:
    """Annotated fields of a class's body → the text that stands below each; "" for none."""
    found: dict[str, str] = {}
    for node, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
            found[node.target.id] = text if isinstance(text, str) else ""
    return found


@cache
def _texts(section: type[Section]) -> dict[str, str]:
    module = _tree(section.__module__)
    return next(texts_below(n.body) for n in module.body if isinstance(n, ast.ClassDef) and n.name == section.__name__)


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(inspect.getsource(sys.modules[module]))
