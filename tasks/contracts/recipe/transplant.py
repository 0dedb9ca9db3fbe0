"""Scaling of weights that the transplant stage copies."""

from __future__ import annotations

from pydantic import Field

from radlads.tasks.contracts.recipe.base import Section


class TransplantScale(Section):
    """Multipliers of the projections (weight and bias) copied into converted layers; attention layers are not scaled.

    The published RWKV-7 conversions scale them down to keep an output without a norm small at the start: q, k, v, o of
    cxa073 0.5, 0.4, 0.3, 0.5; of hxa079 1, 1, 0.3, 0.5 (rwkv7_variants §4.2). With norms on q and k, their scales have
    no effect.
    """

    q: float = Field(default=1.0, gt=0)
    k: float = Field(default=1.0, gt=0)
    v: float = Field(default=1.0, gt=0)
    o: float = Field(default=1.0, gt=0)
