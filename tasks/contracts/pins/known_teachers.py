"""The sizes of well-known teachers: enough to plan for them where the hub is out of reach, and their names."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

_FILE = "known_teachers.json"


def known_config(name: str) -> dict[str, Any] | None:
    """The settings of a teacher's config.json that decide its sizes; None for one that is not known. name: a hub id,
    in any case of letters."""
    return next((dict(config) for known, config in _known().items() if known.lower() == name.lower()), None)


def known_names() -> tuple[str, ...]:
    """Their hub ids."""
    return tuple(_known())


@functools.cache
def _known() -> dict[str, dict[str, Any]]:
    data = (resources.files("radlads.tasks.contracts.pins") / _FILE).read_text(encoding="utf-8")
    return dict(json.loads(data))
