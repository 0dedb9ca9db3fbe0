"""The stages as Prefect tasks, and the runner that runs a graph with them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Generic, ParamSpec, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture
from prefect.states import Cancelled, Failed
from prefect.tasks import Task

from radlads.tasks.contracts.disk import explain_disk
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.credentials import hide
from radlads.tasks.contracts.recipe.recipe import Recipe
from radlads.tasks.contracts.specs import NeedleSpec, StageSpec
from radlads.tasks.contracts.stages import CHOOSE, NEEDLE, PLAN, PUBLISH
from radlads.tasks.contracts.store.open import StoreError
from radlads.tasks.contracts.tracking import log_file, run_url
from radlads.tasks.launchers.launcher import JobCrashed
from radlads.tasks.launchers.stopping import REQUEST, RunStopped
from radlads.tasks.observe import show_link, show_markdown, show_picture, show_table
from radlads.tasks.perform import perform
from radlads.tasks.pipeline import Pipeline, Plan
from radlads.tasks.plain_runner import read_plan
from radlads.tasks.plan_table import plan_rows
from radlads.tasks.stage import Product

_P = ParamSpec("_P")
_R = TypeVar("_R")
_MOST_RETRIES = 20
_RETRY_SECONDS = 10
_RETRIES_NOTE = "retries allowed: "


class PrefectRunner:
    """A `Runner` (graph.py) that runs every stage as a task of the current flow."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def plan(self, recipe: Recipe) -> Plan:
        """As Runner.plan."""
        return plan_task(self._pipeline, recipe)

    def run(self, stage: str, spec: StageSpec, inputs: Mapping[str, Product], *, label: str | None = None) -> Product:
        """As Runner.run."""
        return task_of(stage)(self._pipeline, spec, inputs, label or stage)

    def submit(self, stage: str, spec: StageSpec, inputs: Mapping[str, Product]) -> PrefectFuture[Product]:
        """As Runner.submit; the stage runs in a thread."""
        return task_of(stage).submit(self._pipeline, spec, inputs, stage)


class StageTask(Generic[_P, _R]):
    """A Prefect task that ends with an explanation instead of a traceback if the error has one.

    Prefect logs the traceback of what a task raises; a task that returns a failed state shows only its message. So the
    task returns one, and the error is raised in the caller as usual.
    """

    def __init__(self, task: Task[..., Any]) -> None:
        self.task = task

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Run it in this thread."""
        state: State[_R] = self.task(*args, **kwargs, return_state=True)  # type: ignore[assignment]
        result: _R = state.result()
        return result

    def submit(self, *args: _P.args, **kwargs: _P.kwargs) -> PrefectFuture[_R]:
        """Run it in a thread."""
        future: PrefectFuture[_R] = self.task.submit(*args, **kwargs)
        return future


def stage_task(name: str, *, run_name: str | None = None) -> Callable[[Callable[_P, _R]], StageTask[_P, _R]]:
    """Make a function, whose first argument is the Pipeline, a Prefect task.

    The store is the only source of truth: Prefect caches and persists nothing. A crash is retried, as often as the
    settings allow; an error that a retry cannot fix is not.
    """

    def decorate(function: Callable[_P, _R]) -> StageTask[_P, _R]:
        @functools.wraps(function)
        def explained(*args: Any, **kwargs: Any) -> Any:
            try:
                REQUEST.check()
                return function(*args, **kwargs)
            except RunStopped as error:
                return Cancelled(message=str(error), data=error)
            except (UserError, StoreError, JobCrashed) as error:
                pipeline: Pipeline = args[0] if args else kwargs["pipeline"]
                may_help = not isinstance(error, UserError)
                error.add_note(f"{_RETRIES_NOTE}{pipeline.settings.retries if may_help else 0}")
                return Failed(message=hide(str(error)), data=error)
            except OSError as error:
                pipeline = args[0] if args else kwargs["pipeline"]
                disk_error = explain_disk(error, pipeline.settings.work)
                if disk_error is None:
                    raise
                return Failed(message=hide(str(disk_error)), data=disk_error)

        settings: dict[str, Any] = {
            "cache_policy": NO_CACHE,
            "persist_result": False,
            "retries": _MOST_RETRIES,
            "retry_delay_seconds": _RETRY_SECONDS,
            "retry_condition_fn": may_retry,
        }
        return StageTask(task(name=name, task_run_name=run_name or name, **settings)(explained))

    return decorate


def may_retry(_: Task[Any, Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Prefect's retry condition: true only for errors that a retry can fix."""
    notes = getattr(state.data, "__notes__", ())
    allowed = [int(note.removeprefix(_RETRIES_NOTE)) for note in notes if note.startswith(_RETRIES_NOTE)]
    return bool(allowed) and task_run.run_count <= allowed[-1]


@stage_task(PLAN.name)
def plan_task(pipeline: Pipeline, recipe: Recipe) -> Plan:
    """Check every option and every size before anything runs, and pin the teacher and the corpus files."""
    product = perform(pipeline, PLAN.name, pipeline.plan_spec(recipe), {})
    report = read_plan(pipeline, product)
    show_table(pipeline.run, PLAN.name, plan_rows(report), f"Plan of {pipeline.run}")
    show_link(pipeline.run, "mlflow", run_url(pipeline.parent), f"{pipeline.run} in MLflow")
    return Plan(product=product, report=report)


@functools.cache
def task_of(stage: str) -> StageTask[[Pipeline, StageSpec, Mapping[str, Product], str], Product]:
    """The task of a stage other than plan. Each stage has its own, since Prefect numbers a flow's task runs by task."""

    def run(pipeline: Pipeline, spec: StageSpec, inputs: Mapping[str, Product], label: str) -> Product:
        product = perform(pipeline, stage, spec, inputs, label=label)
        show = _SHOWN.get(stage)
        if show is not None:
            show(pipeline, spec, product)
        return product

    run.__name__ = run.__qualname__ = stage
    return stage_task(stage, run_name="{label}")(run)


def _show_choice(pipeline: Pipeline, _: StageSpec, product: Product) -> None:
    picture = pipeline.store.read_file(pipeline.store.key(product.uri), "choose.png")
    show_picture(pipeline.run, "attention-layers", picture, f"Layers scored and chosen: {pipeline.run}")


def _show_needle(pipeline: Pipeline, spec: StageSpec, product: Product) -> None:
    picture = pipeline.store.read_file(pipeline.store.key(product.uri), "needle.png")
    whose = " (not the student's own teacher)" if isinstance(spec, NeedleSpec) and spec.other_teacher else ""
    title = f"Needle in a haystack, teacher{whose} and student: {pipeline.run}"
    show_picture(pipeline.run, "needle-heatmap", picture, title)
    log_file(pipeline.parent, "needle.png", picture)


def _show_report(pipeline: Pipeline, _: StageSpec, product: Product) -> None:
    text = pipeline.store.read_file(pipeline.store.key(product.uri), "report.md")
    show_markdown(pipeline.run, "report", text.decode(), f"Report of {pipeline.run}")
    log_file(pipeline.parent, "report.md", text)


_SHOWN: dict[str, Callable[[Pipeline, StageSpec, Product], None]] = {
    CHOOSE.name: _show_choice,
    NEEDLE.name: _show_needle,
    PUBLISH.name: _show_report,
}
"""Stage → function that shows its result in Prefect's pages once it has ended."""
