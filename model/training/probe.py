"""Stage 1 without wrapper modules: hooks on a frozen teacher's attention run the student's mixers on the same inputs.

Dims: B batch, T time, D model width, L converted layers.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from radlads.model.mixers.shared.mixer import FirstValues, Mixer
from radlads.model.student.first_values import attention_first_values
from radlads.model.student.modeling import RadladsForCausalLM
from radlads.model.teacher.load import find_family
from radlads.model.training.align_losses import LayerLoss, ScaledMse, l2_loss


class AttentionProbe:
    """Context manager over a frozen teacher; the values of `losses` are computed as the teacher runs.

    Every mixer sees the teacher's own normed input of its layer (teacher forcing), and its output is compared with the
    attention's after o_proj. Layers are independent but for the first layer's values, which are threaded with their
    gradient. The teacher's activations are freed as they are used; no output of a layer is kept.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        student: RadladsForCausalLM,
        *,
        loss: LayerLoss = l2_loss,
        cu_seqlens: Tensor | None = None,
    ) -> None:
        """cu_seqlens: as in `RadladsForCausalLM.hidden`."""
        self._found: dict[int, Tensor] = {}
        self._teacher = teacher
        self._student = student
        self._loss = loss
        self._cu_seqlens = cu_seqlens
        self._first: FirstValues | None = None
        self._hooks: list[RemovableHandle] = []

    @property
    def losses(self) -> dict[int, Tensor]:
        """Layer → the mean of its loss over the sequences (scalar), after the teacher ran."""
        found = self._loss.finish(self._found) if isinstance(self._loss, ScaledMse) else self._found
        return {layer: loss_B.mean() for layer, loss_B in found.items()}

    def __enter__(self) -> Self:
        attentions = find_family(self._teacher.config).attention_modules(self._teacher)
        first = self._student.config.first_attention()
        if first is not None:
            hand_on = _HandOn(self, self._student.attention(first))
            self._hooks.append(attentions[first].register_forward_pre_hook(hand_on, with_kwargs=True))
        for layer, mixer in self._student.mixers().items():
            hook = _Hook(self, layer, mixer)
            self._hooks.append(attentions[layer].register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def hand_on(self, attention: nn.Module, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> None:
        """Take first values from the student's own attention, where its first layer stays that."""
        with torch.enable_grad():
            self._first = attention_first_values(self._student.config, attention, x_BTD.detach(), rope)

    def compare(self, layer: int, mixer: Mixer, x_BTD: Tensor, rope: tuple[Tensor, Tensor], wanted_BTD: Tensor) -> None:
        """Run one mixer and store its loss of every sequence."""

        def run(x: Tensor, first: FirstValues | None) -> tuple[Tensor, FirstValues]:
            mixed = mixer.mix(x, rope=rope, first=first, cu_seqlens=self._cu_seqlens)
            return self._loss(mixed.out, wanted_BTD, layer), mixed.first

        x_BTD, wanted_BTD = x_BTD.detach(), wanted_BTD.detach()
        with torch.enable_grad():
            if self._student.model.gradient_checkpointing and self._student.training:
                again = {"use_reentrant": False, "preserve_rng_state": False}  # a mixer draws nothing
                self._found[layer], self._first = checkpoint(run, x_BTD, self._first, **again)
            else:
                self._found[layer], self._first = run(x_BTD, self._first)


class _Hook:
    """Forward hook of one attention module."""

    def __init__(self, probe: AttentionProbe, layer: int, mixer: Mixer) -> None:
        self.probe, self.layer, self.mixer = probe, layer, mixer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        teacher_output = output[0] if isinstance(output, tuple) else output
        self.probe.compare(self.layer, self.mixer, x, kwargs["position_embeddings"], teacher_output)


class _HandOn:
    """Forward pre-hook of the teacher's attention in the first layer. attention: the student's."""

    def __init__(self, probe: AttentionProbe, attention: nn.Module) -> None:
        self.probe, self.attention = probe, attention

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        self.probe.hand_on(self.attention, x, kwargs["position_embeddings"])
