"""The hub datasets that tasks of the evaluation harness read, and reading them at the commits that the plan pinned."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from radlads.tasks.contracts.errors import UserError

logger = logging.getLogger("radlads")


class PinnedFactory(TaskFactory):  # type: ignore[misc]
    """The harness's maker of tasks, with the commit of every hub dataset put into what it loads."""

    def __init__(self, commits: Mapping[str, str]) -> None:
        super().__init__()
        self._commits = commits

    def _load_full_config(self, entry: Entry, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config: dict[str, Any] = super()._load_full_config(entry, overrides)
        commit = self._commits.get(str(config.get("dataset_path")))
        if commit is not None and "custom_dataset" not in config:
            config["dataset_kwargs"] = {**(config.get("dataset_kwargs") or {}), "revision": commit}
        return config


def named_datasets(manager: TaskManager, name: str, folder: Path | None) -> dict[str, str | None]:
    """Hub id → revision that the YAML gives, for everything that a task, group or tag reads.

    folder: of a task of one's own; what lies in it is no hub id.
    """
    found: dict[str, str | None] = {}
    for config in _configs(manager, name):
        path = str(config.get("dataset_path") or "")
        if "class" in config or "custom_dataset" in config:
            logger.warning("task '%s' loads its data by code of its own, which pins no version of them", name)
        elif path and path not in _PACKAGED_DATASETS_MODULES and not (folder and (folder / path).is_dir()):
            found[path] = (config.get("dataset_kwargs") or {}).get("revision")
    return found


def check_commits(name: str, built: Any, commits: Mapping[str, str]) -> None:
    """Raises UserError where the harness was given another commit of a dataset than the one that was pinned: without a
    connection `datasets` takes whatever it has in its cache."""
    commit = commits.get(str(getattr(built, "DATASET_PATH", None)))
    splits: Any = getattr(built, "dataset", None)
    if commit is None or not isinstance(splits, Mapping):
        return
    files = [file["filename"] for split in splits.values() for file in getattr(split, "cache_files", ())]
    if files and not all(commit in Path(file).parts for file in files):
        raise UserError(
            f"task '{name}': the cache holds another commit of {built.DATASET_PATH} than {commit}, and the hub cannot "
            "be reached; fetch that commit while online, or start a new run"
        )


def _configs(manager: TaskManager, name: str) -> Iterator[dict[str, Any]]:
    entry: Entry | None = manager.task_index.get(name)
    if entry is None:
        return
    if entry.kind == Kind.TAG:
        for child in sorted(entry.tags):
            yield from _configs(manager, child)
        return
    config = load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else dict(entry.cfg or {})
    if entry.kind == Kind.GROUP:
        yield from _members(manager, config.get("task"))
    else:
        yield config


def _members(manager: TaskManager, members: Any) -> Iterator[dict[str, Any]]:
    for member in members if isinstance(members, list) else ():
        if isinstance(member, str):
            yield from _configs(manager, member)
            continue
        known = str(member.get("group") or member.get("task"))
        if known in manager.task_index:
            yield from _configs(manager, known)
        elif isinstance(member.get("task"), list):
            yield from _members(manager, member["task"])
        if "dataset_path" in member:
            yield member
