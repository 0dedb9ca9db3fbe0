"""Which checkpoints a product has in the store, and which of them go: those that newer ones replace, those that a
rollback has given up, and what is left of unfinished ones."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from contextlib import suppress

from radlads.tasks.contracts.events import rollback_target
from radlads.tasks.contracts.store.open import CorruptArtifact, Store

logger = logging.getLogger("radlads")

RECORD = "metrics.jsonl"
_MANIFEST = re.compile(r"/step-(\d+)/manifest\.json")


class Shelf:
    """The checkpoints under a prefix of a store. Only the first rank changes it."""

    def __init__(self, store: Store, prefix: str) -> None:
        self.store, self.prefix = store, prefix

    def key(self, step: int) -> str:
        """The key of a step's checkpoint."""
        return f"{self.prefix}/{step_name(step)}"

    def committed(self) -> list[int]:
        """Steps with a manifest, newest first."""
        names = (key.removeprefix(self.prefix) for key in self.store.list(self.prefix))
        return sorted((int(found[1]) for name in names if (found := _MANIFEST.fullmatch(name))), reverse=True)

    def drop_replaced(self, newest: int, *, keep: int, every: int, reach: int) -> None:
        """Delete what the newest checkpoint, just committed, replaces; see Checkpoints. Those of later steps could not
        be read when the job was restored: they count as none that is kept."""
        steps = self.committed()
        later, sound = ([step for step in steps if (step > newest) == beyond] for beyond in (True, False))
        spaced = [step for step in sound if every and step % every == 0]
        oldest = next((step for step in spaced if step <= newest - reach), 0)
        self._drop([*later, *(set(sound[keep:]) - {step for step in spaced if step >= oldest})])

    def drop_after(self, step: int) -> None:
        """Delete the checkpoints of later steps, and name this one as the latest."""
        self._drop(later for later in self.committed() if later > step)
        self.name_latest(step)

    def drop_given_up(self, record: bytes) -> None:
        """Delete what a rollback on record has given up, if the job was killed before it could.

        record: metrics.jsonl as this machine has it, not yet rewound by such a rollback. Of this history is a
        checkpoint whose record is the beginning of it; another one was made after the rollback, perhaps on another
        machine. Clocks tell neither.
        """
        past = list(_rollbacks(record))
        for step in self.committed() if past else []:
            with suppress(CorruptArtifact):  # passed over when the newest that verifies is looked for
                saved = self.store.read_file(self.key(step), RECORD)
                if any(step > target and record[:place].startswith(saved) for place, target in past):
                    logger.info("deleting the checkpoint of step %d, which a rollback has given up", step)
                    self._drop([step])

    def drop_remnants(self) -> None:
        """Delete what belongs to no checkpoint with a manifest, half-written files and uploads included: a killed job
        was writing or deleting it."""
        whole = {f"{self.key(step)}/" for step in self.committed()} | {f"{self.prefix}/latest"}
        keys = self.store.list(self.prefix)
        self.store.delete(self.prefix, keep={key for key in keys if key.startswith(tuple(whole))})

    def name_latest(self, step: int) -> None:
        """Note a step as that of the newest checkpoint, for people who look into the store."""
        self.store.put_bytes(f"{self.prefix}/latest", f"{step_name(step)}\n".encode())

    def _drop(self, steps: Iterable[int]) -> None:
        for step in steps:
            self.store.delete(self.key(step))


def step_name(step: int) -> str:
    """step-000500"""
    return f"step-{step:06d}"


def _rollbacks(record: bytes) -> Iterable[tuple[int, int]]:
    """(first byte of its row, step that it went back to) of each rollback on record."""
    place = 0
    for line in record.splitlines(keepends=True):
        if b'"event"' in line and line.endswith(b"\n"):
            target = rollback_target(json.loads(line))
            if target is not None:
                yield place, target
        place += len(line)
