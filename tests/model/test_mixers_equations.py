"""Every RWKV-7-like mixer is the equations of its docstring, one token and one head at a time; and how each starts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from radlads.kernels.mixer_ops import rotate_heads
from radlads.model import list_variants
from radlads.model.mixers.shared.mixer import AttentionShape, FirstValues, Mixer
from radlads.model.mixers.shared.registry import find_variant

D, H, G, K, T = 20, 4, 2, 8, 9


def make(variant: str, options: dict, *, layer: int = 1, first: bool = False, **sizes: Any) -> Mixer:
    module = find_variant(variant)
    shape = AttentionShape(
        **{"hidden_size": D, "num_heads": H, "num_kv_heads": G, "head_dim": K, "norm_eps": 1e-6}
        | dict.fromkeys(("q_bias", "k_bias", "v_bias", "o_bias", "qk_norm"), False)
        | sizes
    )
    torch.manual_seed(0)
    resolved = module.Options.parse(options, variant=variant).resolve(shape.hidden_size, shape.width)
    return module.Mixer(shape, resolved, layer=layer, num_layers=4, first=first)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def shifted(x: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1) - x


def by_hand(variant: str, m: Mixer, x: Tensor, rope: tuple[Tensor, Tensor], first: FirstValues, given: dict) -> Tensor:
    """RWKV-7's relatives, each written down on its own."""
    B, time, _ = x.shape
    z = dict.fromkeys("rwkvag", x)
    if variant == "rwkv7" and given.get("token_shift", True):
        z = {name: x + shifted(x) * getattr(m, f"x_{name}") for name in z}
    r = m.q_proj(z["r"]).view(B, time, H, K)
    k = m.k_proj(z["k"]).view(B, time, G, K)
    v = m.v_proj(z["v"]).view(B, time, G, K)
    if variant.startswith("hxa"):
        r, k = rotate_heads(r, *rope), rotate_heads(k, *rope)
    if variant == "hxa079":
        v = v + (first.v - v) * sigmoid(m.v0 + z["v"] @ m.v1 @ m.v2).view(B, time, G, K)
        k = k + (first.k - k) * sigmoid(m.k0 + z["k"] @ m.k1 @ m.k2).view(B, time, G, K)
    k, v = (t.unsqueeze(3).expand(B, time, G, H // G, K).reshape(B, time, H, K) for t in (k, v))
    if variant in ("rwkv7", "cxa073", "cxa075"):
        v = v + (first.v - v) * sigmoid(m.v0 + z["v"] @ m.v1 @ m.v2).view(B, time, H, K)
    if variant in ("hxa07b", "hxa07c"):
        v = v + 0.2 * (z["v"] @ m.v1 @ m.v2).view(B, time, H, K)
    offset = 0.6 if variant == "cxa073" else 0.5
    w = -torch.log1p(torch.exp(-(m.w0 + torch.tanh(z["w"] @ m.w1) @ m.w2))) - offset
    w = w.view(B, time, H, K)
    decay = torch.exp(-torch.exp(w))
    alpha = sigmoid(m.a0 + z["a"] @ m.a1 @ m.a2).view(B, time, H, K)
    if variant in ("rwkv7", "cxa073", "cxa075"):
        remove, write = k * m.k_k.view(H, K), k * (1 + (alpha - 1) * m.k_a.view(H, K))
    elif given.get("key_scaling") == "log_log_decay":
        remove, write = k, k * (1 - w + alpha)
    else:
        remove, write = k, k * (1 - decay + alpha)
    remove = remove / remove.norm(dim=-1, keepdim=True)
    y = torch.zeros(B, time, H, K, dtype=x.dtype)
    for b in range(B):
        for h in range(H):
            S = torch.zeros(K, K, dtype=x.dtype)  # value × key
            for t in range(time):
                kk, a = remove[b, t, h], alpha[b, t, h]
                S = S @ (torch.diag(decay[b, t, h]) - torch.outer(kk, a * kk))
                S = S + torch.outer(v[b, t, h], write[b, t, h])
                y[b, t, h] = S @ r[b, t, h]
    if variant == "cxa073" or (variant == "rwkv7" and given.get("group_norm", True)):
        flat = nn.functional.group_norm(y.reshape(-1, H * K), H, m.ln_x.weight, m.ln_x.bias, eps=64e-5)
        y = flat.view(B, time, H, K)
    if variant.startswith("hxa"):
        y = y / math.sqrt(K)
    if variant in ("rwkv7", "cxa073", "cxa075", "hxa079"):
        y = y + (r * write * m.r_k).sum(-1, keepdim=True) * v
    y = y.reshape(B, time, H * K)
    if variant == "cxa075":
        y = y * (1 + sigmoid(z["g"] @ m.g1) @ m.g2)
    elif variant.startswith("hxa") or (variant == "rwkv7" and given.get("gate", True)):
        y = y * (sigmoid(z["g"] @ m.g1) @ m.g2)
    return m.o_proj(y)


def rad_rwkv6_by_hand(m: Mixer, x: Tensor, rope: tuple[Tensor, Tensor], given: dict) -> Tensor:
    B, time, _ = x.shape
    z = dict.fromkeys("rkvwg", x)
    if given.get("token_shift", True):
        R = m.time_maa_w2.shape[1]
        u = x + shifted(x) * m.time_maa_x
        for i, name in enumerate("rkvwg"):
            move = torch.tanh(u @ m.time_maa_w1[:, i * R : (i + 1) * R]) @ m.time_maa_w2[i]
            z[name] = x + shifted(x) * (getattr(m, f"time_maa_{name}") + move)
    r = m.q_proj(z["r"]).view(B, time, H, K)
    k = m.k_proj(z["k"]).view(B, time, G, K)
    v = m.v_proj(z["v"]).view(B, time, G, K)
    if given.get("rope"):
        r, k = rotate_heads(r, *rope), rotate_heads(k, *rope)
    speed = m.time_decay + torch.tanh(z["w"] @ m.time_decay_w1) @ m.time_decay_w2
    decay = torch.exp(torch.maximum(-torch.exp(speed), torch.tensor(-5.0))).view(B, time, H, K)
    y = torch.zeros(B, time, H, K, dtype=x.dtype)
    for b in range(B):
        for h in range(H):
            S = torch.zeros(K, K, dtype=x.dtype)  # key × value
            for t in range(time):
                key = k[b, t, h * G // H]
                if given.get("form") != "groupnorm":
                    key = key * (1 - decay[b, t, h])
                S = torch.diag(decay[b, t, h]) @ S + torch.outer(key, v[b, t, h * G // H])
                y[b, t, h] = r[b, t, h] @ S / math.sqrt(K)
    y = y.reshape(B, time, H * K)
    if given.get("form") == "groupnorm":
        flat = nn.functional.group_norm(y.reshape(-1, H * K), H, m.ln_x.weight, m.ln_x.bias, eps=K * 1e-5)
        y = flat.view(B, time, H * K)
    gate = given.get("gate", "full")
    if gate == "full":
        y = y * sigmoid(z["g"] @ m.gate.weight.T)
    elif gate == "low_rank":
        y = y * (sigmoid(z["g"] @ m.g1) @ m.g2)
    return m.o_proj(y)


def gated_deltanet_by_hand(m: Mixer, x: Tensor, rope: tuple[Tensor, Tensor], given: dict) -> Tensor:
    """In the paper's orientation: S is value × key, and S_t = S_{t-1} (decay (I - beta k kᵀ)) + beta v kᵀ."""
    B, time, _ = x.shape

    def convolved(z: Tensor, taps: Tensor) -> Tensor:
        out = torch.zeros_like(z)
        for t in range(time):
            for n in range(min(len(taps), t + 1)):
                out[:, t] += taps[len(taps) - 1 - n] * z[:, t - n]
        return out

    z = [projection(x) for projection in (m.q_proj, m.k_proj, m.v_proj)]
    if given.get("short_conv"):
        z = [convolved(part, taps) for part, taps in zip(z, m.conv.split([H * K, G * K, G * K], -1), strict=True)]
    q, k, v = (part.view(B, time, -1, K) for part in z)
    if given.get("rope", True):
        q, k = rotate_heads(q, *rope), rotate_heads(k, *rope)
    decay = torch.exp(-torch.exp(m.A_log) * torch.log1p(torch.exp(x @ m.a_proj.weight.T + m.dt_bias)))
    beta = sigmoid(x @ m.b_proj.weight.T)
    y = torch.zeros(B, time, H, K, dtype=x.dtype)
    for b in range(B):
        for h in range(H):
            S = torch.zeros(K, K, dtype=x.dtype)
            for t in range(time):
                key, query = k[b, t, h * G // H], q[b, t, h]
                key, query, rate = key / key.norm(), query / query.norm(), beta[b, t, h]
                S = S @ (decay[b, t, h] * (torch.eye(K, dtype=x.dtype) - rate * torch.outer(key, key)))
                S = S + rate * torch.outer(v[b, t, h * G // H], key)
                y[b, t, h] = S @ query / math.sqrt(K)
    if given.get("norm", True):
        y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * m.o_norm.weight
    y = y.reshape(B, time, H * K)
    gate = given.get("gate", "low_rank")
    if gate == "full":
        z = x @ m.g_proj.weight.T
        y = y * z * sigmoid(z)
    elif gate == "low_rank":
        y = y * (sigmoid(x @ m.g1) @ m.g2)
    return m.o_proj(y)


def sliding_window_by_hand(m: Mixer, x: Tensor, rope: tuple[Tensor, Tensor], given: dict) -> Tensor:
    """Each token with the first ones and the last ones, one by one."""
    B, time, _ = x.shape
    q, k, v = (projection(x).view(B, time, -1, K) for projection in (m.q_proj, m.k_proj, m.v_proj))
    if given.get("rope", True):
        q, k = rotate_heads(q, *rope), rotate_heads(k, *rope)
    sinks, window = given.get("sinks", 4), given.get("window", K * H // G)
    y = torch.zeros(B, time, H, K, dtype=x.dtype)
    for b in range(B):
        for h in range(H):
            for t in range(time):
                sees = [j for j in range(t + 1) if j < sinks or t - j < window]
                scores = torch.stack([q[b, t, h] @ k[b, j, h * G // H] for j in sees]) / math.sqrt(K)
                weights = torch.exp(scores) / torch.exp(scores).sum()
                y[b, t, h] = sum(w * v[b, j, h * G // H] for w, j in zip(weights, sees, strict=True))
    return m.o_proj(y.reshape(B, time, H * K))


CASES = [
    *[(name, {}) for name in list_variants() if name != "rad_rwkv7"],
    *[(name, {"key_scaling": "log_log_decay"}) for name in ("hxa079", "hxa07a", "hxa07b")],
    ("rwkv7", {"token_shift": False, "gate": False, "group_norm": False}),
    ("rad_rwkv6", {"form": "groupnorm", "gate": "low_rank", "rope": True}),
    ("rad_rwkv6", {"token_shift": False, "gate": "none"}),
    ("sliding_window", {"window": 3, "sinks": 2}),
    ("sliding_window", {"window": 4, "sinks": 0, "rope": False}),
    ("gated_deltanet", {"short_conv": 4, "gate": "full", "rope": False}),
    ("gated_deltanet", {"short_conv": 2, "gate": "none", "norm": False}),
]
# Those that are no RWKV-7.
BY_HAND = {
    "rad_rwkv6": rad_rwkv6_by_hand,
    "gated_deltanet": gated_deltanet_by_hand,
    "sliding_window": sliding_window_by_hand,
}


@pytest.mark.parametrize(("variant", "options"), CASES, ids=str)
@torch.no_grad()
def test_mixers_are_their_equations(variant: str, options: dict) -> None:
    mixer = make(variant, options, q_bias=True, v_bias=True, o_bias=True).double().eval()
    generator = torch.Generator().manual_seed(4)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for parameter in mixer.parameters():
        parameter.add_(noise(*parameter.shape), alpha=0.3)
    x, angle = noise(2, T, D), noise(1, T, K // 2).repeat(1, 1, 2)
    width = G if variant == "hxa079" else H
    first = FirstValues(noise(2, T, width, K), noise(2, T, width, K))
    rope = (angle.cos(), angle.sin())
    if variant in BY_HAND:
        wanted = BY_HAND[variant](mixer, x, rope, options)
    else:
        wanted = by_hand(variant, mixer, x, rope, first, options)
    # Gates and decays are taken in fp32, whatever the model's precision.
    assert (mixer.mix(x, rope=rope, first=first).out - wanted).abs().max() <= 2e-6 * wanted.abs().max()


def decays(mixer: Mixer, offset: float) -> Tensor:
    return torch.exp(-math.exp(-offset) * torch.sigmoid(mixer.w0.flatten()))


def test_cxa_start_as_published() -> None:
    for variant, offset, ends in (("cxa073", 0.6, (0.9992, 0.905)), ("cxa075", 0.5, (0.9991, 0.895))):
        mixer = make(variant, {}, layer=2, num_heads=8, num_kv_heads=2, head_dim=16)
        torch.testing.assert_close(decays(mixer, offset)[[0, -1]], torch.tensor(ends), atol=5e-4, rtol=0)
        torch.testing.assert_close(mixer.w0[0, 0, 40], torch.tensor(-6.5 + 5 * (40 / 127) ** (0.85 + (2 / 3) ** 0.5)))
        assert (mixer.v0 == 1).all()
        assert (mixer.k_k == 0.85).all()
        assert (mixer.k_a == 1).all()
        assert not any(getattr(mixer, name).any() for name in ("a0", "w1", "a1", "v1", "r_k"))
        torch.testing.assert_close(mixer.v2 @ mixer.v2.T, 0.01 * torch.eye(32), atol=1e-5, rtol=0)
    assert not mixer.g1.any()
    assert not mixer.g2.any()


@pytest.mark.parametrize("variant", ["hxa079", "hxa07a", "hxa07b", "hxa07c"])
def test_hxa_start_as_published(variant: str) -> None:
    mixer = make(variant, {}, layer=0, hidden_size=64, num_heads=64, num_kv_heads=8, head_dim=96)
    held = decays(mixer, 0.5).view(64, 96)
    ends = torch.stack((held[0, 0], held[0, -1], held[-1, 0], held[-1, -1]))
    torch.testing.assert_close(ends, torch.tensor([0.9998, 0.972, 0.93, 0.561]), atol=6e-3, rtol=0)
    assert held[0, 0] > 0.9997
    a0 = mixer.a0.view(64, 96)
    torch.testing.assert_close(a0[[0, -1], [0, -1]], torch.tensor([-0.19 - 0.3 - 0.2, -0.19 + 0.3 + 0.2]))
    assert not mixer.g1.any()
    assert mixer.w1.any() == (variant in ("hxa07b", "hxa07c"))
    if variant in ("hxa07b", "hxa07c"):
        gram = mixer.v1.T @ mixer.v1  # [64, 32·n]: taller than wide, so its columns are longer
        size = 0.01 * max(1.0, mixer.v1.shape[0] / mixer.v1.shape[1])
        torch.testing.assert_close(
            gram.diagonal().sum(), torch.tensor(size * min(mixer.v1.shape)), atol=1e-4, rtol=1e-4
        )
    if variant == "hxa079":
        assert (mixer.r_k == torch.tensor(-0.04)).all()
        for offset in (mixer.v0, mixer.k0):
            torch.testing.assert_close(offset.flatten()[[0, -1]], torch.tensor([0.93, 0.53]))
        published = make(variant, {"residual_init": "constant"})
        assert published.v0.unique().tolist() == published.k0.unique().tolist() == [pytest.approx(0.73)]


def test_rad_rwkv6_starts_as_published() -> None:
    mixer = make("rad_rwkv6", {"gate": "full"}, layer=3, hidden_size=64, num_heads=8, num_kv_heads=2, head_dim=16)
    decay = torch.exp(-torch.exp(mixer.time_decay.flatten()[[0, -1]]))
    torch.testing.assert_close(decay, torch.tensor([0.9975, 0.692]), atol=5e-4, rtol=0)
    assert (mixer.time_maa_x == 1).all()
    names = ["time_maa_w1", "time_decay_w1", *(f"time_maa_{name}" for name in "rkvwg"), "gate.weight"]
    assert not any(mixer.get_parameter(name).any() for name in names)
    assert mixer.time_maa_w2.shape == (5, 32, 64)
    for name in ("time_maa_w2", "time_decay_w2"):
        assert 0.005 < getattr(mixer, name).abs().max() <= 0.01


def test_gated_deltanet_starts_slow_and_half_open() -> None:
    mixer = make("gated_deltanet", {"short_conv": 4}, hidden_size=64, num_heads=8, num_kv_heads=2, head_dim=16)
    x = torch.randn(3, 64)
    decay = torch.exp(-torch.exp(mixer.A_log) * nn.functional.softplus(mixer.a_proj(x) + mixer.dt_bias))
    torch.testing.assert_close(decay[:, [0, -1]], torch.tensor([[0.999, 0.905]]).expand(3, 2), atol=5e-4, rtol=0)
    assert (decay.diff(dim=-1) < 0).all()
    assert (torch.sigmoid(mixer.b_proj(x)) == 0.5).all()
    assert (mixer.o_norm.weight == 1).all()
    torch.testing.assert_close(
        make("gated_deltanet", {"decay_shift": 1.0}).dt_bias, make("gated_deltanet", {}).dt_bias + 1
    )
    sequence = torch.randn(2, T, D, generator=torch.Generator().manual_seed(0))
    plain, convolved = make("gated_deltanet", {}).eval(), make("gated_deltanet", {"short_conv": 4}).eval()
    with torch.no_grad():
        torch.testing.assert_close(convolved.mix(sequence).out, plain.mix(sequence).out)


def test_the_start_of_the_decay_by_depth() -> None:
    part = torch.arange(H * K) / (H * K - 1)
    for layer in range(4):
        w0 = make("hxa07a", {}, layer=layer).w0.flatten()
        u = (torch.arange(H * K) % K - 3.5) / 3.5
        wanted = -6 + 6 * part ** (1 + (layer / 3) ** 0.3) + 0.5 + 2.5 * u * u.abs()
        torch.testing.assert_close(w0, wanted)
        time_decay = make("rad_rwkv6", {}, layer=layer).time_decay.flatten()
        torch.testing.assert_close(time_decay, -6 + 5 * part ** (0.7 + 1.3 * layer / 3))


def test_token_shifts_start_as_none() -> None:
    x = torch.randn(2, T, D, generator=torch.Generator().manual_seed(0))
    values = FirstValues(torch.randn(2, T, H, K), None)
    for variant in ("rwkv7", "rad_rwkv6"):
        with_shift, without = make(variant, {}).eval(), make(variant, {"token_shift": False}).eval()
        assert "time_maa_x" in dict(with_shift.named_parameters()) or with_shift.x_r.shape == (1, 1, D)
        without.load_state_dict({n: p for n, p in with_shift.state_dict().items() if n in without.state_dict()})
        with torch.no_grad():
            torch.testing.assert_close(with_shift.mix(x, first=values).out, without.mix(x, first=values).out)
    official = make("rwkv7", {"token_shift_init": "official"}, layer=1)
    n = torch.arange(D) / D
    torch.testing.assert_close(official.x_k.flatten(), 1 - n ** (0.9 * 0.75) - 0.4 / 3)
    torch.testing.assert_close(official.x_g.flatten(), 1 - n ** (0.2 * 0.75))


@pytest.mark.parametrize("variant", ["rwkv7", "hxa079", "hxa07a", "hxa07b", "hxa07c"])
def test_identity_gates_start_at_one(variant: str) -> None:
    mixer = make(variant, {"gate_init": "identity"})
    gate = torch.sigmoid(torch.randn(5, D) @ mixer.g1) @ mixer.g2
    torch.testing.assert_close(gate, torch.ones(5, H * K), atol=1e-5, rtol=0)
