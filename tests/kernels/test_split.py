"""Parts of rows, each run alone: the same outputs and gradients as the operator on whole rows, to fp64 rounding."""

import pytest
import torch

from radlads.kernels.gated_delta import gated_delta
from radlads.kernels.shared.split import gradient_after, run_part, state_before
from radlads.kernels.shared.testing import gated_delta_inputs, relative_rms, wkv6_inputs, wkv7_inputs
from radlads.kernels.wkv6 import wkv6
from radlads.kernels.wkv7 import wkv7

OPERATORS = {
    "wkv7": (wkv7, wkv7_inputs),
    "wkv6": (wkv6, wkv6_inputs),
    "gated_delta": (gated_delta, gated_delta_inputs),
}
DENSE = {"no documents": None}
# Bounds inside two rows of 24 tokens: documents that cross parts of 8, that begin where one does, and of one token.
PACKED = {"documents": [[0, 3, 20, 24], [0, 8, 9, 24]]}


def in_parts(operator, inputs, parts, bounds, scale):
    """Outputs and gradients, with the gradient of the exchange computed by hand, as ranks do."""
    length = inputs[0].shape[1] // parts
    found, leaves = [], []
    for at in range(parts):
        here = [x[:, at * length : (at + 1) * length].detach().requires_grad_() for x in inputs]
        first, stop, given = at * length, (at + 1) * length, {}
        if bounds is not None:
            cuts = [{0, length, *(b - first for b in row if first < b < stop)} for row in bounds]
            flat = sorted({i * length + cut for i, row in enumerate(cuts) for cut in row})
            given = {
                "cu_seqlens": torch.tensor(flat),
                "continues_B": torch.tensor([at > 0 and first not in row for row in bounds]),
            }
        leaves.append(here)
        found.append(run_part(operator, tuple(here), **given))
    A, B = (torch.stack([getattr(part, name).detach() for part in found]) for name in ("A", "B"))
    states = [state_before(A, B, at).requires_grad_() for at in range(parts)]
    outs = [part.outputs(state) for part, state in zip(found, states, strict=True)]
    weights = scale.split(length, 1)
    own = [
        torch.autograd.grad((o * w).sum(), s, retain_graph=True)[0]
        for o, w, s in zip(outs, weights, states, strict=True)
    ]
    gradients = []
    for at in range(parts):
        dB = gradient_after(A, torch.stack(own), at)
        dA = dB @ states[at].mT.detach()
        ends = ((outs[at] * weights[at]).sum(), found[at].A, found[at].B)
        gradients.append(torch.autograd.grad(ends, leaves[at], (None, dA, dB)))
    return torch.cat(outs, 1), [torch.cat(pieces, 1) for pieces in zip(*gradients, strict=True)]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("bounds", [*DENSE.values(), *PACKED.values()], ids=[*DENSE, *PACKED])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parts_are_the_whole(name, bounds, dtype):
    operator, make = OPERATORS[name]
    inputs = [x.detach() for x in make(2, 24, 2, 8, dtype=dtype)]
    scale = torch.randn(2, 24, 2, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    leaves = [x.double().requires_grad_() for x in inputs]
    whole_dtype = [x.clone().requires_grad_() for x in inputs]

    def whole(given):
        if bounds is None:
            return operator(*given)[0]
        flat = torch.tensor(sorted({24 * i + b for i, row in enumerate(bounds) for b in row}))
        return operator(*(x.reshape(1, 48, *x.shape[2:]) for x in given), cu_seqlens=flat)[0].view(scale.shape)

    exact, rounded = whole(leaves), whole(whole_dtype)
    wanted = [exact, *torch.autograd.grad((exact * scale).sum(), leaves)]
    baseline = [rounded, *torch.autograd.grad((rounded * scale).sum(), whole_dtype)]
    out, gradients = in_parts(operator, inputs, 3, bounds, scale)
    for found, reference, same_dtype in zip([out, *gradients], wanted, baseline, strict=True):
        assert found.dtype == same_dtype.dtype
        # outputs from two runs are each rounded once
        limit = 1e-12 if dtype == torch.float64 else 2 * relative_rms(same_dtype, reference)
        assert relative_rms(found, reference) <= limit
    assert relative_rms(exact, whole([x.flip(1) for x in inputs])) > 0.1, "the order of tokens matters"


def test_long_memory_reaches_the_last_part():
    """Without decay, the first token's value is read by the last one."""
    inputs = wkv7_inputs(1, 64, 1, 8, dtype=torch.float64, log_decay=0.0, period=1, iclr=0.1)
    out, _ = in_parts(wkv7, [x.detach() for x in inputs], 8, None, torch.ones(1, 64, 1, 8, dtype=torch.float64))
    assert relative_rms(out, wkv7(*inputs)[0]) < 1e-12
