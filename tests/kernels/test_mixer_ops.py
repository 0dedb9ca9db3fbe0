"""The operators of mixer_ops: the forms that calls take; Triton's interpreter and compiler; a GPU."""

from functools import partial

import pytest
import torch
from operands_cases import (
    CASES,
    DESIGNS,
    FINISHES,
    TURNS,
    Case,
    Finish,
    finish_and_gradients,
    make,
    make_finish,
    make_mixer,
    make_turn,
    outputs_and_gradients,
    turn_and_gradients,
)

from radlads.kernels.mixer_ops import Residual, rotate_heads, wkv7_finish, wkv7_operands
from radlads.kernels.mixer_ops.plain import (
    rotate_heads_torch,
    wkv7_delta_operands_torch,
    wkv7_finish_torch,
    wkv7_operands_torch,
)
from radlads.kernels.mixer_ops.reference import (
    rotate_heads_reference,
    wkv7_finish_reference,
    wkv7_operands_reference,
)
from radlads.kernels.shared.chosen import chosen_kernels, forget_kernels
from radlads.kernels.shared.testing import relative_rms

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def fresh():
    forget_kernels()
    yield
    forget_kernels()


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As if these tensors were on a GPU: the kernels' places are taken by their torch forms."""
    from radlads.kernels.mixer_ops import triton_finish, triton_operands, triton_rotate
    from radlads.kernels.shared import triton_launch

    monkeypatch.setattr(triton_launch, "why_not_in_triton", lambda *_: None)
    monkeypatch.setattr(triton_operands, "wkv7_operands_triton", wkv7_operands_torch)
    monkeypatch.setattr(triton_finish, "wkv7_finish_triton", wkv7_finish_torch)
    monkeypatch.setattr(triton_rotate, "rotate_heads_triton", rotate_heads_torch)


@pytest.mark.parametrize(("variant", "options"), DESIGNS, ids=str)
def test_every_design_takes_the_fused_forms_on_a_gpu(variant, options, on_a_gpu):
    mixer, given = make_mixer(variant, options, torch.bfloat16)
    mixer.mix(**given)
    forms = {name: form for name, form in chosen_kernels().items() if name != "wkv7"}
    turned = {"rotate_heads": "triton"} if mixer.options.rope else {}
    assert forms == {"wkv7_operands": "triton", "wkv7_finish": "triton", **turned}


def test_a_decode_step_takes_the_fused_forms(on_a_gpu, monkeypatch):
    """Without gradients, in which its kernels have none."""
    from radlads.kernels.mixer_ops import triton_operands

    def run(*args, delta=False, **options):
        return (wkv7_delta_operands_torch if delta else wkv7_operands_torch)(*args, **options)

    monkeypatch.setattr(triton_operands, "wkv7_operands_triton", run)
    mixer, given = make_mixer("hxa079", {}, torch.bfloat16)
    mixer.eval()
    state = mixer.mix(**given | {"output_state": True}).state
    one = {"x_BTD": given["x_BTD"][:, :1], "rope": tuple(x[:, :1] for x in given["rope"])}
    one |= {"first": type(given["first"])(*(x[:, :1] for x in given["first"])), "state": state}
    fused = {"rotate_heads": "triton", "wkv7_finish": "triton", "wkv7_step": "plain torch"}
    for grad, more in ((True, {}), (False, {"wkv7_delta_operands": "triton"})):
        forget_kernels()
        with torch.set_grad_enabled(grad):
            mixer.mix(**one)
        assert chosen_kernels() == fused | more


def test_the_log_says_why_the_torch_form_ran(on_a_gpu, monkeypatch):
    inputs, _ = make(CASES[1], torch.bfloat16)
    wkv7_operands(*inputs[:6], backend="torch")
    assert chosen_kernels() == {"wkv7_operands": "plain torch (requested)"}
    forget_kernels()
    wkv7_operands(*inputs[:3], inputs[3].float(), *inputs[4:6])
    assert chosen_kernels() == {"wkv7_operands": "plain torch (the tensors differ in dtype: bfloat16, float32)"}
    monkeypatch.undo()
    forget_kernels()
    wkv7_operands(*inputs[:6])
    assert chosen_kernels() == {"wkv7_operands": "plain torch (the tensors are on cpu, not on a GPU)"}


def test_a_form_that_cannot_run_is_refused_in_one_line():
    inputs, _ = make(CASES[1], torch.float32)
    with pytest.raises(ValueError, match="backend 'triton' cannot run here: the tensors are on cpu, not on a GPU"):
        wkv7_operands(*inputs[:6], backend="triton")
    with pytest.raises(ValueError, match="wkv7_finish: unknown backend 'chunked'; choose from torch, triton"):
        wkv7_finish(inputs[0], backend="chunked")


