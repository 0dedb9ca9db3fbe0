"""Bytes a token keeps for the backward pass in each part of a layer, counted by running the part on the meta device.

Every variant keeps different tensors (q/k norms, low-rank maps, fp32 copies), so they are counted from what autograd
saves, not listed. The recurrences declare what their kernels keep (kernels/shared/meta.py).
Dims: B batch, T time, D model width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from radlads.kernels.shared.meta import FEWEST_HEADS
from radlads.model.mixers.shared.attention_shape import read_attention_shape
from radlads.model.mixers.shared.mixer import FirstValues, Mixer
from radlads.model.student.first_values import attention_first_values
from radlads.model.student.modeling import RadladsForCausalLM, norm_names
from radlads.model.training.fused_modules import fuse_modules
from radlads.model.training.mixer_parts import round_log_decay

# A multiple of the kernels' chunk, so that the bytes per token are exact.
_TOKENS = 128


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one token and one layer."""

    mixer: int
    """The mixer of a recurrent layer after the first, where a pass has many heads (kernels/shared/meta.py)."""
    mixer_few: int
    """Likewise, where it has few, for which other kernels run."""
    attention: int
    mlp: int
    """With weights that train."""
    frozen_mlp: int
    norms: int
    """All norms of a layer."""
    linear: int = 0
    """Of a layer that is linear attention in the teacher already, as transformers computes it in plain torch."""


