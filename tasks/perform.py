"""A stage as a Prefect task: run_stage with what a person sees around it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Generic, ParamSpec, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture
from prefect.states import Cancelled, Failed
from prefect.tasks import Task

from radlads.tasks.contracts.disk import explain_disk
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources, Stage, TrackingRef
from radlads.tasks.contracts.parsing.credentials import hide
from radlads.tasks.contracts.specs import StageSpec, TokenizeSpec
from radlads.tasks.contracts.store.open import StoreError
from radlads.tasks.contracts.tracking import close_run, open_stage_run, run_url
from radlads.tasks.launchers.local import JobCrashed
from radlads.tasks.launchers.stopping import REQUEST, RunStopped
from radlads.tasks.mirror import kept_stage, mirror_stage, stage_params
from radlads.tasks.observe import ProgressView, gpu_slot, show_link
from radlads.tasks.pipeline import Pipeline
from radlads.tasks.stage import Product, StageRequest, run_stage

_P = ParamSpec("_P")
_R = TypeVar("_R")
_MOST_RETRIES = 20
_RETRY_SECONDS = 10
_RETRIES_NOTE = "retries allowed: "


class StageTask(Generic[_P, _R]):
    """A Prefect task that ends with an explanation instead of a traceback where we have one.

    Prefect logs the traceback of what a task raises; a task that returns a failed state shows only its message. So the
    task returns one, and whoever calls it gets the error raised as usual.
    """

    def __init__(self, task: Task[..., Any]) -> None:
        self.task = task

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Run it here and now."""
        state: State[_R] = self.task(*args, **kwargs, return_state=True)  # type: ignore[assignment]
        result: _R = state.result()
        return result

    def submit(self, *args: _P.args, **kwargs: _P.kwargs) -> PrefectFuture[_R]:
        """Run it in a thread."""
        future: PrefectFuture[_R] = self.task.submit(*args, **kwargs)
        return future


def stage_task(name: str, *, run_name: str | None = None) -> Callable[[Callable[_P, _R]], StageTask[_P, _R]]:
    """Make a function, whose first argument is the Pipeline, a Prefect task.

    The store is the single truth: Prefect caches and persists nothing. A crash is tried again, as often as the settings
    say; what an attempt cannot mend is not.
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
                told = explain_disk(error, pipeline.settings.work)
                if told is None:
                    raise
                return Failed(message=hide(str(told)), data=told)

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
    """Prefect's question after a failure: another attempt? Only for what an attempt can mend."""
    notes = getattr(state.data, "__notes__", ())
    allowed = [int(note.removeprefix(_RETRIES_NOTE)) for note in notes if note.startswith(_RETRIES_NOTE)]
    return bool(allowed) and task_run.run_count <= allowed[-1]


def perform(
    pipeline: Pipeline, stage: Stage, spec: StageSpec, inputs: Mapping[str, Product], *, label: str | None = None
) -> Product:
    """Run a stage of the pipeline inside a Prefect task. label: what people call it, where the stage runs more often.

    Raises what run_stage raises.
    """
    label = label or stage
    request = pipeline.request(stage, spec, inputs)
    opened: list[TrackingRef] = []

    def open_tracking(digest: str) -> TrackingRef | None:
        params = stage_params(request.spec.model_dump(mode="json"))
        parent = pipeline.tracked()
        ref = open_stage_run(parent, label, digest, params=params) if parent is not None else None
        if ref is None:
            pipeline.behind = pipeline.behind or bool(pipeline.settings.tracking)
            return None
        opened.append(ref)
        show_link(pipeline.run, f"{label}-mlflow", run_url(ref), f"{label} in MLflow")
        return ref

    try:
        product = run_stage(
            request,
            open_tracking=open_tracking,
            on_progress=ProgressView(pipeline.run, label).show,
            slot=gpu_slot(
                pipeline.settings.gpu_limit, _computes_on(pipeline, stage, spec), f"{label} of {pipeline.run}"
            ),
        )
    except BaseException:
        if opened:
            _mirror(pipeline, request, opened[0])
        raise
    _mirror(pipeline, request, None)
    return product


def _mirror(pipeline: Pipeline, request: StageRequest, failed: TrackingRef | None) -> None:
    """Bring MLflow up to date with what the store has of a stage. How it ended is for the store to say, and not what
    this process went through: another one may have made the product. failed: the run to close where it is silent."""
    if not pipeline.settings.tracking or pipeline.is_lost:
        return
    parent = pipeline.tracked()
    kept = None
    with suppress(StoreError, OSError):  # of the store, which the job's own end tells of
        kept = kept_stage(pipeline.store, request.key)
    if parent is not None and kept is not None and mirror_stage(pipeline.store, parent, kept, pipeline.run):
        if kept.ending is not None:
            return
    else:
        pipeline.behind = True
    close_run(failed, "KILLED" if REQUEST.asked_at is not None else "FAILED")


def _computes_on(pipeline: Pipeline, stage: Stage, spec: StageSpec) -> JobResources:
    """What the stage's job computes on. Only tokenizing that samples from a teacher needs more than the CPU."""
    samples = isinstance(spec, TokenizeSpec) and spec.teacher is not None
    if samples or stage not in ("plan", "tokenize", "publish"):
        return pipeline.resources
    return pipeline.resources.model_copy(update={"device": "cpu"})
