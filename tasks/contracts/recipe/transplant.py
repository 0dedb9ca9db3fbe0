"""What the transplant stage does to the weights that it copies."""

from __future__ import annotations

from pydantic import Field

from radlads.tasks.contracts.recipe.base import Section


class TransplantScale(Section):
    """Multipliers of the projections (weight and bias) copied into converted layers; softmax layers keep theirs whole.

    The published RWKV-7 conversions shrink them so that an output without a norm does not blow up at first: cxa073
    0.5, 0.4, 0.3, 0.5, hxa079 1, 1, 0.3, 0.5 (rwkv7_variants §4.2). Where q and k have norms, theirs change nothing.
    """

    q: float = Field(default=1.0, gt=0)
    k: float = Field(default=1.0, gt=0)
    v: float = Field(default=1.0, gt=0)
    o: float = Field(default=1.0, gt=0)