def test_shapes_that_do_not_fit_are_refused_in_one_line():
    k, low = torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 16)
    with pytest.raises(ValueError, match="do not fit together"):
        wkv7_operands(k, k, low, torch.zeros(1, 2, 8), low[0, 0], low[0, 0])
    wide = Residual(torch.zeros(1, 2, 4, 4), low, low[0, 0])
    with pytest.raises(ValueError, match="the residual of keys has the widths 16, 16 and 16; all three must be 8"):
        wkv7_operands(k, k, low, low, low[0, 0], low[0, 0], keys=wide)
    with pytest.raises(
        ValueError, match=r"wkv7_finish: y, r, k, v and gates do not fit together: \(1, 2, 2, 4\), \(1, 2"
    ):
        wkv7_finish(k, gate_BTA=low)
    with pytest.raises(ValueError, match="rotate_heads: x, cos and sin do not fit together"):
        rotate_heads(k, low, low)


BOTH = [
    *((case, wkv7_operands_torch, wkv7_operands_reference, make, outputs_and_gradients) for case in CASES),
    *((case, wkv7_finish_torch, wkv7_finish_reference, make_finish, finish_and_gradients) for case in FINISHES),
    *((case, rotate_heads_torch, rotate_heads_reference, make_turn, turn_and_gradients) for case in TURNS),
]


@pytest.mark.parametrize(("case", "plain", "reference", "draw", "run"), BOTH, ids=lambda x: getattr(x, "name", ""))
def test_the_torch_form_is_the_reference(case, plain, reference, draw, run):
    exact, ours = run(reference, *draw(case, torch.float64)), run(plain, *draw(case, torch.float32))
    assert ours.keys() == exact.keys()
    for name, wanted in exact.items():
        assert relative_rms(ours[name], wanted) <= 2e-6, name


@pytest.mark.slow
def test_interpreted(interpret):
    interpret("interpreter_operands.py")


@pytest.mark.slow
@pytest.mark.parametrize(("target", "size", "repeats"), [("sm_90", 128, 7), ("gfx942", 96, 8)])
def test_compiles(target, size, repeats, compiler):
    code = "from radlads.kernels.shared.offline import compile_mixer_ops as run\n"
    compiler(f"{code}assert run('{target}', {size}, {repeats}) == 22")


SEVEN = {"B": 1, "T": 300, "K": 128}  # as a model of 7B has them
ON_GPU = {
    "operands": (
        (*CASES, Case("7B", G=4, R=7, values="heads", **SEVEN)),
        (wkv7_operands, wkv7_operands_torch, wkv7_operands_reference, make, outputs_and_gradients),
    ),
    "finish": (
        (*FINISHES, Finish("7B", H=28, scale=0.1, gate=0.0, **SEVEN)),
        (wkv7_finish, wkv7_finish_torch, wkv7_finish_reference, make_finish, finish_and_gradients),
    ),
    "rotate": (TURNS, (rotate_heads, rotate_heads_torch, rotate_heads_reference, make_turn, turn_and_gradients)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("operator", ON_GPU)
def test_on_the_gpu(operator):
    """No further from the truth than the torch form with the same 16 bits."""
    cases, (fused, plain, reference, draw, run) = ON_GPU[operator]
    for case in cases:
        exact = run(reference, *draw(case, torch.bfloat16, as_type=torch.float64, device="cuda"))
        ours = run(partial(fused, backend="triton"), *draw(case, torch.bfloat16, device="cuda"))
        theirs = run(plain, *draw(case, torch.bfloat16, device="cuda"))
        for name, wanted in exact.items():
            allowed = max(1.02 * relative_rms(theirs[name], wanted), 1e-6)
            assert relative_rms(ours[name], wanted) <= allowed, (case.name, name)


@pytest.mark.gpu
@pytest.mark.parametrize(("variant", "options"), DESIGNS, ids=str)
def test_a_mixer_on_the_gpu_is_the_one_on_the_cpu(variant, options):
    mixer, given = make_mixer(variant, options, torch.float32)
    with torch.no_grad():
        expected = mixer.mix(**given).out
        moved = {
            n: type(g)(*(z if z is None else z.cuda() for z in g)) if n == "first" else g for n, g in given.items()
        }
        moved |= {"x_BTD": given["x_BTD"].cuda(), "rope": tuple(x.cuda() for x in given["rope"])}
        forget_kernels()
        found = mixer.cuda().mix(**moved).out
    assert relative_rms(found.cpu(), expected) <= 1e-4
    assert chosen_kernels()["wkv7_operands"] == chosen_kernels()["wkv7_finish"] == "triton"
