"""Options of the mixer variants, read from the syntax tree of model/mixers: the control plane does not import torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from radlads.flows.keys.meanings import split, texts_below
from radlads.flows.keys.words import yaml_words

_BASE, _OPTIONS = "MixerOptions", "Options"
_PLAIN = {"int": "integer", "float": "number", "bool": "`true` or `false`", "None": "null", "str": "text"}
_RANK = "Rank of a low-rank map; null: the published formula of the model's width."


class Option(NamedTuple):
    """One option of a variant; type and default as the code writes them."""

    name: str
    type: str
    default: str
    meaning: str
    source: str


def variant_options() -> dict[str, list[Option]]:
    """Variant → its options, those of the classes that it builds on first."""
    folder = _folder()
    shared = _classes(folder / "shared" / "options.py")
    files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    return {path.stem: list(_options(_OPTIONS, {**shared, **_classes(path)}).values()) for path in files}


def _folder() -> Path:
    spec = find_spec("radlads.model.mixers.shared")  # found by its parents' paths; nothing of it runs but empty files
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.parent


def _classes(path: Path) -> dict[str, ast.ClassDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _options(name: str, classes: Mapping[str, ast.ClassDef]) -> dict[str, Option]:
    node = classes[name]
    bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id in classes]
    found = {key: option for base in bases for key, option in _options(base, classes).items()} if name != _BASE else {}
    texts = texts_below(node.body)
    for field in _fields(node):
        assert isinstance(field.target, ast.Name)
        key = field.target.id
        meaning, source = split(texts[key])
        if not meaning:
            meaning = _RANK if key.endswith("_rank") else found[key].meaning if key in found else ""
        found[key] = Option(key, _type(field.annotation), _default(field.value), meaning, source)
    return found


def _fields(node: ast.ClassDef) -> Iterator[ast.AnnAssign]:
    for one in node.body:
        if isinstance(one, ast.AnnAssign) and "ClassVar" not in ast.unparse(one.annotation):
            yield one


def _type(annotation: ast.expr) -> str:
    if isinstance(annotation, ast.Subscript):
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        if ast.unparse(annotation.value) == "Annotated":
            return _type(inner[0])
        words = [f"`{_value(one)}`" for one in inner]
        return f"{', '.join(words[:-1])} or {words[-1]}"
    if isinstance(annotation, ast.BinOp):
        return f"{_type(annotation.left)} or {_type(annotation.right)}"
    return _PLAIN[ast.unparse(annotation)]


def _default(value: ast.expr | None) -> str:
    if isinstance(value, ast.Call):
        value = next(keyword.value for keyword in value.keywords if keyword.arg == "default")
    return f"`{_value(value)}`"


def _value(node: ast.expr | None) -> str:
    return yaml_words(ast.literal_eval(node) if node is not None else None)
