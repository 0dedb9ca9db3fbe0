"""What rows that several ranks share exclude."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from transformers import PreTrainedConfig

from radlads.model.student.configuration import windowed_layers
from radlads.model.teacher.load import find_family, rotary_settings


def sharing_fault(
    config: PreTrainedConfig, layers: Collection[int], ranks: int, *, context: int, by_heads: bool = False
) -> str | None:
    """One line on why `ranks` ranks cannot share rows of `context` tokens in a network; None if they can.

    config: the teacher's, whose family the student has too. layers: those that run as softmax attention.
    by_heads: whether mixers exchange heads as well (`SHARES_ROWS_BY_HEADS`).
    """
    family, sizes = find_family(config), _values(config)
    if len(family.softmax_layers(config)) < sizes.num_hidden_layers:
        return "the layers that are linear attention in the teacher already need whole rows; leave it out"
    if (layers or by_heads) and sizes.num_attention_heads % ranks:
        return (
            f"{ranks} processes cannot divide the {sizes.num_attention_heads} heads of softmax attention; choose a "
            "number that divides them"
        )
    if windowed_layers(config, family.window) & set(layers) and sizes.sliding_window < context:
        return (
            f"softmax attention with a window of {sizes.sliding_window} tokens needs rows of its own, and context is "
            f"{context}; leave it out"
        )
    for rope in rotary_settings(sizes.rope_parameters or {}):
        border = rope.get("original_max_position_embeddings") or sizes.max_position_embeddings
        if rope.get("rope_type") in ("longrope", "dynamic") and context > border:
            return (
                f"the teacher's rotary positions ({rope['rope_type']}) depend on the length of a row beyond {border} "
                "tokens, which no process sees; leave it out"
            )
    return None


def _values(config: PreTrainedConfig) -> Any:
    return config
