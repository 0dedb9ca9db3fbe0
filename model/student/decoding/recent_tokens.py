"""Lets a recurrent layer take back its last tokens: the state before them and their inputs are kept for a while.

A state cannot be divided by a token, but it can be computed again: from the state before a pass, over those of the
pass's tokens that stay. Assisted generation and prompt lookup read candidates in one pass and take back the wrong ones.
Dims: B rows, T tokens, D model width. An exported model carries this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from radlads.model.mixers.shared.mixer import FirstValues, MixerOutput, MixerState

MOST = 64
"""Tokens at the end of a pass that can be taken back; more at once are read in two parts."""


class Pass(NamedTuple):
    """The end of a pass over a layer: so many tokens, and what computes the state after the first n of them."""

    tokens: int
    after: Callable[[int], MixerState | None]


def mix_recorded(
    passes: list[Pass],
    mix: Callable[..., MixerOutput],
    x_BTD: Tensor,
    *,
    state: MixerState | None,
    rope: tuple[Tensor, Tensor] | None,
    first: FirstValues | None,
    keep_BT: Tensor | None,
    **given: Any,
) -> MixerOutput:
    """As `Mixer.mix`, and adds to `passes` what takes back up to MOST of its last tokens."""
    T = x_BTD.shape[1]

    def part(begin: int, end: int, state: MixerState | None) -> MixerOutput:
        return mix(
            x_BTD[:, begin:end],
            state=_copied(state) if end - begin == 1 else state,  # a step changes it in place
            rope=None if rope is None else tuple(x[:, begin:end] for x in rope),
            first=None if first is None else FirstValues(*(None if x is None else x[:, begin:end] for x in first)),
            keep_BT=None if keep_BT is None else keep_BT[:, begin:end],
            **given,
        )

    begin = max(0, T - MOST)
    early = part(0, begin, state) if begin else None
    before = early.state if early is not None else state
    late = part(begin, T, before)
    if begin:
        passes.clear()  # the tokens between them and these are not kept
    del passes[:-MOST]
    passes.append(Pass(T - begin, lambda n: part(begin, begin + n, before).state if n else before))
    if early is None:
        return late
    joined = [None if a is None else torch.cat([a, b], 1) for a, b in zip(early.first, late.first, strict=True)]
    return MixerOutput(torch.cat([early.out, late.out], 1), FirstValues(*joined), late.state)


def take_back(passes: list[Pass], tokens: int) -> MixerState | None:
    """The state before the last `tokens` tokens; `passes` is left empty. Raises ValueError where they reach further
    back than what is kept."""
    check_take_back(passes, tokens)
    last = passes.pop()
    while last.tokens < tokens:
        tokens -= last.tokens
        last = passes.pop()
    passes.clear()
    return last.after(last.tokens - tokens)


def check_take_back(passes: list[Pass], tokens: int) -> None:
    """Raises ValueError where so many tokens cannot be taken back."""
    if tokens > sum(one.tokens for one in passes):
        raise ValueError(
            f"a recurrent state cannot forget {tokens} tokens: call cache.activate_past_recording() before the pass "
            f"that reads them (at most {MOST} tokens of a pass can be taken back), or keep cache.copy() and go back to "
            "it"
        )


def _copied(state: MixerState | None) -> MixerState | None:
    return None if state is None else MixerState(*(None if x is None else x.clone() for x in state))
