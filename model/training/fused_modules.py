"""Norms, MLPs and rotary positions of a network through fused kernels, for training on a GPU: in place of modules of
transformers that compute the same, word for word.

Norms are torch's fused operator, MLPs liger-kernel's (an optional package); rotary positions of mixers and of softmax
attention are kernels/mixer_ops. liger's norm takes 2 to 14 times as long as torch's up to 3,584 wide, where its
backward pass walks over rows with one program a multiprocessor, and 6 % less at 6,144
(benchmarks/results/mixer_ops_h100.md). Parameters, their names and classes for `isinstance` stay, so that checkpoints
and exports are not affected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial, update_wrapper
from importlib.metadata import version
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from radlads.kernels.shared.backends import installed, not_on_gpu
from radlads.kernels.shared.chosen import note_kernel
from radlads.kernels.shared.meta import KeptForBackward
from radlads.model.mixers.shared.family_code import (
    FAMILY_CLASS,
    family_class,
    is_llama_mlp,
    is_llama_norm,
    is_llama_rotary,
)
from radlads.model.mixers.shared.mixer import Mixer, rotate_halves

_ROTARY = "apply_rotary_pos_emb"


def fuse_modules(model: nn.Module, device: torch.device, *, liger: bool | None = None) -> None:
    """Fuse what can be, in place, of a network that will run on `device`; what runs is logged and recorded. On the
    meta device the network stands for one on a GPU, and nothing is recorded; liger: whether liger-kernel is installed
    there, None: as it is here."""
    on_gpu = device.type in ("cuda", "meta")
    no_gpu = None if on_gpu else not_on_gpu(torch.empty(0, device=device))
    there = on_gpu and (installed("liger_kernel") if liger is None else liger)
    no_liger = no_gpu or (None if there else "liger-kernel is not installed")
    for name, is_same, forward, fused, reason in (
        ("rms_norm", is_llama_norm, _norm, lambda: "torch, fused", no_gpu),
        ("swiglu", is_llama_mlp, _mlp, lambda: f"liger-kernel {version('liger-kernel')}", no_liger),
    ):
        found = [module for module in model.modules() if is_same(module)]
        for module in found if reason is None else ():
            module.__class__ = _with_forward(family_class(module), forward)
        if found and device.type != "meta":
            note_kernel(name, "transformers" if reason else fused(), partial(str, reason or ""))
    for module in model.modules() if on_gpu else ():
        if isinstance(module, Mixer):
            if is_llama_rotary(module.shape.rotary):
                module.shape = replace(module.shape, rotary=rotate_halves)
        elif turns_as_llama(module):
            module.__class__ = _with_forward(type(module), _turned(type(module).forward))


def turns_as_llama(module: nn.Module) -> bool:
    """Whether a module is a family's softmax attention that calls such a function by its global name."""
    forward = getattr(type(module), "forward", None)
    if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names:
        return False
    return is_llama_rotary(forward.__globals__.get(_ROTARY))


@cache
def _turned(forward: FunctionType) -> FunctionType:
    """The same function with the fused rotary positions under that name; its module stays as it is."""
    given = {**forward.__globals__, _ROTARY: rotate_rows}
    made = FunctionType(forward.__code__, given, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return update_wrapper(made, forward)


def rotate_rows(
    q_BHTK: Tensor, k_BGTK: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb` of Llama, for heads before tokens."""
    turned = rotate_halves(q_BHTK.transpose(1, 2), k_BGTK.transpose(1, 2), cos_BTP, sin_BTP)
    return turned[0].transpose(1, 2), turned[1].transpose(1, 2)


@cache
def _with_forward(kind: type[nn.Module], forward: Callable[..., Tensor]) -> type[nn.Module]:
    own = {"forward": forward, "__module__": kind.__module__, FAMILY_CLASS: kind}
    return type(kind.__name__, (kind,), own)


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    return (norm_meta if hidden_states.is_meta else _torch_norm)(hidden_states, self.weight, self.variance_epsilon)


def _mlp(self: Any, x: Tensor) -> Tensor:
    return finish_mlp(self, self.gate_proj(x), self.up_proj(x))


def finish_mlp(module: Any, gate: Tensor, up: Tensor) -> Tensor:
    """down(silu(gate) ⊙ up) of a Llama MLP, as `fuse_modules` left it."""
    if type(module).forward is not _mlp:
        inner = module.act_fn(gate) * up
    else:
        inner = (swiglu_meta if gate.is_meta else _liger_swiglu)(gate, up)
    out: Tensor = module.down_proj(inner)
    return out


def _torch_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return nn.functional.rms_norm(x, weight.shape, weight, eps)  # rounds after it multiplies: no less exact


def _liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    # Its backward pass writes gradients over gate and up, so it runs once a forward pass: no retained graph.
    out: Tensor = LigerSiLUMulFunction.apply(gate, up)
    return out


def norm_meta(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What torch's norm keeps, for plans (kernels/shared/meta.py): its input, and a number a token."""
    out: Tensor = KeptForBackward.apply([x.new_empty(x.shape[:-1], dtype=torch.float32)], x)
    return out


def swiglu_meta(gate: Tensor, up: Tensor) -> Tensor:
    """Likewise, of liger's SwiGLU: its inputs."""
    out: Tensor = KeptForBackward.apply([], gate, up)
    return out
