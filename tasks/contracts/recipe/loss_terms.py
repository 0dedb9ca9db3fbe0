"""What the losses of training stages are made of, and what a stage may train by: the sections within their sections."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from radlads.tasks.contracts.recipe.base import Section


class Comprehensive(Section):
    """Weights of the seven terms of the `comprehensive` align loss (model/training/align_losses.py).

    As in the published code, content is multiplied by 1 − 0.3·q and context by 1 + 0.5·q at depth q = layer / layers.
    `batch_independent` is the revision at the commit of cxa073, whose spectral term is a Frobenius norm. `svd` is the
    earlier revision, which compares leading singular values; here per sequence instead of per micro-batch.
    """

    content: float = Field(default=1.0, ge=0)
    """Distance of the outputs, the student's scaled to the teacher's size. Source: the published code of cxa073."""
    cosine: float = Field(default=2.0, ge=0)
    """One minus the cosine of the outputs. Source: the published code of cxa073."""
    context: float = Field(default=1.0, ge=0)
    """How differently pairs of tokens resemble each other in the two outputs."""
    local: float = Field(default=0.5, ge=0)
    """Squared distance of means over groups of channels."""
    sequence_mean: float = Field(default=0.5, ge=0)
    """The published `global`."""
    temporal: float = Field(default=1.0, ge=0)
    """One minus the cosine of the differences between consecutive tokens."""
    spectral: float = Field(default=0.3, ge=0)
    """Difference of the second moments of channels (or, `revision: svd`, of their spectra)."""
    revision: Literal["batch_independent", "svd"] = "batch_independent"
    """Which form of the published code."""


class CeSpikes(Section):
    """At every `every`-th optimizer step (from 1 within its phase) the cross entropy has weight `weight` instead of
    `ce_weight`."""

    every: int = Field(gt=0)
    """Optimizer steps from one to the next."""
    weight: float = Field(gt=0)
    """Of the cross entropy at these steps."""

    def has(self, step: int) -> bool:
        """Whether a step of a phase, counted from 0, is one of them."""
        return (step + 1) % self.every == 0


class Average(Section):
    """Exponential moving average of what trains, which is exported in place of the last weights."""

    decay: float = Field(default=0.999, gt=0, lt=1)
    """Of an optimizer step; in the first steps (1 + n) / (10 + n) if that is less."""


class Lora(Section):
    """Low-rank updates of chosen projections: y = x Wᵀ + scale·(x Aᵀ) Bᵀ, A Kaiming-uniform, B zero, W frozen.

    Only these pairs and the mixer parameters other than projections train. The exported model has them merged. rank and
    scale are the defaults of the published code, which also zeroes A and therefore learns nothing (rwkv7_variants
    §8.6).
    """

    targets: tuple[str, ...] = Field(default=("q_proj", "k_proj", "v_proj", "o_proj"), min_length=1)
    """Last name components of linear modules in mixers, attention layers and MLPs."""
    rank: int = Field(default=32, gt=0)
    """Columns of A. Source: the published code of cxa073."""
    scale: float = Field(default=0.5, gt=0)
    """Of the update. Source: the published code of cxa073."""


class RopeFade(Section):
    """Rotary positions of kept layers fade over the stage's first tokens: their angles are multiplied by a factor that
    falls from 1 to 0 in a straight line, a step at a time. Held-out losses are of layers without positions, as the
    product is."""

    tokens: int = Field(gt=0)
    """From there on the layers have none."""
