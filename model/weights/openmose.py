"""Weights under OpenMOSE's names (RWKVInside, RWKV-Infer): which mixer they belong to, inferred from names and shapes.

Projections are `receptance, key, value, output` there, the per-head norms `r_norm, k_norm`; the other names are ours.
Two layouts hold them: a Hugging Face one (`model.layers.<i>.self_attn.receptance.weight`, all else as the teacher has
it) and that of .pth files (`blocks.<i>.att.receptance.weight`, norms `ln_r, ln_k`), read as safetensors only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from radlads.tasks.contracts.errors import UserError

TENSOR_NAMES = {
    "q_proj": "receptance",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "output",
    "q_norm": "r_norm",
    "k_norm": "k_norm",
}
"""Our name of a part → OpenMOSE's."""

MARKER = "layer_architecture"
"""A constant that RWKVInside keeps in every layer. It does not identify a variant: cxa073 to cxa076 say 73, and hxa079
says 78, as its predecessor does. Other variants' values are not known here."""
PUBLISHED_MARKERS = {"cxa073": 73.0, "cxa075": 73.0, "hxa079": 78.0}

_ATTENTION = re.compile(r"^(?:model\.layers\.(\d+)\.self_attn|blocks\.(\d+)\.att)\.([\w.]+)$")
_SOFTMAX_PARTS = {"q_proj", "qkv_proj"}
_RANKS = {"decay_rank": "w1", "iclr_rank": "a1", "value_rank": "v1", "key_rank": "k1", "gate_rank": "g1"}
# Architectures as configs name them → our variant and the options that make it the same function.
_LOG_LOG = {"key_scaling": "log_log_decay"}
_DECLARED: dict[str, tuple[str, dict[str, Any]]] = {
    "x070": ("rwkv7", {}),
    "rwkv7": ("rwkv7", {}),
    "cxa073": ("cxa073", {}),
    "cxa074": ("cxa073", {}),
    "cxa075": ("cxa075", {}),
    "cxa079": ("hxa079", _LOG_LOG),
    "hxa079": ("hxa079", _LOG_LOG),
    "hxa07d": ("hxa079", {"key_scaling": "decay"}),
    "hxa07a": ("hxa07a", _LOG_LOG),
    "hxa07b": ("hxa07b", _LOG_LOG),
    "hxa07c": ("hxa07c", {}),
}


@dataclass(frozen=True)
class OpenMoseModel:
    """Contents of a checkpoint."""

    variant: str
    options: dict[str, Any] = field(default_factory=dict)
    """Ranks from the tensors' shapes, and the published form where published weights need it."""
    num_layers: int = 0
    attention_layers: tuple[int, ...] = ()
    qk_norm: bool = False
    unused: tuple[str, ...] = ()
    """Tensors that the first recurrent layer holds for a residual to itself, and the markers."""


def inspect_openmose(shapes: Mapping[str, Sequence[int]], *, architecture: str | None = None) -> OpenMoseModel:
    """Variant, ranks and kept attention layers of a checkpoint, from the names and shapes of its tensors alone.

    architecture: the author's name for it (hxa079, hxa07b, ...), needed where variants share tensor names: hxa07b and
    hxa07c differ only in a formula, hxa07d is read as hxa079 unless given, cxa070 has cxa075's names but no marker.
    Raises UserError: no such tensors, a mixture, a variant that is not here, a contradiction.
    """
    layers: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        match = _ATTENTION.match(name)
        if match:
            layers.setdefault(int(match.group(1) or match.group(2)), {})[match.group(3)] = tuple(shape)
    if not layers:
        raise UserError(
            "no tensors named model.layers.<i>.self_attn.* or blocks.<i>.att.*: not a checkpoint of OpenMOSE's"
        )
    if sorted(layers) != list(range(len(layers))):
        raise UserError(f"the checkpoint's layers are not 0 to {len(layers) - 1}: a shard is missing")
    attention = tuple(i for i in sorted(layers) if _SOFTMAX_PARTS & {part.split(".")[0] for part in layers[i]})
    recurrent = [i for i in sorted(layers) if i not in attention]
    if not recurrent:
        raise UserError("every layer of this checkpoint is softmax attention; nothing of it is converted")
    no_receptance = [i for i in recurrent if "receptance.weight" not in layers[i]]
    if no_receptance:
        raise UserError(f"layer {no_receptance[0]} has neither q_proj nor receptance: not a checkpoint of OpenMOSE's")
    parts = {part.split(".")[0] for i in recurrent for part in layers[i]}
    variant, options = _decide(parts, architecture)
    last = layers[recurrent[-1]]
    ranks = {rank: last[factor][1] for rank, factor in _RANKS.items() if factor in last}
    return OpenMoseModel(
        variant=variant,
        options={**options, **ranks},
        num_layers=len(layers),
        attention_layers=attention,
        qk_norm=bool({"r_norm", "ln_r"} & parts),
        unused=_unused(shapes, variant, recurrent[0]),
    )


def _decide(parts: set[str], architecture: str | None) -> tuple[str, dict[str, Any]]:
    """Variant and options of the published form; the tensor names and the declared architecture must agree."""
    candidates = _candidates(parts)
    if architecture is None:
        if len(candidates) > 1:
            raise UserError(
                f"these tensors may be {' or '.join(candidates)}, which differ in no name; say which as `architecture`"
            )
        architecture = candidates[0]
    if architecture.lower() not in _DECLARED:
        raise UserError(f"no mixer here for the architecture '{architecture}'; known: {', '.join(sorted(_DECLARED))}")
    variant, options = _DECLARED[architecture.lower()]
    if variant not in {_DECLARED[candidate][0] for candidate in candidates if candidate in _DECLARED}:
        raise UserError(f"the architecture is given as '{architecture}', but the tensors are those of {candidates[0]}")
    if variant == "rwkv7":
        options = {"token_shift": "x_r" in parts, "gate": "g1" in parts, "group_norm": "ln_x" in parts}
    return variant, options


def _candidates(parts: set[str]) -> list[str]:
    """Architectures with these tensors, the default one first. Raises UserError if no mixer here implements one."""
    if "x_r" in parts:
        return ["rwkv7"]
    if "k0" in parts:
        return ["hxa079"]
    if "k_k" in parts:
        if "ln_x" in parts and "g1" not in parts:
            return ["cxa073"]
        if "g1" in parts and "ln_x" not in parts and MARKER in parts:
            return ["cxa075"]
        if "g1" in parts and "ln_x" not in parts:
            return ["cxa075", "cxa070"]
        raise UserError("stock keys with both gate and GroupNorm (cxa070), or with neither: no such mixer here")
    if "v0" in parts:
        raise UserError(
            "first-layer values without keys and without k_k: cxa076, cxa077, cxa078 or hxa07e, which are not here"
        )
    return ["hxa07b", "hxa07c"] if "v1" in parts else ["hxa07a"]


def _unused(shapes: Mapping[str, Sequence[int]], variant: str, first: int) -> tuple[str, ...]:
    """The given names that no student uses."""
    own_residual = variant not in ("hxa07a", "hxa07b", "hxa07c")
    unused = []
    for name in shapes:
        match = _ATTENTION.match(name)
        if match is None:
            continue
        layer, part = int(match.group(1) or match.group(2)), match.group(3)
        residual = own_residual and layer == first and re.fullmatch(r"[vk][012]", part) is not None
        if residual or part == MARKER:
            unused.append(name)
    return tuple(unused)
