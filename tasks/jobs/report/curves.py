"""Draws the loss curves of the training stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from radlads.tasks.contracts.stages import ALIGN, stage_info


def draw_losses(sheets: Mapping[str, dict[str, Any]], path: Path) -> None:
    """One panel per stage: loss per step (faint), running mean, held-out losses, and a line where a rollback went back
    to. sheets: stage → train.json."""
    figure, axes = plt.subplots(1, len(sheets), figsize=(4.6 * len(sheets), 3.4), squeeze=False, layout="constrained")
    for axis, (stage, sheet) in zip(axes[0], sheets.items(), strict=True):
        steps, losses = np.array(sheet["losses"], dtype=float).T
        axis.plot(steps, losses, color="#2a62b8", alpha=0.3, linewidth=0.8)
        axis.plot(steps, _smooth(losses), color="#2a62b8", linewidth=1.8, label="training")
        heldout = sheet.get("heldout_losses") or []
        if heldout:
            at, values = np.array(heldout, dtype=float).T
            axis.plot(at, values, color="#c2571a", marker="o", markersize=4, linewidth=1.2, label="held out")
        targets = sorted({event["to"] for event in sheet.get("events", ()) if event["to"] is not None})
        for step in targets:
            label = "rolled back to here" if step == targets[0] else None
            axis.axvline(step, color="#777777", linestyle=":", linewidth=1.2, label=label)
        axis.set_title(stage)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(stage_info(stage).loss)
        if stage_info(stage).needs_teacher:  # falls toward zero
            _use_log_scale(axis)
        axis.grid(alpha=0.25, which="both")
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_layers(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw the align loss of each layer, early layers dark; returns False, without a file, if none was logged."""
    names = sorted({key for row in rows for key in row if key.startswith("layer_")})
    if not names:
        return False
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(names)))
    for name, shade in zip(names, shades, strict=True):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        steps, losses = np.array(points, dtype=float).T
        axis.plot(steps, _smooth(losses), color=shade, linewidth=1.4, label=name.replace("_", " "))
    _use_log_scale(axis)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel(ALIGN.loss)
    axis.grid(alpha=0.25, which="both")
    if len(names) <= 16:
        axis.legend(frameon=False, fontsize=8, ncols=2)
    else:
        bounds = mpl.colors.Normalize(0, len(names) - 1)
        figure.colorbar(mpl.cm.ScalarMappable(bounds, "viridis"), ax=axis, label="layer")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _use_log_scale(axis: Axes) -> None:
    """Log scale with plain numbers as tick labels."""
    axis.set_yscale("log")
    plain = FuncFormatter(lambda value, _position: f"{value:g}")
    axis.yaxis.set_major_formatter(plain)
    low, high = axis.get_ylim()
    axis.yaxis.set_minor_formatter(plain if high / low < 20 else NullFormatter())


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over 1/50 of the curve, with shorter windows at the start; same length as values."""
    width = max(1, len(values) // 50)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    smoothed: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return smoothed
