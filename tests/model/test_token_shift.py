"""The token before each token: padding is nobody's, documents are strangers, calls go on where the last one ended."""

from __future__ import annotations

import torch
from torch import Tensor

from radlads.model.mixers.shared.token_shift import previous_tokens


def by_hand(x: Tensor, keep: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    previous, last = torch.zeros_like(x), before.clone()
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            previous[b, t] = last[b]
            if keep[b, t]:
                last[b] = x[b, t]
    return previous, last


def test_any_pattern_of_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    x, before = torch.randn(6, 9, 3, generator=generator), torch.randn(6, 3, generator=generator)
    keep = torch.rand(6, 9, generator=generator) < 0.5
    keep[0], keep[1], keep[2, :4] = True, False, False
    for start in (None, before):
        got = previous_tokens(x, last_BD=start, keep_BT=keep)
        wanted = by_hand(x, keep, torch.zeros_like(before) if start is None else start)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert torch.equal(previous_tokens(x)[0], by_hand(x, torch.ones_like(keep), torch.zeros_like(before))[0])
    assert torch.equal(previous_tokens(x)[1], x[:, -1])


def test_documents_begin_with_zeros() -> None:
    x = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1))
    bounds = torch.tensor([0, 4, 4, 6, 11, 12, 12], dtype=torch.int32)
    previous = previous_tokens(x, cu_seqlens=bounds)[0].flatten(0, 1)
    flat = x.flatten(0, 1)
    starts = {0, 4, 6, 11}
    for t in range(12):
        assert torch.equal(previous[t], torch.zeros(3) if t in starts else flat[t - 1])


def test_the_gradient_goes_to_the_token_before() -> None:
    x = torch.randn(1, 5, 2, requires_grad=True)
    keep = torch.tensor([[True, True, False, True, True]])
    previous_tokens(x, keep_BT=keep)[0][0, 3].sum().backward()
    assert x.grad.abs().sum(-1).nonzero().tolist() == [[0, 1]]
