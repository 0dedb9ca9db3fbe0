"""Draws `evaluate.speed`: writing, reading and memory of teacher and student over the length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

_COLOURS = {"teacher": "#777777", "student": "#2a62b8"}
_PANELS = {
    "tokens_per_second": ("tokens written per second", 1.0),
    "prompt_seconds": ("seconds until the first token", 1.0),
    "memory_bytes": ("peak memory, GiB", 1024.0**3),
}
_FEWEST_LENGTHS = 2


def draw_speed(sheet: dict[str, Any], path: Path) -> bool:
    """One panel a measure, one line a model; returns False, without a file, for fewer than two lengths. sheet: as
    judge_speed makes it. A length that a model did not run leaves its line there."""
    rows = sheet["lengths"]
    panels = [key for key in _PANELS if any((row[name] or {}).get(key) for row in rows for name in _COLOURS)]
    if len(rows) < _FEWEST_LENGTHS or not panels:
        return False
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False, layout="constrained")
    for axis, key in zip(axes[0], panels, strict=True):
        label, unit = _PANELS[key]
        for name, colour in _COLOURS.items():
            points = [(row["length"], row[name][key] / unit) for row in rows if row[name] and row[name].get(key)]
            if points:
                lengths, values = zip(*points, strict=True)
                axis.plot(lengths, values, color=colour, marker="o", markersize=4, linewidth=1.6, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks([row["length"] for row in rows], [f"{row['length']:,}" for row in rows], fontsize=8)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("tokens before")
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True
