"""A sweep in MLflow: one run above the pipeline runs of its members, so that comparing them is one click."""

from __future__ import annotations

from radlads.tasks.contracts.job import TrackingRef
from radlads.tasks.contracts.mirrors.weights_biases import is_wandb
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.open import store_id
from radlads.tasks.contracts.tracking import (
    Ending,
    RunIdentity,
    close_run,
    log_file,
    nest_run,
    open_pipeline_run,
    open_sweep_run,
)
from radlads.tasks.mirrored.params import flat_params
from radlads.tasks.sweep.grid import Member, plain_value
from radlads.tasks.sweep.record import SweepRecord


class TrackedSweep:
    """MLflow may be away at any time: what it lacks of the sweep then, it gets as the sweep ends.

    uri: MLflow's, "" without one; W&B shows members alone. experiment: the recipe's name, as of the members' runs.
    """

    def __init__(self, store: Store, uri: str, sweep: str, experiment: str, record: SweepRecord) -> None:
        self._store, self._uri, self._experiment = store, "" if is_wandb(uri) else uri, experiment
        self._identity = RunIdentity(store=store_id(store), run=sweep)
        self._grid = {f"grid.{key}": ", ".join(map(plain_value, values)) for key, values in record.grid.items()}
        self._begun: list[Member] = []
        self._nested: set[str] = set()
        self._parent: TrackingRef | None = None
        self._open()

    def begin(self, member: Member) -> None:
        """Show a member's run under the sweep's, with its values of the grid."""
        if member not in self._begun:
            self._begun.append(member)
        if self._parent is not None and self._nest(self._parent, member):
            self._nested.add(member.name)

    def end(self, ending: Ending, table: str) -> None:
        """End the sweep's run, with the table in Markdown, and with the members that an outage kept from it."""
        if self._parent is None:
            self._open()
        missing = [member for member in self._begun if member.name not in self._nested]
        for member in missing if self._parent is not None else []:
            self.begin(member)
        log_file(self._parent, "table.md", table.encode())
        close_run(self._parent, ending)

    def _open(self) -> None:
        if self._uri:
            self._parent = open_sweep_run(self._uri, self._experiment, self._identity, params=self._grid)

    def _nest(self, parent: TrackingRef, member: Member) -> bool:
        child = open_pipeline_run(
            self._uri,
            self._experiment,
            RunIdentity(store=self._identity.store, run=member.name),
            params=dict(flat_params(member.values)),
            tags={"radlads.store": self._store.uri, "mlflow.parentRunId": parent.run_id},
            running=False,
        )
        return child is not None and nest_run(parent, child)
