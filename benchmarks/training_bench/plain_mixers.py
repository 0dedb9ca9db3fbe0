"""The mixers of the plain build: the equations written down in torch, one operation after the other.

Dims: B batch, T time, D model width, H query heads, G kv heads, K key (and value) dim per head, A = H·K. They hold the
product's parameters under its names, so that both builds compute the same numbers; no module of the product is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

Operator = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
VARIANTS = ("rad_rwkv7", "hxa079")


def find_operator() -> tuple[Operator, str]:
    """fla's chunked RWKV-7 operator and its name, or this project's chunked form in torch where fla is not there."""
    try:
        import fla
        from fla.ops.rwkv7 import chunk_rwkv7
    except ImportError:
        from radlads.kernels.wkv7.chunked import wkv7_chunked

        return lambda *inputs: wkv7_chunked(*inputs)[0], "our chunked torch form (fla is not installed)"
    options = {"scale": 1.0, "safe_gate": True, "lower_bound": -math.exp(-0.5), "chunk_size": 64}
    return lambda *inputs: chunk_rwkv7(*inputs, **options)[0], f"fla {fla.__version__} chunk_rwkv7"


def compile_ahead(mixer: PlainMixer) -> None:
    """Compile all of fla's candidates for a mixer's sizes in parallel processes; its own search then has only to time
    them."""
    from peers import Compilers  # needs Triton

    with Compilers(partial(_fla_cases, mixer.heads, mixer.head_dim)) as compilers:
        compilers.wait("fla")


def _fla_cases(heads: int, head_dim: int) -> list[Any]:
    from peers import Case

    from radlads.kernels.shared.testing import wkv7_inputs

    operator = find_operator()[0]

    def run() -> None:
        inputs = wkv7_inputs(1, 1024, heads, head_dim, dtype=torch.bfloat16, device="cuda")
        operator(*inputs).sum().backward()
        with torch.no_grad():
            operator(*inputs)

    return [Case("fla", run, True)]


class FirstValues:
    """Outputs of the first recurrent layer for the deeper ones in a forward pass."""

    v: Tensor | None = None
    k: Tensor | None = None


class PlainMixer(nn.Module):
    """Replaces an attention module and has its call signature."""

    def __init__(
        self,
        attention: nn.Module,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        first: FirstValues,
        operator: Operator,
    ) -> None:
        """attention: the one that it replaces, whose projections it takes over. tensors: the product's parameters of
        this layer by their names. config: variant and options of the student."""
        super().__init__()
        self.variant, self.options = config["variant"], config["options"]
        self.head_dim, self.first, self.operator = attention.head_dim, first, operator
        self.heads = attention.o_proj.in_features // self.head_dim
        self.groups = attention.k_proj.out_features // self.head_dim
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, getattr(attention, name))
        self.q_norm = getattr(attention, "q_norm", None)
        self.k_norm = getattr(attention, "k_norm", None)
        if "ln_x.weight" in tensors:
            self.ln_x = nn.GroupNorm(self.heads, self.heads * self.head_dim, eps=self.head_dim * 1e-5)
        for name, tensor in tensors.items():
            place, _, own = name.rpartition(".")
            if place:
                self.get_submodule(place).get_parameter(own).data.copy_(tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor))
        self.is_first = not hasattr(self, "v0")

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        x = hidden_states
        r, k, v = (self._split(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            r, k = self.q_norm(r), self.k_norm(k)
        if self.options["rope"]:
            r, k = _rotate(r, *position_embeddings), _rotate(k, *position_embeddings)
        mix = self._rad if self.variant == "rad_rwkv7" else self._hxa079
        return self.o_proj(mix(x, r, k, v)), None

    def _rad(self, x: Tensor, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = self._repeat(k), self._repeat(v)
        if self.is_first:
            self.first.v = v
        else:
            v = v + (self.first.v - v) * self._split(torch.sigmoid(self.v0 + x @ self.v1 @ self.v2))
        iclr = self._split(torch.sigmoid((self.a0 + x @ self.a1 @ self.a2).float()))
        decay = self.w0.float() + (torch.tanh(x @ self.w1) @ self.w2).float()
        log_decay = self._split(-math.exp(-0.5) * torch.sigmoid(decay))
        if hasattr(self, "k_k"):
            kk = F.normalize((k * self._split(self.k_k)).float(), dim=-1).to(k.dtype)
            k = k * (1 + (iclr - 1) * self._split(self.k_a)).to(k.dtype)
        else:
            kk = F.normalize(k.float(), dim=-1).to(k.dtype)
            k = k * (1 - log_decay.exp() + iclr).to(k.dtype)
        out = self.operator(r, log_decay, k, v, -kk, kk * iclr.to(k.dtype))
        if hasattr(self, "ln_x"):
            norm = self.ln_x
            flat = out.flatten(0, 1).flatten(1).float()
            flat = F.group_norm(flat, self.heads, norm.weight.float(), norm.bias.float(), norm.eps)
            out = flat.to(out.dtype).view_as(out)
        else:
            out = out * self.head_dim**-0.5
        return out.flatten(2) * (torch.sigmoid(x @ self.g1) @ self.g2)

    def _hxa079(self, x: Tensor, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.is_first:
            kept = self.options["first_values_gradient"]
            self.first.v, self.first.k = (v, k) if kept else (v.detach(), k.detach())
        else:
            v = v + (self.first.v - v) * self._split(torch.sigmoid(self.v0 + x @ self.v1 @ self.v2))
            k = k + (self.first.k - k) * self._split(torch.sigmoid(self.k0 + x @ self.k1 @ self.k2))
        k, v = self._repeat(k), self._repeat(v)
        decay = self._split(self.w0.float() + (torch.tanh(x @ self.w1) @ self.w2).float())
        log_decay = -math.exp(-0.5) * torch.sigmoid(decay)
        iclr = self._split(torch.sigmoid((self.a0 + x @ self.a1 @ self.a2).float()))
        kk = F.normalize(k.float(), dim=-1).to(k.dtype)
        if self.options["key_scaling"] == "decay":
            scale = 1 - log_decay.exp() + iclr
        else:
            scale = 1 - (F.logsigmoid(decay) - 0.5) + iclr
        k = k * scale.to(k.dtype)
        out = self.operator(r, log_decay, k, v, -kk, kk * iclr.to(k.dtype)) * self.head_dim**-0.5
        out = out + (r * k * self.r_k).sum(-1, keepdim=True) * v
        return out.flatten(2) * (torch.sigmoid(x @ self.g1) @ self.g2)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _repeat(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.heads // self.groups, dim=2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(2) + torch.cat((-high, low), dim=-1) * sin.unsqueeze(2)
