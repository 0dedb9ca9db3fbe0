"""Draws the scores of a layer choice: one bar per layer, chosen layers filled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

_PANELS = {
    "recall": (
        ("score", "recall gained per remaining KL"),
        ("recall_gained", "recall gained, nats per token"),
        ("kl_saved", "KL saved, nats per token"),
    ),
    "difficulty": (("score", "difficulty"), ("loss", "align loss at the end")),
}
_CHOSEN, _OTHER = "#2a62b8", "#c9d5e8"


def draw_choice(sheet: dict[str, Any], path: Path) -> None:
    """Write the PNG of a choose.json: first-round scores, with the round number above each chosen layer."""
    panels, rows = _PANELS[sheet["choose"]], sheet["layers"]
    width = max(3.4, 0.16 * len(rows) + 1.2)
    figure, axes = plt.subplots(1, len(panels), figsize=(width * len(panels), 3.2), squeeze=False, layout="constrained")
    for axis, (key, label) in zip(axes[0], panels, strict=True):
        values = [row[key] if row[key] is not None else 0.0 for row in rows]
        axis.bar([row["layer"] for row in rows], values, color=[_CHOSEN if row["chosen"] else _OTHER for row in rows])
        for row, value in zip(rows, values, strict=True):
            if row["chosen"]:
                note = str(row.get("round") or row["layer"])
                axis.annotate(note, (row["layer"], max(value, 0.0)), ha="center", va="bottom", fontsize=8)
        axis.axhline(0, color="black", linewidth=0.6)
        axis.set_xlabel("layer")
        axis.set_title(label, fontsize=10)
        axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        axis.margins(y=0.12)
    figure.savefig(path, dpi=130)
    plt.close(figure)
