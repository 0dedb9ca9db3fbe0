"""`radlads plan`: computes the plan of a recipe without the orchestrator and prints it as a table."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from radlads.tasks.contracts.job import JobResources, StoreRef
from radlads.tasks.contracts.recipe.recipe import Recipe, Resources
from radlads.tasks.contracts.settings import resolve_settings
from radlads.tasks.contracts.specs import PlanReport, PlanSpec
from radlads.tasks.contracts.store.open import LocalStore
from radlads.tasks.launchers.devices import planned_resources
from radlads.tasks.launchers.launcher import JobCrashed
from radlads.tasks.launchers.registry import find_launcher
from radlads.tasks.plan_table import plan_rows, short_count, time_lines
from radlads.tasks.stage import StageRequest, run_stage

_LEGEND = "GiB of each device (host: of the host). adam: gradients, optimizer; rest: activations, logits, buffers"

_WIDEST = 160


def plan_offline(
    recipe: Recipe, *, gpus: int | None = None, gpu_memory_gib: float | None = None, sizes_only: bool = False
) -> PlanReport:
    """Run the plan job in a temporary folder. Raises JobFailed with the recipe's fault; JobCrashed with the path of the
    log, which is then kept.

    gpus, gpu_memory_gib: plan for a machine with these instead of this one. sizes_only: as in PlanSpec.
    """
    cache = resolve_settings().content_cache
    folder = tempfile.mkdtemp(prefix="radlads-plan-")
    try:
        store = LocalStore(StoreRef(uri=f"{folder}/store"))
        request = StageRequest(
            stage="plan",
            run="plan",
            recipe=recipe.name,
            spec=PlanSpec(recipe=recipe, preview=True, sizes_only=sizes_only),
            inputs={},
            store=store,
            resources=machine_of(recipe.resources, gpus, gpu_memory_gib),
            work=Path(folder, "work"),
            content_cache=cache if cache.parent.is_dir() else None,
        )
        run_stage(request)
        report = PlanReport.model_validate_json(store.read_file(request.key, "plan.json"))
    except JobCrashed as error:
        raise JobCrashed(f"{str(error).splitlines()[0]}; its log is {request.scratch}/log.txt") from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    return report


def machine_of(requested: Resources, gpus: int | None, gpu_memory_gib: float | None) -> JobResources:
    """The machine that is planned for: the described one, else those that the recipe names, else this one. Raises
    UserError."""
    if requested.launcher != "local" and gpus is None:
        known = find_launcher(requested).resources(requested)
        return known if gpu_memory_gib is None else known.model_copy(update={"gpu_memory_gib": gpu_memory_gib})
    return planned_resources(requested, gpus, gpu_memory_gib) or find_launcher(requested).resources(requested)


def _active(parameters: int, report: PlanReport) -> str:
    idle = report.idle_parameters
    return f" ({short_count(parameters - idle)} active a token)" if idle else ""


@contextmanager
def _at_least(out: Console, width: int) -> Iterator[None]:
    """Widen the console to the table: truncated numbers are worse than long lines."""
    before, out.width = out.width, max(width, out.width)
    try:
        yield
    finally:
        out.width = before


def print_plan(out: Console, recipe: Recipe, report: PlanReport) -> None:
    """Print teacher, student, one row per stage, and warnings."""
    kept = ", ".join(str(layer) for layer in report.attention_layers) or "none"
    if report.choice is not None:
        kept = f"{report.choice.count}, chosen by {report.choice.choose} after align"
    out.print(f"[bold]{recipe.name}[/]: {escape(' '.join(recipe.description.split()))}")
    if report.teacher is not None:
        active = _active(report.teacher_parameters, report)
        out.print(
            f"teacher   {escape(report.teacher.path)}, {report.teacher_parameters:,} parameters{active}, "
            f"{report.num_layers} layers"
        )
        if report.gguf is not None:
            out.print(f"          {escape(str(report.gguf))}")
        groups = ", ".join(f"{group} {short_count(count)}" for group, count in report.groups.items())
        out.print(
            f"student   {recipe.student.variant}, {report.student_parameters:,} parameters"
            f"{_active(report.student_parameters, report)}: {groups}"
        )
        out.print(
            f"          {report.mixer_parameters:,} in mixers, {report.new_parameters:,} of them new; "
            f"layers that stay attention: {kept}"
        )
    machine = report.assumptions
    like = machine.get("as_fast_as")
    pace = f", as fast as {'an' if like[0] in 'HL' else 'a'} {like}" if like else ""
    size = f"{machine['memory_bytes'] / 2**30:.1f} GiB each"
    out.print(f"machine   {machine['processes']} × {machine['device']}, {size}{pace}")
    rows = plan_rows(report)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    for name in rows[0] if rows else ():
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    with _at_least(out, Measurement.get(out, out.options.update(max_width=_WIDEST), table).maximum):
        out.print(table)
    out.print(_LEGEND, style="dim")
    times, *speeds = time_lines(report)
    out.print(f"time      {times}")
    for line in speeds:
        out.print(f"speed     {escape(line)}")
    if report.gpu_hours is not None:
        price = f", about {report.dollars:,.2f} dollars" if report.dollars is not None else ""
        out.print(f"in all    {report.gpu_hours:,.1f} GPU hours{price} (estimated)")
    for line in report.advice:
        out.print(f"faster    {escape(line)}")
    for warning in report.warnings:
        out.print(f"[yellow]warning[/]   {escape(warning)}")
