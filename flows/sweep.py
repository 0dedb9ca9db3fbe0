"""The flow `radlads-sweep`: the members of a grid as runs that share equal products, and a table of the results."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Failed

from radlads.flows.common import explain_errors
from radlads.flows.convert import radlads
from radlads.flows.form import Address, Folder
from radlads.flows.pretrain import radlads_pretrain
from radlads.flows.sweep_deployments import run_deployed
from radlads.tasks.announce import Outlook, outlook
from radlads.tasks.contracts.errors import UserError, first_line
from radlads.tasks.contracts.locks.scratch_lock import hold_folder
from radlads.tasks.contracts.parsing.credentials import hide
from radlads.tasks.contracts.recipe.recipe import Recipe
from radlads.tasks.contracts.settings import Settings, check_run_name, refuse_credentials, resolve_settings
from radlads.tasks.contracts.store.layout import claim_layout
from radlads.tasks.contracts.store.open import Store, StoreError, open_store
from radlads.tasks.contracts.tracking import Ending
from radlads.tasks.graph import convert, pretrain
from radlads.tasks.launchers.launcher import JobCrashed
from radlads.tasks.launchers.stopping import REQUEST, RunStopped
from radlads.tasks.pipeline import open_pipeline
from radlads.tasks.plain_runner import PlainRunner
from radlads.tasks.sweep.grid import Member, make_members
from radlads.tasks.sweep.outlook import describe_sweep
from radlads.tasks.sweep.record import SweepRecord, keep_record
from radlads.tasks.sweep.table import keep_table, kept_failures, make_table
from radlads.tasks.sweep.tracked import TrackedSweep

_log = logging.getLogger("prefect.radlads")


class SweepFailed(Exception):  # noqa: N818 - a final state, named as those of jobs are
    """Some members failed. failures: member → why, one line."""

    def __init__(self, failures: Mapping[str, str], members: int) -> None:
        super().__init__(f"{len(failures)} of {members} runs of the sweep failed: {', '.join(failures)}")
        self.failures = dict(failures)


@dataclass
class _Sweep:
    """State shared by the steps of a sweep. places: arguments of each member's flow. begun: members started by this
    call. failures: member → reason, one line."""

    name: str
    recipe: str
    members: list[Member]
    record: SweepRecord
    store: Store
    settings: Settings
    places: dict[str, str | None]
    tracked: TrackedSweep
    stop_on_failure: bool
    begun: set[str] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """Whether no more members are to be started."""
        return self.stop_on_failure and bool(self.failures)

    @property
    def waiting(self) -> list[Member]:
        """The members that have not failed."""
        return [member for member in self.members if member.name not in self.failures]

    def begin(self, member: Member) -> None:
        """Record that a member's run starts."""
        self.begun.add(member.name)
        self.tracked.begin(member)

    def fail(self, member: Member, reason: str) -> None:
        """Record why a member's run failed."""
        self.failures[member.name] = hide(reason)
        _log.warning("%s failed: %s", member.name, hide(reason))

    def parameters(self, member: Member) -> dict[str, Any]:
        """Parameters of the member's flow."""
        return {"recipe": self.recipe, "run": member.name, "overrides": member.overrides or None, **self.places}


@flow(name="radlads-sweep", flow_run_name="{sweep}", persist_result=False)
@explain_errors
def radlads_sweep(
    recipe: str,
    sweep: str,
    grid: dict[str, list[Any]],
    overrides: dict[str, Any] | None = None,
    store: Address = None,
    tracking: Address = None,
    work: Folder = None,
    deployments: bool = False,
    stop_on_failure: bool = False,
) -> Any:
    """Run every member of a grid, one after the other here, or all at once as runs of a deployment.

    Args:
        recipe: As of the flow `radlads`.
        sweep: Its name; each run's name starts with it, and the same name continues the sweep.
        grid: Dotted key → values.
        overrides: For all members.
        store: As of the flow `radlads`.
        tracking: As of the flow `radlads`.
        work: As of the flow `radlads`.
        deployments: Submit all members at once as runs of `radlads/full` (of a teacher `radlads-pretrain/pretrain`).
        stop_on_failure: Start no more members once one has failed.

    Returns:
        Member → how it ended ("done"); a failed state with SweepFailed where some failed.
    """
    refuse_credentials(store=store, tracking=tracking)
    members = make_members(recipe, grid, overrides or {}, check_run_name(sweep), most=None)
    settings = resolve_settings(store=store, tracking=tracking, work=work)
    place = open_store(settings.store)
    claim_layout(place)
    with hold_folder(settings.work / "sweeps" / sweep, "lock", what=f"the sweep '{sweep}'"):
        record = keep_record(place, sweep, recipe, members)
        running = _Sweep(
            name=sweep,
            recipe=str(Path(recipe).absolute()) if recipe.endswith((".yaml", ".yml")) else recipe,
            members=members,
            record=record,
            store=place,
            settings=settings,
            places={"store": store, "tracking": tracking, "work": work},
            tracked=TrackedSweep(place, settings.tracking, sweep, members[0].recipe.name, record),
            stop_on_failure=stop_on_failure,
        )
        return _run(running, _deployed if deployments else _in_turn)