def count_layer_bytes(
    student: RadladsForCausalLM, dtype: torch.dtype, *, context: int = _TOKENS, liger: bool | None = None
) -> LayerBytes:
    """Count with a student on the meta device, in a dtype. Its parameters need gradients. context: tokens of the
    longest row: what a mixer with a window keeps of a token depends on it. liger: as fuse_modules."""
    cast: Any = student
    student = cast.to(dtype)
    fuse_modules(student, torch.device("meta"), liger=liger)
    round_log_decay(student, dtype)  # decay_dtype: auto
    parts, inner = student.parts, student.model
    config: Any = inner.config
    x = torch.empty(1, _TOKENS, config.hidden_size, dtype=dtype, device="meta", requires_grad=True)
    positions = torch.arange(_TOKENS, device="meta")[None]
    rope = _rotary_positions(getattr(inner, parts.rotary), x, positions, config)
    windowed = any(hasattr(mixer, "window") for mixer in student.mixers().values())
    row = context if windowed else _TOKENS
    mixed = _rotary_positions(getattr(inner, parts.rotary), x, torch.arange(row, device="meta")[None], config)
    known = {_storage(tensor) for tensor in (*student.parameters(), *rope, x)}
    many = -(-FEWEST_HEADS // config.num_attention_heads)
    layer: Any = getattr(inner, parts.layers)[0]
    mlp, norms = getattr(layer, parts.mlp), [getattr(layer, name) for name in norm_names(parts)]
    word = dtype.itemsize
    trained, frozen = _experts_bytes(config, word) if _has_experts(mlp) else _mlp_bytes(mlp, x, known)
    return LayerBytes(
        mixer=_mixer_bytes(student, many, mixed, x.new_empty(1, mixed[0].shape[1], x.shape[2])),
        mixer_few=_mixer_bytes(student, 1, mixed, x.new_empty(1, mixed[0].shape[1], x.shape[2])),
        attention=_attention_bytes(config, word, gated=_has_output_gate(student)),
        mlp=trained,
        frozen_mlp=frozen,
        norms=sum(_kept(partial(norm, x), known)[0] // _TOKENS + config.hidden_size * word for norm in norms),
        linear=linear_attention_bytes(inner, parts),
    )


def linear_attention_bytes(backbone: Any, parts: Any) -> int:
    """What a token keeps in a layer that is linear attention in the teacher already, with its input; 0 without such
    layers. backbone: on the meta device, in the dtype that is asked for. parts: a family, or its names."""
    name = getattr(parts, "linear_attention", None)
    layers = getattr(backbone, parts.layers)
    module = next((found for layer in layers if name and (found := getattr(layer, name, None)) is not None), None)
    if module is None:
        return 0
    dtype = next(module.parameters()).dtype
    x = torch.empty(1, _TOKENS, backbone.config.hidden_size, dtype=dtype, device="meta", requires_grad=True)
    known = {_storage(tensor) for tensor in (*module.parameters(), x)}
    kept: int = _kept(partial(module, hidden_states=x), known)[0] // _TOKENS
    return kept + x.shape[-1] * x.element_size()


def _mixer_bytes(student: RadladsForCausalLM, sequences: int, rope: tuple[Tensor, Tensor], like: Tensor) -> int:
    """Bytes a token, its input included, of the second mixer, or the only one; 0 without mixers. like: [1,T,D]."""
    x = like.new_empty(sequences, *like.shape[1:]).requires_grad_()
    known = {_storage(tensor) for tensor in (*student.parameters(), *rope, x)}
    kept, attention, first = 0, student.config.first_attention(), None
    if attention is not None:
        given = attention_first_values(student.config, student.attention(attention), x, rope)
        first = FirstValues(*(None if z is None else z.detach().requires_grad_() for z in given))
        known |= {_storage(tensor) for tensor in first if tensor is not None}  # kept once, by the attention
    for module in list(student.mixers().values())[:2]:
        kept, mixed = _kept(partial(module.mix, x, rope=rope, first=first), known)
        first = mixed.first
        known |= {_storage(tensor) for tensor in first if tensor is not None}  # kept once, by the first mixer
    return kept // (x.shape[0] * x.shape[1]) + x.shape[-1] * x.element_size()


def _has_output_gate(student: RadladsForCausalLM) -> bool:
    parts: Any = student.parts
    layer = student.config.softmax_layers()[0]
    module: Any = getattr(getattr(student.model, parts.layers)[layer], parts.attention)
    shape = module.shape if isinstance(module, Mixer) else read_attention_shape(module, parts, 0.0)
    return shape.output_gate


def _rotary_positions(rotary: nn.Module, x: Tensor, positions: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """cos and sin; where each kind of layer has its own, those of the first."""
    by_kind = "layer_type" in inspect.signature(rotary.forward).parameters
    cos, sin = rotary(x, positions, config.layer_types[0]) if by_kind else rotary(x, positions)
    return cos, sin


def _kept(run: Callable[[], Any], known: set[int]) -> tuple[int, Any]:
    """Bytes that autograd keeps of a run, every storage once, existing tensors excluded; and its result."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in known:
            kept[_storage(tensor)] = tensor  # held, so that no other storage gets its address
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), result


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _mlp_bytes(mlp: nn.Module, x: Tensor, known: set[int]) -> tuple[int, int]:
    width = x.shape[-1] * x.element_size()  # its input, the norm's output, which only a trained weight needs
    trained = _kept(partial(mlp, x), known)[0] // _TOKENS + width
    needed = {name: parameter.requires_grad for name, parameter in mlp.named_parameters()}
    mlp.requires_grad_(False)
    frozen = _kept(partial(mlp, x), known)[0] // _TOKENS
    for name, parameter in mlp.named_parameters():
        parameter.requires_grad_(needed[name])
    return trained, frozen


def _has_experts(mlp: nn.Module) -> bool:
    return any(parameter.ndim == 3 for parameter in mlp.parameters())


def _experts_bytes(config: PreTrainedConfig, word: int) -> tuple[int, int]:
    """A token's copies for the experts that it is routed to: gathered input and weighted output (D each), gate, up,
    their activation and product. Routing cannot be run on the meta device."""
    values: Any = config
    taken, inner = values.num_experts_per_tok, values.moe_intermediate_size
    trained = taken * (3 * values.hidden_size + 5 * inner) * word + values.hidden_size * word
    return trained, taken * (2 * values.hidden_size + 3 * inner) * word


def _attention_bytes(config: PreTrainedConfig, word: int, *, gated: bool) -> int:
    """Input, q, k and v before and after the rotary step, output, and the fp32 logarithm of each row's sum: what fused
    attention keeps; of an output gate itself, its sigmoid and the product. The plain form would keep the scores; no GPU
    runs it."""
    values: Any = config
    heads = values.num_attention_heads
    kv_heads = getattr(values, "num_key_value_heads", None) or heads
    head_dim = getattr(values, "head_dim", None) or values.hidden_size // heads
    return int(
        (values.hidden_size + (6 if gated else 3) * heads * head_dim + 4 * kv_heads * head_dim) * word + 4 * heads
    )
