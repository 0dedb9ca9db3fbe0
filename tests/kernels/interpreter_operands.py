"""The Triton kernels of wkv7_operands in Triton's interpreter, on the CPU. Run by test_mixer_ops.py in a process of its
own: Triton decides when a kernel is defined whether it will be interpreted."""

import pytest
import torch
import triton
from operands_cases import CASES, make, outputs_and_gradients

from radlads.kernels.mixer_ops import wkv7_operands_reference
from radlads.kernels.mixer_ops.triton_operands import wkv7_operands_triton
from radlads.kernels.shared.testing import poisoned_memory, relative_rms

assert triton.knobs.runtime.interpret, "run through test_mixer_ops.py"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_is_the_reference(case):
    inputs, options = make(case, torch.float32)
    exact = outputs_and_gradients(wkv7_operands_reference, *make(case, torch.float64))
    with poisoned_memory():
        ours = outputs_and_gradients(wkv7_operands_triton, inputs, options)
    assert ours.keys() == exact.keys()
    for name, reference in exact.items():
        assert relative_rms(ours[name], reference) <= 2e-6, name


def test_bf16_is_rounded_once():
    """Not the interpreter's rounding, which cuts off, but that nothing larger is lost."""
    case = CASES[0]
    exact = outputs_and_gradients(wkv7_operands_reference, *make(case, torch.bfloat16, as_type=torch.float64))
    inputs, options = make(case, torch.bfloat16)
    ours = outputs_and_gradients(wkv7_operands_triton, inputs, {**options, "decay_dtype": torch.bfloat16})
    for name, reference in exact.items():
        assert relative_rms(ours[name], reference) <= 8e-3, name
    assert ours["log_decay"].dtype == ours["k"].dtype == torch.bfloat16


def test_a_key_of_zeros_has_a_finite_gradient():
    (k, *others), options = make(CASES[0], torch.float32)
    with torch.no_grad():
        k[0, 0] = 0
    exact = outputs_and_gradients(wkv7_operands_reference, [k, *others], options)
    for tensor in (k, *others):
        if tensor is not None:
            tensor.grad = None
    ours = outputs_and_gradients(wkv7_operands_triton, [k, *others], options)
    for name, reference in exact.items():
        assert relative_rms(ours[name], reference) <= 2e-6, name
