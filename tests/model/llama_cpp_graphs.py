"""llama.cpp's graphs `arwkv7` and `rwkv6qwen2` in fp64, token by token, on a GGUF file's tensors and settings alone.

Written from the graphs' equations (src/models of llama.cpp); nothing here knows radlads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class File:
    """A GGUF file's settings and its tensors in fp64, in torch's order of axes."""

    def __init__(self, path: Path, decay_scale: float = 0.606531) -> None:
        """decay_scale: e^(-1/2), as the graph has it."""
        import gguf

        self.decay_scale = decay_scale
        reader = gguf.GGUFReader(path)
        self.settings = {name: field.contents() for name, field in reader.fields.items()}
        self.arch = self.settings["general.architecture"]
        self.tensors: dict[str, Tensor] = {}
        for tensor in reader.tensors:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            self.tensors[tensor.name] = torch.tensor(values).double().reshape(*map(int, reversed(tensor.shape)))

    def setting(self, name: str) -> Any:
        """A setting of the architecture."""
        return self.settings[f"{self.arch}.{name}"]

    def __call__(self, name: str) -> Tensor:
        return self.tensors[f"{name}.weight"]

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)


def run_file(path: Path, tokens: Tensor, **constants: float) -> Tensor:
    """Logits [T, vocabulary] of tokens [T]."""
    file = File(path, **constants)
    mix = {"arwkv7": arwkv7_mix, "rwkv6qwen2": rwkv6_mix}[file.arch]
    eps = file.setting("attention.layer_norm_rms_epsilon")
    assert file.setting("token_shift_count") == 1
    x = file("token_embd")[tokens]
    shared: dict[str, Tensor] = {}
    for i in range(file.setting("block_count")):
        normed = rms_norm(x, file(f"blk.{i}.attn_norm"), eps)
        x = x + mix(file, i, normed, shared)
        normed = rms_norm(x, file(f"blk.{i}.ffn_norm"), eps)
        gate = torch.nn.functional.silu(normed @ file(f"blk.{i}.ffn_gate").T)
        x = x + (gate * (normed @ file(f"blk.{i}.ffn_up").T)) @ file(f"blk.{i}.ffn_down").T
    return rms_norm(x, file("output_norm"), eps) @ file("output").T


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def before(x_TD: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(x_TD[:1]), x_TD[:-1]))


def arwkv7_mix(file: File, layer: int, x: Tensor, shared: dict[str, Tensor]) -> Tensor:
    def w(name: str) -> Tensor:
        return file(f"blk.{layer}.time_mix_{name}")

    def low(name: str, x: Tensor) -> Tensor:
        assert w(f"{name}1").shape[0] == file.setting(f"attention.{RANKS[name]}_lora_rank")
        return (x @ w(f"{name}1").T) @ w(f"{name}2").T

    K = file.setting("wkv.head_size")
    gated = f"blk.{layer}.time_mix_g1.weight" in file.tensors
    lerp = w("lerp_fused")
    assert lerp.shape == (6 if gated else 5, 1, 1, x.shape[1])
    xr, xw, xk, xv, xa, *xg = (x + (before(x) - x) * one.flatten() for one in lerp)
    r, k, v = xr @ w("receptance").T, xk @ w("key").T, xv @ w("value").T
    decay = torch.exp(-file.decay_scale * torch.sigmoid(w("w0") + torch.tanh(xw @ w("w1").T) @ w("w2").T))
    if layer:
        v = v + (shared["v"] - v) * torch.sigmoid(w("v0") + low("v", xv))
    else:
        shared["v"] = v
        assert w("v1").shape == w("a1").shape
    a = torch.sigmoid(w("a0") + low("a", xa))
    kk = (k * w("k_k")).unflatten(-1, (-1, K))
    kk = kk / kk.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    ka = k * w("k_a")
    k = k + (a * ka - ka)
    r, decay, k, v, a = (z.unflatten(-1, (-1, K)) for z in (r, decay, k, v, a))
    state, y = torch.zeros(r.shape[1], K, K).double(), torch.zeros_like(r)
    for t in range(len(x)):  # state [H, V, K]
        removed = torch.einsum("hvk,hk->hv", state, -kk[t])
        state = state * decay[t, :, None] + v[t, :, :, None] * k[t, :, None]
        state = state + removed[:, :, None] * (kk[t] * a[t])[:, None]
        y[t] = torch.einsum("hvk,hk->hv", state, r[t])
    if f"blk.{layer}.time_mix_ln.weight" in file.tensors:
        y = torch.nn.functional.layer_norm(y, (K,), eps=64e-5).flatten(1) * w("ln")
        y = (y + file.tensors[f"blk.{layer}.time_mix_ln.bias"]).unflatten(-1, (-1, K))
    y = y + (k * r * w("r_k").view(-1, K)).sum(-1, keepdim=True) * v
    y = y.flatten(1)
    if gated:
        y = y * (torch.sigmoid(xg[0] @ w("g1").T) @ w("g2").T)
    return y @ w("output").T


RANKS = {"a": "iclr", "v": "value_residual_mix", "w": "decay", "g": "gate"}


def rwkv6_mix(file: File, layer: int, x: Tensor, shared: dict[str, Tensor]) -> Tensor:
    def w(name: str) -> Tensor:
        return file(f"blk.{layer}.time_mix_{name}")

    def biased(name: str, x: Tensor) -> Tensor:
        bias = file.get(f"blk.{layer}.time_mix_{name}.bias")
        return x @ w(name).T if bias is None else x @ w(name).T + bias

    K, kv = file.setting("wkv.head_size"), file.setting("attention.head_count_kv")
    assert w("w1").shape[0] == 5 * file.setting("time_mix_extra_dim")
    assert w("decay_w1").shape[0] == file.setting("time_decay_extra_dim")
    step = before(x) - x
    inner = torch.tanh((x + step * w("lerp_x").flatten()) @ w("w1").T).unflatten(-1, (5, -1))
    moves = torch.einsum("tbr,bdr->btd", inner, w("w2"))
    assert w("lerp_fused").shape == (5, 1, 1, x.shape[1])
    xw, xk, xv, xr, xg = x + (moves + w("lerp_fused").view(5, 1, -1)) * step
    r, k, v = biased("receptance", xr), biased("key", xk), biased("value", xv)
    g = torch.sigmoid(xg @ w("gate").T)
    r, k, v = (z.unflatten(-1, (-1, K)) for z in (r, k, v))
    assert k.shape[1] == kv
    k, v = (z.repeat_interleave(r.shape[1] // kv, dim=1) for z in (k, v))
    decay = w("decay") + torch.tanh(xw @ w("decay_w1").T) @ w("decay_w2").T
    decay = torch.exp(-torch.exp(decay)).unflatten(-1, (-1, K))
    k = k - k * decay
    state, y = torch.zeros(r.shape[1], K, K).double(), torch.zeros_like(r)
    for t in range(len(x)):  # state [H, K, V]
        state = state * decay[t, :, :, None] + k[t, :, :, None] * v[t, :, None]
        y[t] = torch.einsum("hkv,hk->hv", state, r[t] * K**-0.5)
    return (y.flatten(1) * g) @ w("output").T
