"""What training code may ask of operators in plain torch: checkpointing, two backward passes, any default device."""

from functools import partial

import pytest
import torch
from torch import nn

from radlads.kernels.gated_delta import gated_delta, gated_delta_step
from radlads.kernels.linear_kl import linear_ce, linear_kl
from radlads.kernels.shared.testing import assert_autograd_rules, gated_delta_inputs, wkv6_inputs, wkv7_inputs
from radlads.kernels.wkv6 import wkv6, wkv6_step
from radlads.kernels.wkv7 import wkv7, wkv7_step
from radlads.model.training.quantized import quantize_frozen

PACKED = torch.tensor([0, 3, 3, 17, 40])


def losses():
    """linear_kl and linear_ce as functions of hidden states and head alone."""
    generator = torch.Generator().manual_seed(0)
    hidden, head, teacher, teacher_head = (
        torch.randn(shape, generator=generator) for shape in ((30, 16), (50, 16), (30, 8), (50, 8))
    )
    labels = torch.randint(0, 50, (30,), generator=generator)
    kl = partial(linear_kl, labels_N=labels, ce_weight=0.1, weight_N=torch.rand(30, generator=generator))
    inputs = [hidden.requires_grad_(), head.requires_grad_()]
    return {
        "linear_kl": (lambda h, w: (kl(h, w, teacher, teacher_head)[0], None), inputs),
        "linear_ce": (lambda h, w: (linear_ce(h, w, labels)[0], None), inputs),
    }


def recurrences():
    dense7, dense6, delta = wkv7_inputs(1, 40, 2, 16), wkv6_inputs(1, 40, 2, 16), gated_delta_inputs(1, 70, 2, 16)
    return {
        "wkv7": (partial(wkv7, output_final_state=True), dense7),
        "wkv7 packed": (partial(wkv7, cu_seqlens=PACKED), dense7),
        "wkv6": (partial(wkv6, output_final_state=True), dense6),
        "wkv6 packed": (partial(wkv6, cu_seqlens=PACKED), dense6),
        "gated_delta": (partial(gated_delta, output_final_state=True), delta),
        "gated_delta packed": (partial(gated_delta, cu_seqlens=torch.tensor([0, 3, 3, 17, 70])), delta),
    }


def frozen_linear():
    layer = nn.Linear(128, 64).requires_grad_(False)
    quantize_frozen(layer, 8, lambda name: True)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return {"8-bit linear": (lambda x: (layer(x), None), [x])}


OPERATORS = recurrences() | losses()


@pytest.mark.parametrize("name", OPERATORS)
def test_rules_of_autograd(name):
    assert_autograd_rules(*OPERATORS[name])


def test_rules_of_autograd_for_8_bit_weights():
    pytest.importorskip("torchao")
    for operator, inputs in frozen_linear().values():
        assert_autograd_rules(operator, inputs)


@pytest.mark.parametrize("name", OPERATORS)
def test_any_default_device(name):
    """Tensors go where the inputs are, whatever torch's default device is: with `meta`, one made there shows."""
    operator, inputs = OPERATORS[name]
    expected = operator(*inputs)[0]
    with torch.device("meta"):
        found = operator(*inputs)[0]
        gradients = torch.autograd.grad(found.sum(), inputs)
    assert torch.equal(found, expected)
    assert all(gradient.device.type == "cpu" for gradient in gradients)


@pytest.mark.parametrize(
    ("step", "make"),
    [(wkv7_step, wkv7_inputs), (wkv6_step, wkv6_inputs), (gated_delta_step, gated_delta_inputs)],
)
def test_a_step_on_any_default_device(step, make):
    inputs = [x.detach()[:, 0] for x in make(2, 1, 2, 8)]
    with torch.device("meta"):
        out = step(*inputs, torch.zeros(2, 2, 8, 8, device="cpu"))
    assert out.device.type == "cpu"


# Packed documents are laid out by the same code in all recurrences: one of them is enough.
@pytest.mark.parametrize("name", sorted(OPERATORS.keys() - {"wkv6 packed", "gated_delta packed"}))
def test_under_torch_compile(name):
    operator, inputs = OPERATORS[name]
    torch.compiler.reset()
    expected, found = operator(*inputs)[0], torch.compile(operator, backend="eager")(*inputs)[0]
    gradients = [torch.autograd.grad(x.sum(), inputs) for x in (expected, found)]
    assert torch.equal(found, expected)
    assert all(map(torch.equal, *gradients))
