"""What a plan expects beside what was measured, for every row of the plan's table of speeds.

    python benchmarks/plan_check.py [--out FILE]

Needs no GPU. Time: of an optimizer step, as the plan computes it from the whole table and from the table without that
row. Memory: what the plan expects to be allocated on a GPU; the context and the communication buffers that it adds are
no part of what torch measures. Ends with 1 if a time (from the whole table) is off by more than 15 % or a memory by
more than 10 %.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from training_bench.recording import case_memory, case_networks, recorded_case

from radlads.tasks.jobs.plan.timing.measured import SpeedRow, measured_rows
from radlads.tasks.jobs.plan.timing.overheads import start_seconds
from radlads.tasks.jobs.plan.timing.speed import expected_speed

TIME, MEMORY = 0.15, 0.10
_HEADER = (
    "measured on", "settings", "step s", "plan", "error", "without the row", "error", "GiB", "plan", "error",
    "start-up s", "plan",
)  # fmt: skip


def compared(row: SpeedRow, rows: Sequence[SpeedRow]) -> tuple[list[str], bool]:
    """The cells of a row, and whether it is within the limits."""
    measured, others = row.step_seconds, [one for one in rows if one is not row]
    told, alone = (expected_speed(row.work, row.kind, of).step_seconds for of in (rows, others))
    cells = [f"{measured:.3f}", f"{told:.3f}", _error(told, measured), f"{alone:.3f}", _error(alone, measured)]
    within = abs(told / measured - 1) <= TIME
    memory = startup = ["", "", ""]
    if row.case is not None:
        case = recorded_case(row)
        networks = case_networks(case, liger=row.liger)
        if row.peak_gib is not None:
            found = case_memory(case, networks)
            gib = (found["total"] - found["overhead"]) / 2**30
            memory = [f"{row.peak_gib:.1f}", f"{gib:.1f}", _error(gib, row.peak_gib)]
            within &= abs(gib / row.peak_gib - 1) <= MEMORY
        if row.startup_seconds is not None:
            read = networks.student_parameters + networks.teacher_parameters * row.work.taught
            startup = [f"{row.startup_seconds:.0f}", f"{start_seconds(read, case.resources(threads=1)):.0f}"]
    return [str(row), _settings(row), *cells, *memory, *startup[:2]], within


def _settings(row: SpeedRow) -> str:
    work = row.work
    words = [f"{work.passes} × {work.tokens:,} tokens"]
    words += ["ZeRO-3"] * bool(work.gathered) + ["checkpointed"] * bool(work.recomputed) + ["offload"] * work.offload
    return ", ".join(words)


def _error(told: float, measured: float) -> str:
    return f"{told / measured - 1:+.1%}"


def page(rows: Sequence[SpeedRow]) -> tuple[str, bool]:
    """The page of results, and whether all rows are within the limits."""
    lines = ["# Plans beside measurements", "", *(__doc__ or "").split("\n\n", 2)[2].strip().splitlines(), ""]
    lines += ["| " + " | ".join(_HEADER) + " |", "|" + " :-- |" * 2 + " --: |" * (len(_HEADER) - 2)]
    every = [compared(row, rows) for row in rows]
    lines += ["| " + " | ".join(cells) + " |" for cells, _ in every]
    outside = sum(not within for _, within in every)
    lines += ["", f"{len(rows)} rows, {outside} beyond the limits. Each row's command, date and page of results are in",
              "`tasks/jobs/plan/timing/speeds.json`."]  # fmt: skip
    return "\n".join(lines) + "\n", not outside


def main() -> int:
    """Write the page; 1 if a row is beyond the limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "plan_check.md")
    options = parser.parse_args()
    text, within = page(measured_rows())
    options.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
