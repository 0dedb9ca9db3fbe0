"""Every file of model/mixers: equations, causality, chunked = loop = step, split, padding, packing, bf16, starts."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from radlads.kernels.gated_delta import gated_delta
from radlads.kernels.mixer_ops import rotate_heads
from radlads.kernels.window_attention import window_attention
from radlads.kernels.wkv6 import wkv6
from radlads.kernels.wkv7 import wkv7
from radlads.model import list_variants
from radlads.model.mixers import gated_deltanet, rad_rwkv6, sliding_window
from radlads.model.mixers.shared import mixer as shared
from radlads.model.mixers.shared import recurrence_wkv7
from radlads.model.mixers.shared.mixer import AttentionShape, FirstValues, Mixer
from radlads.model.mixers.shared.registry import find_variant

EXTRA = [
    ("rad_rwkv7", {"form": "groupnorm"}),
    ("rad_rwkv7", {"rope": False}),
    ("hxa079", {"key_scaling": "log_log_decay", "rope": False}),
    ("rwkv7", {"token_shift": False, "gate": False, "group_norm": False}),
    ("cxa073", {"rope": True}),
    ("rad_rwkv6", {"form": "groupnorm", "gate": "low_rank"}),
    ("rad_rwkv6", {"token_shift": False, "gate": "none", "rope": True}),
    ("sliding_window", {"window": 5, "sinks": 2}),
    ("sliding_window", {"window": 40, "sinks": 0, "rope": False}),
    ("gated_deltanet", {"short_conv": 4, "gate": "full"}),
    ("gated_deltanet", {"short_conv": 2, "gate": "none", "norm": False, "rope": False}),
]
# Where each operator is called from.
OPERATORS = [
    (recurrence_wkv7, "wkv7", wkv7),
    (rad_rwkv6, "wkv6", wkv6),
    (gated_deltanet, "gated_delta", gated_delta),
    (sliding_window, "window_attention", window_attention),
]
CASES = [(name, {}) for name in list_variants()] + EXTRA
D, H, G, K, T = 24, 4, 2, 8, 37


def build(variant: str, options: dict, *, first: bool = False, layer: int = 1, bias: bool = True) -> Mixer:
    module = find_variant(variant)
    torch.manual_seed(0)
    shape = AttentionShape(D, H, G, K, q_bias=bias, k_bias=bias, v_bias=bias, o_bias=False, qk_norm=True, norm_eps=1e-6)
    resolved = module.Options.parse(options, variant=variant).resolve(D, H * K)
    mixer = module.Mixer(shape, resolved, layer=layer, num_layers=4, first=first)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return mixer.eval()


def inputs(mixer: Mixer, B: int = 2, time: int = T) -> dict:
    """What a mixer is given; its first-layer values as the same variant's first layer would hand them out."""
    generator = torch.Generator().manual_seed(5)
    angle = torch.outer(torch.arange(time).float(), 100.0 ** (-torch.arange(0, K, 2) / K)).repeat(1, 2)[None]
    rope, x = (angle.cos(), angle.sin()), torch.randn(B, time, D, generator=generator)
    giver = type(mixer)(mixer.shape, mixer.options, layer=0, num_layers=4, first=True)
    with torch.no_grad():
        given = giver.mix(torch.zeros(B, time, D), rope=rope).first
    first = FirstValues(*(None if z is None else torch.randn(z.shape, generator=generator) for z in given))
    return {"x_BTD": x, "rope": rope, "first": first}


def cut(given: dict, where: slice) -> dict:
    return {
        "x_BTD": given["x_BTD"][:, where],
        "rope": tuple(part[:, where] for part in given["rope"]),
        "first": FirstValues(*(None if part is None else part[:, where] for part in given["first"])),
    }


