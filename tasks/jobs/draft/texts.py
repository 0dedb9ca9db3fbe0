"""The text that a recipe is drafted with: files, folders and data sets of the hub, as a user names them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.pins.places import COMPRESSED, expand_paths
from radlads.tasks.jobs.data.text.text_files import JSON_SUFFIXES, TEXT_SUFFIXES

_DEMO = "demo:"
SEPARATOR = '"<|endoftext|>"'
"""Between the documents of the shipped text, as YAML."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_PLAIN = (*JSON_SUFFIXES, *TEXT_SUFFIXES)


def source_text(place: str) -> str:
    """A source of a dataset, as YAML. Raises UserError unless there is such a file or folder, or the name is as those
    of the hub."""
    quoted = json.dumps(place, ensure_ascii=False)
    if place.startswith(_DEMO) or _has_wildcard(place) or Path(place).is_file():
        for name in expand_paths([place]):
            _check_kind(name)
        return f"{{kind: files, paths: [{quoted}]{f', separator: {SEPARATOR}' * place.startswith(_DEMO)}}}"
    if not place or (not Path(place).is_dir() and (_is_text(place) or _HUB_ID.fullmatch(place) is None)):
        raise UserError(
            f"--data '{place}': there is no such file; give a file, a folder, or a data set of the hub as OWNER/NAME"
        )
    return f"{{kind: hub, path: {quoted}}}"


def _check_kind(name: str) -> None:
    if not _is_text(name):
        raise UserError(
            f"--data {name}: unknown kind of file; known endings are {', '.join(('.parquet', *_PLAIN))} "
            f"(all but parquet also with {', '.join(COMPRESSED)})"
        )


def _is_text(name: str) -> bool:
    path = Path(name)
    return path.suffix == ".parquet" or (Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix) in _PLAIN


def _has_wildcard(place: str) -> bool:
    return any(mark in place for mark in "*?[") and not Path(place).exists()
