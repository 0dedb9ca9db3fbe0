"""The state of a run, from the store alone: whether it is at work and where, its stages, what it took and has to go."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Literal

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.choice import late_choice
from radlads.tasks.contracts.recipe.recipe import Recipe, recipe_of_data
from radlads.tasks.contracts.settings import check_run_name
from radlads.tasks.contracts.stages import (
    ALIGN,
    CHOOSE,
    DEQUANTIZE,
    EVALUATE,
    NEEDLE,
    PLAN,
    PRETRAIN,
    PUBLISH,
    STAGES,
    TOKENIZE,
    TRANSPLANT,
)
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.errors import StoreError
from radlads.tasks.contracts.store.files import parallel
from radlads.tasks.contracts.store.layout import check_layout, recipe_key, run_key, run_names
from radlads.tasks.contracts.store.pointers import Pointer, read_pointers
from radlads.tasks.look.record import unknown_run
from radlads.tasks.look.stage_state import Pulse, StageState, pulse_of, stage_state

_log = logging.getLogger(__name__)
RunWord = Literal["running", "finished", "failed", "stopped", "died", "silent"]
"""died: its process, of this machine, is dead. silent: another machine's process has not renewed its lease for more
than a minute: it died, or cannot reach the store."""
_PARALLEL = 8


@dataclass
class RunState:
    """A run. where: the process that makes it, or made it last, if that died. last_seen_seconds: since its last
    heartbeat, by the store's clock; None where it ended in order. seconds_left: of all stages that are left, as far as
    they are known (`left_is_whole`). judged: the models of another run that it evaluates."""

    run: str
    store: str
    recipe: str
    word: RunWord
    stages: list[StageState] = field(default_factory=list)
    where: str = ""
    launcher: str = "local"
    last_seen_seconds: float | None = None
    began: datetime | None = None
    moved: datetime | None = None
    """When its newest stage began."""
    judged: tuple[str, ...] = ()

    @property
    def is_alive(self) -> bool:
        """Whether it may be at work."""
        return self.word == "running"

    @property
    def done(self) -> int:
        """How many stages are done."""
        return sum(stage.word == "done" for stage in self.stages)

    @property
    def current(self) -> list[StageState]:
        """The stages at work; of a run that is not, those that are neither done nor to do."""
        words = ("running", "starting", "waiting") if self.is_alive else ("died", "failed", "stopped", "begun")
        return [stage for stage in self.stages if stage.word in words]

    @property
    def seconds_left(self) -> float | None:
        """Of the stages that are left; None where none of them is known."""
        left = [s.seconds_left for s in self.stages if s.word != "done" and s.seconds_left is not None]
        return sum(left) if left else None

    @property
    def left_is_whole(self) -> bool:
        """Whether the time of every stage that is left is known."""
        return all(s.seconds_left is not None for s in self.stages if s.word != "done")

    def total(self, name: Literal["seconds", "gpu_hours", "dollars"]) -> float | None:
        """What all stages took that this run made; None where no stage says."""
        known = [value for stage in self.stages if (value := getattr(stage, name)) is not None]
        return sum(known) if known else None

    def as_json(self) -> dict[str, Any]:
        """For programs: plain values, times as ISO 8601."""
        shown = asdict(self)
        shown["state"] = shown.pop("word")
        for stage, one in zip(shown["stages"], self.stages, strict=True):
            stage["state"] = stage.pop("word")
            stage["share"] = one.share
        shown |= {name: self.total(name) for name in ("seconds", "gpu_hours", "dollars")}
        shown |= {"seconds_left": self.seconds_left, "seconds_left_is_whole": self.left_is_whole}
        plain: dict[str, Any] = json.loads(json.dumps(shown, default=lambda value: value.isoformat()))
        return plain


def look(store: Store, run: str, *, layout_checked: bool = False) -> RunState:
    """The state of a run. Raises UserError, which names what is near, for an unknown one; StoreError."""
    if not layout_checked:
        check_layout(store)
    check_run_name(run)
    data = store.get_bytes(recipe_key(run))
    pointers = read_pointers(store, run)
    pulse = pulse_of(store, run_key(run))
    if data is None and not pointers and pulse is None:
        raise unknown_run(store, run)
    recipe = None if data is None else _recipe(data, run)
    judged = read_pointers(store, run, "judged")
    planned = read_planned(store, pointers)
    alive = pulse is not None and pulse.is_alive
    labels = expected_stages(recipe, pointers, planned, judged)

    def see(label: str) -> StageState:
        numbers = planned.get(label, {})
        return stage_state(store, run, label, labels[label], pointers.get(label), numbers, alive)

    stages = parallel(see, list(labels), _PARALLEL)
    _mark_outdated(stages, pointers, judged)
    times = sorted(pointer.time for pointer in pointers.values())
    return RunState(
        run=run,
        store=store.uri,
        recipe=recipe.name if recipe is not None else "",
        word=_word(pulse, stages),
        stages=stages,
        where=str(pulse.lease.holder) if pulse is not None else "",
        launcher=recipe.resources.launcher if recipe is not None else "local",
        last_seen_seconds=pulse.age if pulse is not None else None,
        began=times[0] if times else None,
        moved=times[-1] if times else None,
        judged=tuple(judged),
    )


def expected_stages(
    recipe: Recipe | None,
    pointers: Mapping[str, Pointer],
    planned: Mapping[str, Mapping[str, Any]],
    judged: Mapping[str, Pointer],
) -> dict[str, str]:
    """Label → stage of all that a run has done and will do, in order. recipe: None if this version cannot read it; then
    the run's pointers and its plan say."""
    if recipe is None:
        found = {label: pointer.stage for label, pointer in pointers.items()}
        found |= {label: label.split("-")[0] for label in planned if label.split("-")[0] in STAGES}
        order = list(STAGES)
        return dict(sorted(found.items(), key=lambda item: (order.index(item[1]), item[0])))
    labels = {PLAN.name: PLAN.name}
    if DEQUANTIZE.name in pointers:
        labels[DEQUANTIZE.name] = DEQUANTIZE.name
    judging = [stage for stage in (EVALUATE, NEEDLE) if getattr(recipe, stage.name) is not None]
    names = recipe.datasets_used
    if judged:
        names = (recipe.evaluate.data,) if recipe.evaluate is not None else ()
    labels |= {f"{TOKENIZE.name}-{name}": TOKENIZE.name for name in names}
    if not judged:
        making = [PRETRAIN.name] if recipe.pretrain is not None else [TRANSPLANT.name, *recipe.training_stages]
        if late_choice(recipe) is not None and ALIGN.name in making:
            making.insert(making.index(ALIGN.name) + 1, CHOOSE.name)
        labels |= {name: name for name in making}
    if recipe.pretrain is None:
        labels |= {stage.name: stage.name for stage in judging}
    return labels if judged else labels | {PUBLISH.name: PUBLISH.name}


