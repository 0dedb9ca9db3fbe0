"""Hub datasets of evaluation-harness tasks: finds them, and loads them at pinned commits."""

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
    """The harness's task factory, with the pinned commit as `revision` of every hub dataset."""

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
    """Hub id → revision in the YAML, for all datasets of a task, group or tag.

    folder: of a user's own task; a dataset path that exists in it is not a hub id.
    """
    datasets: dict[str, str | None] = {}
    for config in _configs(manager, name):
        path = str(config.get("dataset_path") or "")
        if "class" in config or "custom_dataset" in config:
            logger.warning("task '%s' loads its data with its own code; the data version cannot be pinned", name)
        elif path and path not in _PACKAGED_DATASETS_MODULES and not (folder and (folder / path).is_dir()):
            datasets[path] = (config.get("dataset_kwargs") or {}).get("revision")
    return datasets


def check_commits(name: str, built: Any, commits: Mapping[str, str]) -> None:
    """Raises UserError if a dataset was loaded at another commit than the pinned one: offline, `datasets` uses whatever
    version is in its cache."""
    commit = commits.get(str(getattr(built, "DATASET_PATH", None)))
    splits: Any = getattr(built, "dataset", None)
    if commit is None or not isinstance(splits, Mapping):
        return
    files = [file["filename"] for split in splits.values() for file in getattr(split, "cache_files", ())]
    if files and not all(commit in Path(file).parts for file in files):
        raise UserError(
            f"task '{name}': the cache has another commit of {built.DATASET_PATH} than {commit}, and the hub is not "
            "reachable; download that commit while online, or start a new run"
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
