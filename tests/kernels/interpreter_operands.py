"""The Triton kernels of mixer_ops in Triton's interpreter, on the CPU. Run by test_mixer_ops.py in a process of its
own: Triton decides when a kernel is defined whether it will be interpreted."""

from functools import partial

import pytest
import torch
import triton
from operands_cases import (
    CASES,
    DESIGNS,
    FINISHES,
    TURNS,
    finish_and_gradients,
    make,
    make_finish,
    make_mixer,
    make_turn,
    outputs_and_gradients,
    turn_and_gradients,
)

from radlads.kernels.mixer_ops import rotate_heads, wkv7_finish, wkv7_operands
from radlads.kernels.mixer_ops.plain import rotate_heads_torch, wkv7_finish_torch, wkv7_operands_torch
from radlads.kernels.mixer_ops.reference import (
    rotate_heads_reference,
    wkv7_finish_reference,
    wkv7_operands_reference,
)
from radlads.kernels.mixer_ops.triton_finish import wkv7_finish_triton
from radlads.kernels.mixer_ops.triton_operands import wkv7_operands_triton
from radlads.kernels.mixer_ops.triton_rotate import rotate_heads_triton
from radlads.kernels.row_distance import squared_distance
from radlads.kernels.shared.testing import assert_autograd_rules, poisoned_memory, relative_rms
from radlads.model.mixers.shared import mixer as shared_mixer
from radlads.model.mixers.shared import rwkv7_design

assert triton.knobs.runtime.interpret, "run through test_mixer_ops.py"
OPERANDS = (wkv7_operands_triton, wkv7_operands_torch, wkv7_operands_reference, make, outputs_and_gradients)
FINISH = (wkv7_finish_triton, wkv7_finish_torch, wkv7_finish_reference, make_finish, finish_and_gradients)
TURN = (rotate_heads_triton, rotate_heads_torch, rotate_heads_reference, make_turn, turn_and_gradients)
BOTH = [(case, one) for cases, one in ((CASES, OPERANDS), (FINISHES, FINISH), (TURNS, TURN)) for case in cases]


def name_of(value):
    return getattr(value, "name", "") or value[0].__name__.removesuffix("_triton")


@pytest.mark.parametrize(("case", "operator"), BOTH, ids=name_of)
def test_is_the_reference(case, operator):
    """Outputs and gradients; memory that a kernel leaves unwritten would be NaN."""
    fused, _, reference, draw, run = operator
    exact = run(reference, *draw(case, torch.float64))
    with poisoned_memory():
        ours = run(fused, *draw(case, torch.float32))
    assert ours.keys() == exact.keys()
    for name, wanted in exact.items():
        assert relative_rms(ours[name], wanted) <= 2e-6, name


@pytest.mark.parametrize(("case", "operator"), BOTH, ids=name_of)
def test_bf16_is_as_near_to_the_truth_as_the_torch_form(case, operator):
    """Outputs and gradients of bf16 numbers. Kernels compute in fp32 and round what they store: done here by torch,
    because the interpreter cuts off instead."""
    fused, plain, reference, draw, run = operator
    exact = run(reference, *draw(case, torch.bfloat16, as_type=torch.float64))
    ours = run(fused, *draw(case, torch.bfloat16, as_type=torch.float32))
    theirs = run(plain, *draw(case, torch.bfloat16))
    for name, wanted in exact.items():
        found = relative_rms(ours[name].to(theirs[name].dtype), wanted)
        assert found <= max(1.02 * relative_rms(theirs[name], wanted), 1e-6), name


@pytest.mark.parametrize(
    ("case", "operator"), [(CASES[6], OPERANDS), (FINISHES[7], FINISH), (TURNS[1], TURN)], ids=name_of
)
def test_bf16_is_kept(case, operator):
    fused, plain, reference, draw, run = operator
    exact = run(reference, *draw(case, torch.bfloat16, as_type=torch.float64))
    ours, theirs = run(fused, *draw(case, torch.bfloat16)), run(plain, *draw(case, torch.bfloat16))
    for name, wanted in exact.items():
        assert ours[name].dtype == theirs[name].dtype, name
        assert relative_rms(ours[name], wanted) <= 8e-3, name