def _run(sweep: _Sweep, run_members: Callable[[_Sweep], None]) -> Any:
    """Announce and run the members; the table is written even if that fails."""
    ending: Ending = "FAILED"
    try:
        _announce(sweep)
        if not sweep.is_over:
            run_members(sweep)
        ending = "FAILED" if sweep.failures else "FINISHED"
    except RunStopped:
        ending = "KILLED"
        raise
    finally:
        before = kept_failures(sweep.store, sweep.name)
        known = {name: why for name, why in before.items() if name not in sweep.begun} | sweep.failures
        table = make_table(sweep.store, sweep.name, sweep.record, known)
        keep_table(sweep.store, table)
        sweep.tracked.end(ending, table.markdown())
    if sweep.failures:
        failed = SweepFailed(sweep.failures, len(sweep.members))
        return Failed(message=str(failed), data=failed)
    return {row.member: row.status for row in table.rows}


def _announce(sweep: _Sweep) -> None:
    """Make every member's plan, and log what the whole sweep will do. A recipe that its plan rejects fails here, before
    a job of any other member is launched."""
    found: dict[str, list[Outlook]] = {}
    for member in sweep.members:
        REQUEST.check()
        try:
            found[member.name] = _outlook(sweep, member)
        except UserError as error:
            sweep.fail(member, first_line(error))
        except (StoreError, JobCrashed) as error:
            _log.warning("planning %s failed, it is planned again when it runs: %s", member.name, first_line(error))
    for line in describe_sweep(found) if found else []:
        _log.info("%s", line)


def _outlook(sweep: _Sweep, member: Member) -> list[Outlook]:
    """Which of a member's stages will run and which are reused, by its plan, which is made if it does not exist. The
    plan is sent to MLflow when the member runs."""
    asked: dict[str, Any] = {"overrides": member.overrides, "run": member.name, **sweep.places, "tracking": "none"}
    with open_pipeline(sweep.recipe, run_id=member.name, **asked) as pipeline:
        plan = PlainRunner(pipeline).plan(pipeline.recipe)
        return outlook(pipeline, plan, partial(_graph(pipeline.recipe), pipeline.recipe))


def _graph(recipe: Recipe) -> Callable[..., object]:
    return pretrain if recipe.pretrain else convert


def flow_of(members: Sequence[Member]) -> Any:
    """The flow that runs the members: the one that `radlads run` takes."""
    return radlads_pretrain if members[0].recipe.pretrain else radlads


def _in_turn(sweep: _Sweep) -> None:
    waiting = sweep.waiting
    for number, member in enumerate(waiting, 1):
        REQUEST.check()
        _log.info("run %d of %d: %s", number, len(waiting), member.name)
        sweep.begin(member)
        member_flow = flow_of(sweep.members).with_options(flow_run_name=member.name)
        state: State[Any] = member_flow(**sweep.parameters(member), return_state=True)
        if not state.is_completed():
            REQUEST.check()
            sweep.fail(member, _why(state))
            if sweep.is_over:
                return


def _deployed(sweep: _Sweep) -> None:
    """Parameters with the store's full address: the worker has another working directory."""
    sweep.places["store"] = sweep.settings.store.uri
    asked = {member.name: sweep.parameters(member) for member in sweep.waiting}
    members = {member.name: member for member in sweep.members}

    def ended(name: str, state: State[Any]) -> bool:
        if not state.is_completed():
            sweep.fail(members[name], _why(state))
        return sweep.is_over

    run_deployed(flow_of(sweep.members).name, asked, lambda name: sweep.begin(members[name]), ended, sweep=sweep.name)


def _why(state: State[Any]) -> str:
    return next((line for line in (state.message or "").splitlines() if line.strip()), state.name or "it did not end")
