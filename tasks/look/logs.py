"""The log of a stage's job: from its folder on this machine, where it grows, else from the store, where it follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from radlads.tasks.contracts.errors import UserError, did_you_mean
from radlads.tasks.contracts.job import JobSpec
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.look.note import log_key
from radlads.tasks.look.run_state import RunState
from radlads.tasks.look.stage_state import StageState

_MOST_BYTES = 256 << 20


@dataclass
class LogReader:
    """The log of one stage. folder: of its job on this machine, or None."""

    store: Store
    stage: StageState
    folder: Path | None
    _read: int = 0

    def new(self) -> str:
        """The whole lines that were added since the last call. Raises StoreError."""
        data = self._data()
        if len(data) < self._read:  # another attempt on another machine began it anew
            self._read = 0
        end = data.rfind(b"\n") + 1
        fresh = data[self._read : end]
        self._read = max(self._read, end)
        return fresh.decode(errors="replace")

    @property
    def where(self) -> str:
        """Where it was read."""
        return str(self.folder / "log.txt") if self.folder is not None else self.store.join(log_key(self.stage.product))

    def _data(self) -> bytes:
        if self.folder is not None:
            try:
                return (self.folder / "log.txt").read_bytes()
            except OSError:  # the folder was removed, or is another user's
                self.folder = None
        found = self.store.read(log_key(self.stage.product), limit=_MOST_BYTES)
        return b"" if found is None else found[0]


def open_log(store: Store, stage: StageState, work: Path) -> LogReader:
    """The log of a stage that has begun. work: this machine's work folder, tried after the one that the job named."""
    named = stage.where.rpartition(", in ")[2]
    folders = [Path(named)] if named.startswith("/") else []
    for folder in (*folders, work / stage.product):
        if _is_of(folder, store, stage):
            return LogReader(store, stage, folder)
    return LogReader(store, stage, None)


def stage_of(run: RunState, name: str) -> StageState:
    """The stage that a user named, as "tokenize-train", "tokenize train", or "tokenize" where there is one. Raises
    UserError."""
    by_label: Mapping[str, StageState] = {stage.label: stage for stage in run.stages}
    label = name.replace(" ", "-")
    if label in by_label:
        return by_label[label]
    alike = [stage for stage in run.stages if stage.stage == name]
    if len(alike) == 1:
        return alike[0]
    known = ", ".join(by_label)
    if alike:
        raise UserError(f"the run '{run.run}' has {len(alike)} of '{name}': {', '.join(one.label for one in alike)}")
    raise UserError(f"the run '{run.run}' has no stage '{name}'{did_you_mean(label, by_label)}; it has {known}")


def stage_to_show(run: RunState) -> StageState | None:
    """The stage whose log says most now: at work, else the one that did not end, else the last finished one."""
    begun = [stage for stage in run.current if stage.product] or [s for s in run.stages if s.word == "done"]
    words = ("running", "failed", "died", "stopped")
    return max(begun, key=lambda stage: (stage.word in words, run.stages.index(stage)), default=None)


def _is_of(folder: Path, store: Store, stage: StageState) -> bool:
    """Whether a folder of this machine is that of the stage's job, for this store."""
    try:
        spec = JobSpec.model_validate_json((folder / "job.json").read_bytes())
        return spec.output_uri == store.join(stage.product) and (folder / "log.txt").is_file()
    except (OSError, ValidationError):
        return False