def close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Within a part of the largest value: mixers without a norm are loud."""
    assert (got - wanted).abs().max() <= tolerance * max(1.0, float(wanted.abs().max()))


@pytest.fixture(params=CASES, ids=str)
def mixer(request: pytest.FixtureRequest) -> Mixer:
    return build(*request.param)


def test_numbers_are_those_of_earlier_releases(project_root: Path) -> None:
    """Outputs and gradients in fp32. After a change that is meant to move them: delete the file, run, look, commit."""
    golden = project_root / "tests/golden/mixers.json"
    found = {}
    for variant, options in CASES:
        mixer = build(variant, options)
        given = inputs(mixer)
        x = given["x_BTD"].requires_grad_()
        out = mixer.mix(**given).out
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        slopes = torch.autograd.grad(out, [x, *mixer.parameters()], weights, allow_unused=True)
        numbers = [*out[1, -1, :3], out.norm(), *(z.norm() for z in slopes if z is not None)]
        found[f"{variant} {options}"] = [float(f"{number:.7g}") for number in numbers]
    if not golden.is_file():
        golden.write_text(json.dumps(found, indent=1).replace("\n  ", " ") + "\n")
        pytest.fail(f"wrote {golden} anew")
    for name, numbers in json.loads(golden.read_text()).items():
        assert found[name] == pytest.approx(numbers, rel=1e-4, abs=1e-5), name


@torch.no_grad()
def test_no_output_sees_the_future(mixer: Mixer) -> None:
    given = inputs(mixer)
    before = mixer.mix(**given).out
    changed = {**given, "x_BTD": given["x_BTD"].clone()}
    changed["x_BTD"][:, 20] += 1.0
    after = mixer.mix(**changed).out
    close(after[:, :20], before[:, :20], 2e-6)  # rounding: the chunks that a pass is cut into depend on the decays
    sees = slice(20, 20 + getattr(mixer, "window", T))
    assert (before[:, sees] - after[:, sees]).abs().amax(-1).min() > 2e-5
    assert torch.equal(before[:, sees.stop :], after[:, sees.stop :])


@torch.no_grad()
def test_chunked_is_the_loop(mixer: Mixer, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(mixer)
    chunked = mixer.mix(**given, output_state=True)
    for module, name, operator in OPERATORS:
        monkeypatch.setattr(module, name, partial(operator, backend="reference"))
    loop = mixer.mix(**given, output_state=True)
    close(chunked.out, loop.out, 1e-5)
    close(chunked.state.recurrent, loop.state.recurrent, 1e-5)
    assert loop.state.recurrent.dtype == torch.float32


@torch.no_grad()
def test_one_token_at_a_time_is_the_whole(mixer: Mixer) -> None:
    given = inputs(mixer)
    whole, state, outs = mixer.mix(**given).out, None, []
    for t in range(T):
        mixed = mixer.mix(**cut(given, slice(t, t + 1)), state=state, output_state=True)
        state = mixed.state
        outs.append(mixed.out)
    close(torch.cat(outs, 1), whole, 2e-5)


@settings(max_examples=8, deadline=None)
@given(at=st.integers(1, T - 1), case=st.sampled_from(CASES))
@torch.no_grad()
def test_a_sequence_can_be_split_anywhere(at: int, case: tuple) -> None:
    mixer = build(*case)
    given = inputs(mixer)
    left = mixer.mix(**cut(given, slice(0, at)), output_state=True)
    right = mixer.mix(**cut(given, slice(at, T)), state=left.state, output_state=True)
    close(torch.cat([left.out, right.out], 1), mixer.mix(**given).out, 2e-5)


@torch.no_grad()
def test_padding_neither_decays_nor_writes(mixer: Mixer) -> None:
    given = inputs(mixer)
    pad = 6
    keep = torch.ones(2, T, dtype=torch.bool)
    keep[:, :pad] = False
    padded = mixer.mix(**given, keep_BT=keep, output_state=True)
    plain = mixer.mix(**cut(given, slice(pad, T)), output_state=True)
    close(padded.out[:, pad:], plain.out, 1e-5)
    for held, wanted in zip(padded.state, plain.state, strict=True):
        assert (held is None) == (wanted is None)
        if wanted is not None:
            close(held, wanted, 1e-5)


@torch.no_grad()
def test_packed_documents_are_strangers(mixer: Mixer) -> None:
    given = inputs(mixer)
    packed = mixer.mix(**given, cu_seqlens=torch.tensor([0, 10, T, T + 1, 2 * T])).out
    parts = [slice(0, 10), slice(10, T)]
    torch.testing.assert_close(
        packed[0], torch.cat([mixer.mix(**cut(given, part)).out[0] for part in parts]), atol=1e-5, rtol=1e-5
    )
    parts = [slice(0, 1), slice(1, T)]
    torch.testing.assert_close(
        packed[1], torch.cat([mixer.mix(**cut(given, part)).out[1] for part in parts]), atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match="exclude"):
        mixer.mix(**given, cu_seqlens=torch.tensor([0, T, 2 * T]), output_state=True)


@torch.no_grad()
def test_bf16_is_close_to_fp32(mixer: Mixer) -> None:
    given = inputs(mixer)
    wanted = mixer.mix(**given).out
    half = mixer.bfloat16().mix(
        given["x_BTD"].bfloat16(),
        rope=tuple(part.bfloat16() for part in given["rope"]),
        first=FirstValues(*(None if part is None else part.bfloat16() for part in given["first"])),
    )
    assert half.out.dtype == torch.bfloat16
    assert (half.out.float() - wanted).norm() / wanted.norm() < 0.05


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_parameter_learns(case: tuple) -> None:
    mixer = build(*case).train()
    given = inputs(mixer)
    first = FirstValues(*(None if part is None else part.requires_grad_() for part in given["first"]))
    mixer.mix(**{**given, "first": first}).out.square().sum().backward()
    assert [name for name, p in mixer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert all(part.grad.abs().sum() > 0 for part in first if part is not None)


def rad_rwkv7_by_hand(m: Mixer, x_BTD: Tensor, rope: tuple[Tensor, Tensor], first: FirstValues) -> Tensor:
    """The equations of the file's docstring, one token and one head at a time."""
    B, time, _ = x_BTD.shape
    norm = lambda z, weight: z * (z.pow(2).mean(-1, keepdim=True) + 1e-6) ** -0.5 * weight  # noqa: E731
    r = norm(m.q_proj(x_BTD).view(B, time, H, K), m.q_norm.weight)
    k = norm(m.k_proj(x_BTD).view(B, time, G, K), m.k_norm.weight)
    v = m.v_proj(x_BTD).view(B, time, G, K)
    r, k = rotate_heads(r, *rope), rotate_heads(k, *rope)
    sigmoid = torch.sigmoid
    decay = torch.exp(-math.exp(-0.5) * sigmoid(m.w0 + torch.tanh(x_BTD @ m.w1) @ m.w2)).view(B, time, H, K)
    iclr = sigmoid(m.a0 + x_BTD @ m.a1 @ m.a2).view(B, time, H, K)
    mix = sigmoid(m.v0 + x_BTD @ m.v1 @ m.v2).view(B, time, H, K)
    out = torch.zeros(B, time, H, K, dtype=x_BTD.dtype)
    for b in range(B):
        for h in range(H):
            S = torch.zeros(K, K, dtype=x_BTD.dtype)  # value × key
            here = slice(h * K, h * K + K)
            for t in range(time):
                key, w, a = k[b, t, h * G // H], decay[b, t, h], iclr[b, t, h]
                value = v[b, t, h * G // H]
                value = value + (first.v[b, t, h] - value) * mix[b, t, h]
                if m.options.form == "balanced":
                    kk, write = key / key.norm(), key * (1 - w + a)
                else:
                    scaled = key * m.k_k[0, 0, here]
                    kk, write = scaled / scaled.norm(), key * (1 + (a - 1) * m.k_a[0, 0, here])
                S = S @ (torch.diag(w) - torch.outer(kk, a * kk)) + torch.outer(value, write)
                out[b, t, h] = S @ r[b, t, h]
    if m.options.form == "balanced":
        out = out * K**-0.5
    else:
        flat = nn.functional.group_norm(out.reshape(B * time, H * K), H, m.ln_x.weight, m.ln_x.bias, eps=K * 1e-5)
        out = flat.view(B, time, H, K)
    gate = sigmoid(x_BTD @ m.g1) @ m.g2
    return m.o_proj(out.reshape(B, time, H * K) * gate)


@pytest.mark.parametrize("form", ["balanced", "groupnorm"])
@torch.no_grad()
def test_rad_rwkv7_is_its_equations(form: str) -> None:
    mixer = build("rad_rwkv7", {"form": form})
    given = inputs(mixer)
    given = cut(given, slice(0, 12))
    torch.testing.assert_close(mixer.mix(**given).out, rad_rwkv7_by_hand(mixer, **given), atol=1e-5, rtol=1e-4)


def fresh(options: dict, layer: int = 1, first: bool = False) -> Mixer:
    module = find_variant("rad_rwkv7")
    shape = AttentionShape(
        64, 4, 2, 16, q_bias=False, k_bias=False, v_bias=False, o_bias=False, qk_norm=False, norm_eps=1e-6
    )
    resolved = module.Options.parse(options, variant="rad_rwkv7").resolve(64, 64)
    return module.Mixer(shape, resolved, layer=layer, num_layers=4, first=first)


def test_rad_rwkv7_starts_as_published() -> None:
    mixer = fresh({"form": "groupnorm"}, layer=3)
    assert mixer.w0.shape == (1, 1, 64)
    torch.testing.assert_close(mixer.w0[0, 0, [0, -1]], torch.tensor([-6.5, -1.5]))
    torch.testing.assert_close(mixer.w0[0, 0, 21], torch.tensor(-6.5 + 5 * (21 / 63) ** 1.85))
    decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(mixer.w0.flatten()[[0, -1]]))
    torch.testing.assert_close(decay, torch.tensor([0.9991, 0.895]), atol=5e-4, rtol=0)
    for name in ("w1", "a1", "v1", "g1", "a0"):
        assert not getattr(mixer, name).any(), name
    torch.testing.assert_close(torch.sigmoid(mixer.v0), torch.full((1, 1, 64), 0.7311), atol=1e-4, rtol=0)
    for name in ("w2", "a2", "v2", "g2"):
        factor = getattr(mixer, name)  # [32, 64]: rows are orthogonal, of length 0.1
        torch.testing.assert_close(factor @ factor.T, 0.01 * torch.eye(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(fresh({"decay_shift": 1.5}, layer=3).w0, mixer.w0 + 1.5)
    assert (mixer.k_k == 0.85).all()
    assert (mixer.k_a == 1).all()
    assert fresh({}, first=True).v0 is None


def test_identity_gate_starts_at_one() -> None:
    mixer = fresh({"gate_init": "identity"})
    gate = torch.sigmoid(torch.randn(5, 64) @ mixer.g1) @ mixer.g2
    torch.testing.assert_close(gate, torch.ones(5, 64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", list_variants())
def test_first_layer_values_are_required_and_given(variant: str) -> None:
    mixer = build(variant, {})
    given = inputs(mixer)
    wanted = given["first"]
    given["first"] = None
    mixed = build(variant, {}, first=True).mix(**given)
    assert [z is None for z in mixed.first] == [z is None for z in wanted]
    if wanted.v is not None:
        with pytest.raises(ValueError, match="first recurrent layer"):
            mixer.mix(**given)


def test_partial_rope_passes_the_rest() -> None:
    x = torch.randn(1, 3, 2, 8)
    cos, sin = torch.zeros(1, 3, 4), torch.ones(1, 3, 4)
    turned = rotate_heads(x, cos, sin)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[..., :2], -x[..., 2:4])


def test_head_norm_is_the_family_norm() -> None:
    x, norm = torch.randn(2, 3, 8), shared.HeadNorm(8, 1e-6)
    nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), nn.functional.rms_norm(x, (8,), norm.weight, 1e-6))