def find_run(store: Store, run: str | None) -> str:
    """The named run; without a name the one at work, or the one that began a stage last. Raises UserError."""
    if run is not None:
        return check_run_name(run)
    check_layout(store)
    names = run_names(store)
    if not names:
        raise UserError(f"{store.uri} has no runs yet: `radlads run RECIPE` makes one; --store names another store")

    def newest(name: str) -> tuple[bool, float]:
        pulse = pulse_of(store, run_key(name))
        times = [pointer.time.timestamp() for pointer in read_pointers(store, name).values()]
        return pulse is not None and pulse.is_alive, max(times, default=0.0)

    found = parallel(newest, names, _PARALLEL)
    return max(zip(found, names, strict=True))[1]


def _recipe(data: bytes, run: str) -> Recipe | None:
    try:
        return recipe_of_data(data, None, where=f"the recipe of run '{run}'")
    except UserError as error:
        _log.warning("%s: which stages are left is not known", str(error).splitlines()[0])
        return None


def read_planned(store: Store, pointers: Mapping[str, Pointer]) -> dict[str, Mapping[str, Any]]:
    """Label → the numbers of the plan, whatever its version; empty before there is one."""
    pointer = pointers.get(PLAN.name)
    if pointer is None or store.read_manifest(pointer.key) is None:
        return {}
    with suppress(ValueError, KeyError, AttributeError, StoreError):
        stages = json.loads(store.read_file(pointer.key, "plan.json"))["stages"]
        return {name.replace(" ", "-"): dict(numbers) for name, numbers in stages.items()}
    return {}


def _mark_outdated(stages: list[StageState], pointers: Mapping[str, Pointer], judged: Mapping[str, Pointer]) -> None:
    """A finished stage will be made again if it read a product that the run has since replaced; the report, too, if it
    was made of a run that was not finished."""
    current = {pointer.digest for pointer in (*pointers.values(), *judged.values())}
    for state in stages:
        is_early = state.stage == PUBLISH.name and any(other.word != "done" for other in stages if other is not state)
        if state.word == "done" and (is_early or not set(state.made_from) <= current):
            state.word, state.seconds_left = "outdated", state.planned_seconds


def _word(pulse: Pulse | None, stages: list[StageState]) -> RunWord:
    if pulse is not None:
        return "running" if pulse.is_alive else "died" if pulse.lease.holder.is_here else "silent"
    if all(stage.word == "done" for stage in stages):
        return "finished"
    words = {stage.word for stage in stages}
    return "failed" if "failed" in words else "died" if "died" in words else "stopped"
