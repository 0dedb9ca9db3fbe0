"""The rows of the table, the units of work, and the settings of every process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radlads.model.mixers.shared.registry import find_variant, list_variants
from radlads.tasks.contracts.recipe.choice import RecallProbe
from radlads.tasks.contracts.recipe.recipe import Recipe

Record = dict[str, Any]
NUM_LAYERS = 4  # of the demo teacher


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    variant: str
    options: dict[str, Any]
    kind: str


@dataclass(frozen=True)
class Unit:
    """A piece of work: teacher_needle, pure, calibrated, hybrid, control or speed."""

    kind: str
    row: str = ""
    seed: int = 0
    layers: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        return "/".join(map(str, (self.kind, self.row, self.seed, list(self.layers))))


@dataclass(frozen=True)
class Settings:
    """Settings of every process."""

    recipe: Recipe
    probe: RecallProbe
    device: str
    work: Path
    large: tuple[int, int]
    speed_steps: int


def table_rows() -> list[Row]:
    """All variants with default options, then their faithful and their close forms."""
    plain = [(name, name, {}) for name in list_variants()]
    plain.append(("rad_rwkv7 groupnorm", "rad_rwkv7", {"form": "groupnorm"}))
    rows = [Row(*one, "default") for one in plain]
    published = {"first_values_gradient": False, "key_scaling": "log_log_decay", "residual_init": "constant"}
    for variant in list_variants():
        known = find_variant(variant).Options.model_fields
        options = {key: value for key, value in published.items() if key in known}
        if variant == "rwkv7":  # ARWKV-7B, the published conversion to it
            options |= {"gate": False, "group_norm": False}
        if options:
            rows.append(Row(f"{variant} faithful", variant, options, "faithful"))
    close = {"value_residual_init": -4.0, "key_residual_init": -4.0, "decay_shift": 1.0}
    for name, variant, options in plain:
        known = find_variant(variant).Options.model_fields
        found = {key: value for key, value in close.items() if key in known}
        rows.append(Row(f"{name} close", variant, options | found, "close"))
    return rows


ROWS = {row.name: row for row in table_rows()}
