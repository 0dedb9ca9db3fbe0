"""Finds the files outside a task folder that its YAML files refer to."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from radlads.tasks.contracts.errors import UserError, first_line
from radlads.tasks.contracts.pins.content import walk_files


class _TaskLoader(yaml.SafeLoader):
    """Reads the harness's YAML without running what its tags name."""


_TaskLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def outside_files(folder: Path, yaml_names: Sequence[str]) -> list[tuple[str, Path]]:
    """(as written, file) of each data file or included YAML file outside a task folder. yaml_names: its YAML files;
    these names, and those in the files, are relative to the folder. Raises UserError for unreadable files and URLs.
    """
    outside: dict[str, Path] = {}
    queue, seen = [folder / name for name in yaml_names], set[Path]()
    while queue:
        path = queue.pop()
        if path.resolve() in seen:
            continue
        seen.add(path.resolve())
        config = _read(path)
        included = list(_included(config, path.parent))
        queue += [place for _, place in included if place.is_file()]
        for written, place in [*included, *_data_files(config, folder, path)]:
            if place.is_file() and not place.resolve().is_relative_to(folder):
                outside[written] = place
    return sorted(outside.items())


def _read(path: Path) -> dict[str, Any]:
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_TaskLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error
    return config if isinstance(config, dict) else {}


def _included(config: dict[str, Any], folder: Path) -> Iterator[tuple[str, Path]]:
    for written in _strings(config.get("include")):
        yield written, folder / written


def _data_files(config: dict[str, Any], folder: Path, where: Path) -> Iterator[tuple[str, Path]]:
    options = config.get("dataset_kwargs")
    if isinstance(options, dict):
        for written in (*_strings(options.get("data_files")), *_strings(options.get("data_dir"))):
            yield from _data(written, folder, where)
    for written in _strings(config.get("dataset_path")):
        if Path(folder, written).is_dir():
            yield from _data(written, folder, where)


def _data(written: str, folder: Path, where: Path) -> Iterator[tuple[str, Path]]:
    if "://" in written:
        raise UserError(f"{where} reads the URL {written}, whose content can change; use a local copy")
    place = folder / Path(written).expanduser()
    if place.is_dir():
        yield from ((f"{written}/{name}", place / name) for name in walk_files(place))
        return
    for name in sorted(glob.glob(str(place))):
        yield written if name == str(place) else f"{written}: {Path(name).name}", Path(name)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