def test_a_log_decay_of_16_bits_is_the_wide_one_rounded():
    inputs, options = make(CASES[0], torch.bfloat16)
    narrow = wkv7_operands_triton(*inputs[:6], decay_dtype=torch.bfloat16, **options)
    wide = wkv7_operands_triton(*inputs[:6], **options)
    assert (narrow.log_decay.dtype, wide.log_decay.dtype) == (torch.bfloat16, torch.float32)
    assert ((narrow.log_decay - wide.log_decay).abs() <= 2**-7 * wide.log_decay.abs()).all()
    assert all(map(torch.equal, narrow[1:], wide[1:]))


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=lambda case: case.name)
def test_a_key_of_zeros_has_a_finite_gradient(case):
    (k, *others), options = make(case, torch.float32)
    with torch.no_grad():
        k[0, 0] = 0
    exact = outputs_and_gradients(wkv7_operands_reference, [k, *others], options)
    for tensor in (k, *others):
        if tensor is not None:
            tensor.grad = None
    ours = outputs_and_gradients(wkv7_operands_triton, [k, *others], options)
    for name, reference in exact.items():
        assert relative_rms(ours[name], reference) <= 2e-6, name


def mixed(mixer, given, **how):
    """Output and gradients of everything that a mixer has and is given."""
    x, first = given["x_BTD"], [z for z in given["first"] if z is not None]
    out = mixer.mix(**given, **how)
    leaves = [x, *first, *mixer.parameters()]
    made = [out.out, *(z for z in out.first if z is not None and z.requires_grad)]
    weights = [torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z) for z in made]
    found = torch.autograd.grad(made, leaves, weights, allow_unused=True)
    names = ["x", *(f"first {i}" for i in range(len(first))), *(name for name, _ in mixer.named_parameters())]
    return {"out": out.out} | {f"d {n}": g for n, g in zip(names, found, strict=True) if g is not None}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("variant", "options"), DESIGNS, ids=str)
def test_a_mixer_is_the_same_by_either_form(variant, options, first, monkeypatch):
    """With padding and with packed documents; the kernels' memory is poisoned."""
    mixer, given = make_mixer(variant, options, torch.float32, first=first)
    keep = torch.ones(2, 19, dtype=torch.bool)
    keep[0, :7] = keep[1, :2] = False
    for how in ({"keep_BT": keep}, {"cu_seqlens": torch.tensor([0, 5, 19, 20, 38])}):
        wanted = mixed(mixer, given, **how)
        with monkeypatch.context() as fused, poisoned_memory():
            fused.setattr(rwkv7_design, "wkv7_operands", partial(wkv7_operands, backend="triton"))
            fused.setattr(rwkv7_design, "wkv7_finish", partial(wkv7_finish, backend="triton"))
            fused.setattr(shared_mixer, "rotate_heads", partial(rotate_heads, backend="triton"))
            found = mixed(mixer, given, **how)
        assert found.keys() == wanted.keys()
        for name, one in wanted.items():
            assert relative_rms(found[name], one) <= 2e-5, (name, how.keys())


def test_autograd_may_use_them_as_it_likes():
    inputs, _ = make(CASES[1], torch.float32)
    assert_autograd_rules(lambda *given: wkv7_operands_triton(*given)[:2], inputs[:6])
    y, options = make_finish(FINISHES[0], torch.float32)
    assert_autograd_rules(lambda y, gate: (wkv7_finish_triton(y, gate_BTA=gate), None), [y, options["gate_BTA"]])
    x, angles = make_turn(TURNS[0], torch.float32)
    assert_autograd_rules(lambda x: (rotate_heads_triton(x, **angles), None), [x])


@pytest.mark.parametrize("width", [40, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_squared_distance(width, dtype):
    """Rows of a part of a block, and of more than one; the gradient rounded once (the interpreter cuts bf16 off)."""
    generator = torch.Generator().manual_seed(width)
    out, wanted = (torch.randn(2, 3, width, generator=generator).to(dtype) for _ in range(2))
    factors = torch.rand(2, 3, generator=generator)
    out.requires_grad_()
    found = squared_distance(out, wanted, backend="triton")
    (gradient,) = torch.autograd.grad((found * factors).sum(), out)
    exact = (out.double() - wanted.double()).square().sum(-1)
    (wanted_gradient,) = torch.autograd.grad((exact * factors).sum(), out)
    assert found.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=2**-10 if dtype == torch.float16 else 1e-6, atol=0)
    x, y = (torch.randn(1, 2, 8, generator=generator) for _ in range(2))
    assert_autograd_rules(lambda x: (squared_distance(x, y, backend="triton"), None), [x.requires_grad_()])
