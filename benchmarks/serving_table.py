"""The table and the picture of benchmarks/serving.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_table(told: dict[str, Any], path: Path) -> None:
    """Rows with both models side by side, and the student's number over the teacher's."""
    lines = [
        f"{told['device']}, {told['date']}, torch {told['torch']}, transformers {told['transformers']}",
        "",
        f"`{told['command']}`",
        "",
        "| | batch × tokens | teacher tokens/s | student tokens/s | student / teacher | peak GiB, teacher | student | "
        "joules a token, teacher | student |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in told["rows"]:
        teacher, student = row["teacher"], row["student"]
        size = f"{row['batch']} × {row['length']:,}" if "batch" in row else f"after {row['length']:,}"
        if row["kind"] == "largest batch":
            size += "".join(f", {name} {one['batch']:.0f}" for name, one in _both(row) if one)
        lines.append(
            f"| {row['kind']} | {size} | {_rate(teacher)} | {_rate(student)} | {_over(teacher, student)} | "
            f"{_peak(teacher)} | {_peak(student)} | {_energy(teacher)} | {_energy(student)} |"
        )
    same = told["same"]
    lines += [
        "",
        f"Equal greedy tokens: graph and eager {same['graph_is_eager']:.1%}, exported and package "
        f"{same['exported_is_package']:.1%}. Logits' distance from fp32: exported {same['error_of_exported']:.2e}, "
        f"package {same['error_of_package']:.2e}.",
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def draw(told: dict[str, Any], path: Path) -> None:
    """Tokens a second over length, for batch 1: reading and writing. Nothing where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for place, kind in enumerate(("prefill", "decode")):
        axes = figure.add_subplot(1, 2, place + 1)
        for name, mark in (("teacher", "o-"), ("student", "s-")):
            points = [
                (row["length"], row[name]["tokens_per_second"])
                for row in told["rows"]
                if row["kind"] == kind and row.get("batch") == 1 and row[name]
            ]
            if points:
                axes.plot(*zip(*points, strict=True), mark, label=name)
        axes.set(xscale="log", yscale="log", xlabel="tokens so far", ylabel="tokens/s", title=f"{kind}, batch 1")
        axes.legend()
    figure.savefig(path, dpi=110)


def _both(row: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, row[name]) for name in ("teacher", "student")]


def _rate(found: dict[str, float] | None) -> str:
    return "does not fit" if found is None else f"{found['tokens_per_second']:,.1f}"


def _over(teacher: dict[str, float] | None, student: dict[str, float] | None) -> str:
    if teacher is None or student is None:
        return ""
    return f"{student['tokens_per_second'] / teacher['tokens_per_second']:.2f}"


def _peak(found: dict[str, float] | None) -> str:
    return "" if found is None or "peak_gib" not in found else f"{found['peak_gib']:.1f}"


def _energy(found: dict[str, float] | None) -> str:
    return "" if found is None or "watts" not in found else f"{found['watts'] / found['tokens_per_second']:.3f}"
