"""How frozen weights are held: the values that a recipe may give, and which stages they change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from radlads.tasks.sections import Recipe

FrozenBits = Literal[8, 16]
"""Bits of a frozen weight matrix: 16 is the precision of the stage, 8 is int8 with one scale for 128 numbers."""


def teacher_bits(recipe: Recipe, stage: str) -> FrozenBits:
    """Bits of the teacher's matrices in a training stage; 16 where the stage runs no teacher."""
    runs = recipe.teacher is not None and stage in ("align", "distill")
    return recipe.teacher.bits if runs and recipe.teacher is not None else 16


def mlp_bits(recipe: Recipe, stage: str) -> FrozenBits:
    """Bits of the student's MLPs in a training stage; 16 where it trains them, and in align, which never runs them."""
    section = getattr(recipe, stage)
    frozen = stage != "align" and section is not None and "mlp" in section.freeze
    return recipe.student.mlp_bits if frozen else 16
