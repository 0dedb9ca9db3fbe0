"""Norms, MLPs and rotary positions of a student without gradients on a GPU: one kernel each, in place of the family's
dozens. Elsewhere (on a CPU, with gradients, under torch.compile) the family's code runs. An exported model carries this
file.

Parameters and their names stay; a module's class is one made of the family's, so `isinstance` says the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from radlads.kernels.inference import few_rows_apply, gated_linear, is_inference, rms_norm, silu_product
from radlads.model.mixers.shared.family_code import FAMILY_CLASS, is_llama_mlp, is_llama_norm, is_llama_rotary
from radlads.model.mixers.shared.mixer import Mixer, rotate_halves
from radlads.model.mixers.shared.products import is_plain_linear, project_together


def use_fast_modules(backbone: nn.Module) -> None:
    """Let the norms, the MLPs and the mixers' rotary positions of a converted backbone do so, in place."""
    for module in backbone.modules():
        if is_llama_norm(module):
            module.__class__ = _made(type(module), "norm")
        elif is_llama_mlp(module):
            module.__class__ = _made(type(module), "mlp")
        elif isinstance(module, Mixer) and is_llama_rotary(module.shape.rotary):
            module.shape = replace(module.shape, rotary=partial(_turn, module.shape.rotary))


@cache
def _made(family: type[nn.Module], kind: str) -> type[nn.Module]:
    own: dict[str, Any] = {FAMILY_CLASS: family, "__module__": family.__module__, "__reduce_ex__": _reduce}
    own |= {"_kind": kind, "forward": {"norm": _norm, "mlp": _mlp}[kind]}
    return type(family.__name__, (family,), own)


def _reduce(self: Any, protocol: Any) -> Any:
    # Pickle finds the family's class under this name, not the one made of it.
    return _again, (getattr(self, FAMILY_CLASS), self._kind), self.__dict__


def _again(family: type[nn.Module], kind: str) -> nn.Module:
    made: nn.Module = object.__new__(_made(family, kind))
    return made


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    if is_inference(hidden_states):
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)
    out: Tensor = getattr(self, FAMILY_CLASS).forward(self, hidden_states)
    return out


def _mlp(self: Any, x: Tensor) -> Tensor:
    if not is_inference(x):
        out: Tensor = getattr(self, FAMILY_CLASS).forward(self, x)
        return out
    gate, up = self.gate_proj, self.up_proj
    if few_rows_apply(x) and all(is_plain_linear(one) and one.bias is None for one in (gate, up)):
        return project_together([gated_linear(x, gate.weight, up.weight)], [self.down_proj])[0]
    return project_together([silu_product(gate(x), up(x))], [self.down_proj])[0]


def _turn(family: Callable[..., Any], r: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    """The family's `apply_rotary_pos_emb`, or ours for heads after tokens."""
    if unsqueeze_dim == 2 and is_inference(r):
        return rotate_halves(r, k, cos, sin)
    return family(r, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
