"""The report of a run: where it is, or made of what the run has finished so far."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import InputRef
from radlads.tasks.contracts.locks.lease import run_lease
from radlads.tasks.contracts.recipe.recipe import Resources, recipe_of_data
from radlads.tasks.contracts.settings import Settings
from radlads.tasks.contracts.specs import PublishSpec
from radlads.tasks.contracts.stages import MODEL_STAGES, PUBLISH, TOKENIZE
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.open import LocalStore
from radlads.tasks.launchers.local import LocalLauncher
from radlads.tasks.look.record import read_recipe
from radlads.tasks.look.run_state import RunState
from radlads.tasks.stage import StageRequest, run_stage

REPORT_PAGE = "report.html"
"""Of the product of publish."""


def find_report(state: RunState) -> str | None:
    """The key of the product that holds a run's report; None if it has none, or one of earlier settings."""
    found = (stage.product for stage in state.stages if stage.stage == PUBLISH.name and stage.word == "done")
    return next(found, None)


def make_report(store: Store, state: RunState, settings: Settings) -> str:
    """Make the report of what a run has finished, and return the key of its product. The run points at it, unless it is
    at work. Raises UserError for a run without a model, as run_stage."""
    done = [stage for stage in state.stages if stage.word == "done" and stage.stage != PUBLISH.name]
    if not any(stage.stage in MODEL_STAGES for stage in done):
        raise UserError(
            f"the run '{state.run}' ({state.word}) has no model yet, so there is nothing to report: `radlads status "
            f"{state.run}` shows what it has"
        )
    recipe = recipe_of_data(read_recipe(store, state.run), None, where=f"the recipe of run '{state.run}'")
    names = {stage.label: stage.label for stage in done}
    names |= {s.label: f"{s.label.removeprefix(f'{TOKENIZE.name}-')} data" for s in done if s.stage == TOKENIZE.name}
    inputs = {
        names[stage.label]: InputRef(uri=store.join(stage.product), digest=stage.product.rsplit("/", 1)[-1])
        for stage in done
    }
    launcher = LocalLauncher()
    folder = settings.work / "runs" / state.run
    with nullcontext() if state.is_alive else run_lease(store, state.run, folder) as lease:
        request = StageRequest(
            stage=PUBLISH.name,
            run=state.run,
            recipe=recipe.name,
            spec=PublishSpec(section=recipe.publish, recipe=recipe),
            inputs=inputs,
            store=store,
            resources=launcher.resources(Resources(device="cpu")),
            work=settings.work,
            lease=lease,
            content_cache=settings.content_cache,
            launcher=launcher,
        )
        run_stage(request)
    return request.key


def page_of(store: Store, product: str, folder: Path) -> Path:
    """The report as a file of this machine: the store's own, or a copy in `folder`. Raises UserError for a product of
    another kind, StoreError."""
    entries = {entry.path for entry in store.open_manifest(product).files}
    if REPORT_PAGE not in entries:
        raise UserError(f"{store.join(product)} has no {REPORT_PAGE}: it was made by an earlier version, or by hand")
    if isinstance(store, LocalStore):
        return store.root / product / REPORT_PAGE
    return store.fetch(product, folder, subset=REPORT_PAGE) / REPORT_PAGE
