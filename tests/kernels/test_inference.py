"""Products of a decoding step: when they run, refusals, and the Triton forms (on a GPU here, interpreted in
interpreter_inference.py)."""

from __future__ import annotations

import pytest
import torch
from inference_cases import OPERATORS, compare, given
from torch import nn

from radlads.kernels.inference import (
    few_rows_apply,
    gated_linear,
    linear_together,
    low_rank_pairs,
    rms_norm,
    silu_product,
)
from radlads.model.mixers.shared.products import is_plain_linear, project_together


def test_on_a_cpu_torch_runs():
    x = torch.zeros(1, 1, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        assert not few_rows_apply(x)
    layers = [nn.Linear(4, 3), nn.Linear(4, 5, bias=False)]
    xs = torch.randn(2, 1, 1, 4)
    for out, x, layer in zip(project_together(xs, layers), xs, layers, strict=True):
        assert torch.equal(out, layer(x))


def test_a_layer_that_somebody_watches_or_replaces_is_called():
    assert is_plain_linear(nn.Linear(2, 2))
    watched, replaced = nn.Linear(2, 2), nn.Linear(2, 2)
    watched.register_forward_pre_hook(lambda *_: None)
    replaced.forward = lambda x: x
    assert not any(map(is_plain_linear, (watched, replaced, nn.Identity(), nn.Bilinear(2, 2, 2))))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: linear_together([x], [w, w], [None]), "linear_together takes 1 to 5 of each"),
        (lambda x, w: linear_together([x] * 6, [w] * 6, [None] * 6), "linear_together takes 1 to 5 of each"),
        (lambda x, w: linear_together([x[..., :3]], [w], [None]), r"\(1, 1, 3\) by \(5, 4\)"),
        (lambda x, w: gated_linear(x, w, w[:2]), r"gate and up differ: \(5, 4\), \(2, 4\)"),
        (lambda x, w: low_rank_pairs([x], [w.T], [w[:3]], [None]), r"\(4, 5\) and \(3, 4\) do not fit together"),
        (lambda x, w: rms_norm(x, w[0, :3], 1e-6), r"x \(1, 1, 4\) and weight \(3,\) do not fit together"),
        (lambda x, w: silu_product(x, w), r"gate and up differ: \(1, 1, 4\), \(5, 4\)"),
    ],
)
def test_what_does_not_fit_is_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 1, 4), torch.zeros(5, 4))


@pytest.mark.slow
def test_interpreted(interpret):
    interpret("interpreter_inference.py")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_compiles(compiler, target):
    compiler(
        f"from radlads.kernels.shared.offline import compile_inference; assert compile_inference('{target}') == 15"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (1, 5), (16, 1)])
@pytest.mark.parametrize("width", [576, 2048, 6144])
def test_on_a_gpu(operator, rows, width):
    compare(operator, given(operator, rows, width, scale=16), torch.bfloat16, "cuda")
