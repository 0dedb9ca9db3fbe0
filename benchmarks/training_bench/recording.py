"""Measured rows for the plan's table of speeds, and what the plan expects of a case."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from radlads.kernels.shared.backends import installed
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.recipe import parse_recipe
from radlads.tasks.jobs.plan.memory import Memory, NetworkSizes, training_memory
from radlads.tasks.jobs.plan.sizes import count_networks
from radlads.tasks.jobs.plan.timing.measured import SpeedRow
from radlads.tasks.jobs.plan.timing.step_time import work_of
from radlads.tasks.jobs.train.gpu_kinds import find_kind
from training_bench.case import Case
from training_bench.inputs import teacher_config
from training_bench.report import Row

_ONE_ROW = {"tokens": 64, "context": 64, "batch": 1}


def check_recordable(cases: list[Case], gpu: str) -> None:
    """Raises UserError, one line, for runs that the plan's table has no place for."""
    if any(case.device != "cuda" for case in cases) or find_kind(gpu) is None:
        raise UserError(f"--record is for runs on a GPU of tasks/jobs/train/gpu_kinds.py, and this is '{gpu}'")
    if not all(case.fused and case.engine == "product" for case in cases):
        raise UserError("--record is for what the product runs; drop --unfused and --engine")


def speed_row(row: Row, *, gpu: str, command: str, file: Path) -> SpeedRow:
    """The table's row of a product's run that did not fail. file: page of results, under the repository."""
    case, first = row.case, row.measured[0]
    kind = find_kind(gpu)
    assert kind is not None, "check_recordable"
    liger = installed("liger_kernel")
    root = Path(__file__).resolve().parents[2]
    changed = {name: value for name, value in case.to_json().items() if value != getattr(_DEFAULT, name)}
    return SpeedRow(
        kind=kind,
        shape=case.shape + (f", {case.layers} layers" if case.layers else ""),
        work=work_of(case.stage, case.section(), case_networks(case, liger=liger), case.resources(threads=1)),
        tokens_per_second=round(row.tokens_per_second, 1),
        peak_gib=round(max(rank["peak_bytes"] for rank in row.measured) / 2**30, 2),
        startup_seconds=round(first["marks"]["first step begins"], 1),
        stall_seconds=round(first["save_seconds"], 3) if "save_seconds" in first else None,
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        command=command,
        file=str(file.resolve().relative_to(root)) if file.resolve().is_relative_to(root) else file.name,
        case=json.loads(json.dumps(changed | {"shape": case.shape, "stage": case.stage})),
        liger=liger,
    )


def recorded_case(row: SpeedRow) -> Case:
    """The case of a row that this benchmark made."""
    given = dict(row.case or {})
    return Case(**given | {name: tuple(given.get(name, ())) for name in ("attention_layers", "freeze")})


def case_networks(case: Case, *, liger: bool) -> NetworkSizes:
    """Teacher and student of a case, as a plan counts them."""
    student: dict[str, Any] = {"variant": case.variant, "options": case.options}
    raw = {
        "name": "case",
        "teacher": {"path": "/random"},
        "student": student | {"attention_layers": list(case.attention_layers)},
        "data": {"train": {"sources": [{"kind": "files", "paths": ["/random"]}]}},
        "align": _ONE_ROW,
    }
    return count_networks(parse_recipe(raw), teacher_config(case), liger=liger)


def case_memory(case: Case, networks: NetworkSizes) -> Memory:
    """What a plan says of a case's memory."""
    return training_memory(
        case.stage,
        case.section(),
        networks,
        case.resources(threads=1),
        teacher_bits=8 if case.teacher_bits == 8 else 16,
        mlp_bits=8 if case.mlp_bits == 8 else 16,
    )


_DEFAULT = Case(shape="", stage="")
