"""The needle grid as a heatmap: length on the x axis, depth on the y axis, one panel per model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

# Made for every kind of colour vision: lightness and blue to yellow tell, red and green do not. Grey: not run.
_NOT_RUN = "#d9d9d9"
_COLOURS = plt.get_cmap("cividis").with_extremes(bad=_NOT_RUN)
_DARK = 45.0
"""Percent below which a cell is so dark that its number is white."""


def draw_heatmap(sheet: dict[str, Any], path: Path) -> None:
    """Write the PNG of a needle.json: one panel per model, a dashed line at the training length."""
    names = list(sheet["models"])
    lengths, depths = sorted(set(sheet["lengths"])), sorted(set(sheet["depths"]))
    width = max(3.2, 0.75 * len(lengths) + 1.6)
    figure, axes = plt.subplots(
        1, len(names), figsize=(width * len(names) + 0.8, 0.42 * len(depths) + 2.0), squeeze=False, layout="constrained"
    )
    mesh = None
    for axis, name in zip(axes[0], names, strict=True):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for cell in sheet["cells"]:
            if cell[name] is not None:
                grid[depths.index(cell["depth"]), lengths.index(cell["length"])] = 100 * cell[name]["mean"]
        # The x axis is log2 of the length, with one column and one tick per length.
        edges = _edges(lengths)
        mesh = axis.pcolormesh(
            edges, np.arange(len(depths) + 1), np.ma.masked_invalid(grid), cmap=_COLOURS, vmin=0, vmax=100
        )
        _label_cells(axis, grid, lengths, edges)
        _label_axes(axis, sheet, name, lengths, depths, edges)
    axes[0][0].set_ylabel("depth of the fact, %")
    if mesh is not None:
        figure.colorbar(mesh, ax=axes[0].tolist(), label="found, %", shrink=0.9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _edges(lengths: list[int]) -> np.ndarray:
    """Column edges on a log2 axis, half-way between neighbours, [lengths + 1]."""
    logs = np.log2(np.array(lengths, dtype=float))
    if len(logs) == 1:
        return np.array([logs[0] - 0.5, logs[0] + 0.5])
    middles = (logs[1:] + logs[:-1]) / 2
    return np.concatenate([[2 * logs[0] - middles[0]], middles, [2 * logs[-1] - middles[-1]]])


def _label_cells(axis: Axes, grid: np.ndarray, lengths: list[int], edges: np.ndarray) -> None:
    for row, column in np.ndindex(grid.shape):
        value = grid[row, column]
        text = "–" if np.isnan(value) else f"{value:.0f}"
        middle = (edges[column] + edges[column + 1]) / 2
        ink = "white" if value < _DARK else "#202020"  # that of a cell without a number is dark
        axis.text(middle, row + 0.5, text, ha="center", va="center", fontsize=7, color=ink)


def _label_axes(
    axis: Axes, sheet: dict[str, Any], name: str, lengths: list[int], depths: list[float], edges: np.ndarray
) -> None:
    numbers = sheet["models"][name]
    title = name if numbers["mean"] is None else f"{name}: {100 * numbers['mean']:.0f} %"
    not_run = ", ".join(map(str, numbers["not_run"]))
    axis.set_title(f"{title} (not run: {not_run})" if not_run else title, fontsize=10)
    axis.set_xticks([(edges[i] + edges[i + 1]) / 2 for i in range(len(lengths))], [str(n) for n in lengths], fontsize=8)
    axis.set_yticks(np.arange(len(depths)) + 0.5, [f"{100 * depth:.0f}" for depth in depths], fontsize=8)
    axis.set_xlabel("context length, tokens (log2)")
    axis.invert_yaxis()
    within = [index for index, length in enumerate(lengths) if length <= sheet["training_length"]]
    if within:  # right of the last column within the training length
        axis.axvline(edges[within[-1] + 1], color="#202020", linestyle="--", linewidth=2.0, clip_on=False)
