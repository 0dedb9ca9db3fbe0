"""Sliding-window softmax attention with sinks in place of attention: the baseline that a recurrence has to beat.

StreamingLLM (Xiao, Tian, Chen, Han, Lewis, arXiv 2309.17453): the first tokens draw weight that has to go somewhere,
and a window that drops them breaks. No new parameters: the layer is the teacher's, and sees fewer tokens.

Dims: B batch, T time, D model width, H query heads, G kv heads, K key (and value) dim per head, S sinks, W window.
x [B,T,D] is the layer's normed input; tokens are counted from 0 in their document.

    q = rope(norm(x q_proj))                        [H,K]      norm: the teacher's q/k norms, where it has them (Qwen3)
    k = rope(norm(x k_proj)),  v = x v_proj         [G,K]      each for H/G query heads in a row
    o_t = Σ_j softmax_j(q_t·k_j · scale) v_j        [H,K]      over j ≤ t with j < S or j > t - W; the teacher's scale
    out = o o_proj                                  [D]        gated first, where the teacher gates (Qwen3.5)

Memory. An RWKV-7 state has K·K numbers in fp32 a head, 4 K² bytes; a token held in bf16 takes 4 K bytes a kv head. So
the default window, K·H/G tokens, holds as many bytes as an RWKV-7 student's state (and 4 sinks): the same memory, which
is what the comparison is about. For 16 heads of 128, 8 of them kv heads, that is 256 tokens.

Positions. Keys are rotated once, by their absolute position, as in the teacher and in training, and cached so. (The
published code for streaming numbers positions inside the cache instead, so that they never pass the trained range, and
rotates cached keys anew at each step.) Scores within the window are the same, as rotary positions are relative; the
distance to a sink grows with the text. Beyond the teacher's range, sinks are seen at distances that it was not trained
on, unless training here goes there.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from radlads.kernels.window_attention import window_attention, window_attention_step
from radlads.model.mixers.shared.mixer import AttentionShape, FirstValues, MixerOutput, MixerState
from radlads.model.mixers.shared.mixer import Mixer as BaseMixer
from radlads.model.mixers.shared.options import MixerOptions
from radlads.model.mixers.shared.recurrence import is_step


class Options(MixerOptions):
    """Choices of sliding_window."""

    window: int | None = Field(default=None, ge=1)
    """Last tokens that a token sees, itself included. None: head width times query heads over kv heads, the memory of
    an RWKV-7 state."""
    sinks: int = Field(default=4, ge=0)
    """First tokens of the document that every token sees. Published: 4."""
    rope: bool = True
    """Rotary positions on q and k; the teacher's own frequencies."""


class Mixer(BaseMixer):
    """See the module's docstring."""

    CONSTANTS: ClassVar[dict[str, float | str]] = {"score_scale": "head_dim^-0.5"}
    CALIBRATED: ClassVar[dict[str, str]] = {}
    PARTS: ClassVar = {"decay_base": (), "decay": (), "token_shift": ()}
    RECURRENT: ClassVar[bool] = False
    SHARES_ROWS_BY_HEADS: ClassVar[bool] = True

    def __init__(self, shape: AttentionShape, options: Any, *, layer: int, num_layers: int, first: bool) -> None:
        """options: resolved, attributes as in `Options`. first: makes no difference here."""
        super().__init__(shape, layer, num_layers)
        self.options = options
        self.window: int = options.window or shape.head_dim * shape.num_heads // shape.num_kv_heads
        self.start()

    def reset_parameters(self) -> None:
        """Nothing: all parameters are the teacher's."""

    def mix(
        self,
        x_BTD: Tensor,
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        first: FirstValues | None = None,
        state: MixerState | None = None,
        keep_BT: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        output_state: bool = False,
        row_part: Any = None,
    ) -> MixerOutput:
        """See `radlads.model.mixers.shared.mixer.Mixer.mix`."""
        q, k, v, gate = self.project(x_BTD, rope if self.options.rope else None)
        sizes = {"sinks": self.options.sinks, "window": self.window, "scale": self.shape.head_dim**-0.5}
        after = None
        if row_part is not None:
            o = row_part.run_by_heads(window_attention, (q, self.repeat(k), self.repeat(v)), **sizes)
        elif cu_seqlens is not None:
            if state is not None or output_state:
                raise ValueError("packed documents (cu_seqlens) and a recurrent state exclude each other")
            flat = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v))
            o = window_attention(*flat, cu_seqlens=cu_seqlens, **sizes)[0].view(q.shape)
        elif is_step(x_BTD, state, training=self.training):
            keep = None if keep_BT is None else keep_BT[:, 0]
            token = (x[:, 0] for x in (q, k, v))
            o = window_attention_step(*token, state.recurrent, state.seen, **sizes, keep_B=keep)[:, None]
            after = state
        else:
            before = None if state is None else (state.recurrent, state.seen)
            given = {"keep_BT": keep_BT, "initial_state": before, "output_final_state": output_state}
            o, held = window_attention(q, k, v, **given, **sizes)
            after = None if held is None else MixerState(held[0], seen=held[1])
        return MixerOutput(self.finish(o.flatten(-2), gate), FirstValues(), after)
