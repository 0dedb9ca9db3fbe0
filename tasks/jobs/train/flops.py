"""FLOP that a training stage must compute for a token: one count for `mfu`, for the plan's times and for benchmarks.

    forward               2 for every number of a matrix that the token is multiplied with
    gradient of inputs    2 more in the student; in align not for maps of a mixer's own input, which is the teacher's
    gradient of weights   2 more for those that train: frozen ones have none
    softmax attention     2·T·W a layer forward and twice that backward: T/2 tokens seen on average, W all heads' width

So distill takes 8 N (student 6 N, teacher 2 N) and finetune 6 N, where all trains, for N parameters without embeddings
that are looked up and experts that a token is not routed to. Recurrences, norms, elementwise operations, losses and
recomputation under gradient checkpointing count nowhere: they are means, not ends (PaLM, 2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from radlads.model.student.modeling import RadladsForCausalLM, parameter_group
from radlads.model.teacher.load import find_family
from radlads.model.training.quantized import quantized_shapes

# Of a mixer: the maps whose input is the layer's own input, which has no gradient in align.
_OF_INPUT = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "w1", "a1", "v1", "k1", "g1")


@dataclass(frozen=True)
class Flops:
    """FLOP of one token."""

    teacher: float
    """Its forward pass."""
    forward: float
    """The student's forward pass (in align, the mixers'); checkpointing computes it twice, which `total` leaves out."""
    backward: float

    @property
    def total(self) -> float:
        """What the stage must compute."""
        return self.teacher + self.forward + self.backward


@dataclass(frozen=True)
class Multiplied:
    """How many numbers a token is multiplied with: those of matrices, and the width of softmax attention."""

    teacher: int
    """In its layers, and its head."""
    teacher_head: int
    student: dict[str, int]
    """Parameter group → numbers of its matrices; `embeddings` where they are the head as well."""
    of_input: int
    """Of `student["mixer"]`: in maps of a layer's own input."""
    width: int
    """Query heads × head width of one layer."""
    teacher_softmax: int
    """Layers that are softmax attention."""
    student_softmax: int

    def stage_flops(self, context: int, *, trained: int, taught: bool, layerwise: bool) -> Flops:
        """trained: numbers of the matrices that train. taught: whether the teacher runs. layerwise: mixers alone, each
        on the teacher's own input (align)."""
        pair, teacher = 2.0 * context * self.width, self.teacher_flops(context)
        if layerwise:
            mixers = self.student.get("mixer", 0)
            backward = 2.0 * (mixers - self.of_input + trained)
            return Flops(teacher - 2.0 * self.teacher_head, 2.0 * mixers, backward)
        forward = self.forward_flops(context)
        backward = forward + 2.0 * trained + self.student_softmax * pair
        return Flops(teacher if taught else 0.0, forward, backward)

    def forward_flops(self, context: int) -> float:
        """Of the student alone."""
        return 2.0 * sum(self.student.values()) + self.student_softmax * 2.0 * context * self.width

    def teacher_flops(self, context: int) -> float:
        """Of the teacher's forward pass."""
        return 2.0 * self.teacher + self.teacher_softmax * 2.0 * context * self.width


def count_multiplied(teacher: Any, student: Any) -> Multiplied:
    """teacher (None: there is none), student: models on any device, meta among them, before they are divided over
    ranks; frozen matrices may be held in 8 bit. student: of `pretrain`, a plain model."""
    config, parts = _described(student)
    mixers = set(student.mixers()) if isinstance(student, RadladsForCausalLM) else set()
    groups: dict[str, int] = {}
    of_input = 0
    for name, count in matrices(student).items():
        group = parameter_group(name, parts, mixers)
        groups[group] = groups.get(group, 0) + count
        of_input += count if group == "mixer" and name.endswith(_OF_INPUT) else 0
    softmax = len(find_family(config).softmax_layers(config))
    heads = config.num_attention_heads
    return Multiplied(
        teacher=0 if teacher is None else sum(matrices(teacher).values()),
        teacher_head=0 if teacher is None else teacher.get_output_embeddings().weight.numel(),
        student=groups,
        of_input=of_input,
        width=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        teacher_softmax=0 if teacher is None else softmax,
        student_softmax=softmax - len(mixers),
    )


def trained_matrices(student: nn.Module, trains: Callable[[str], bool]) -> int:
    """Numbers of the matrices whose names `trains` accepts."""
    return sum(count for name, count in matrices(student).items() if trains(name))


def matrices(model: Any) -> dict[str, int]:
    """Parameter → how many numbers of it one token is multiplied with: all of a matrix, of stacked experts those that
    it is routed to. Without embeddings that are looked up alone."""
    config, parts = _described(model)
    routed = getattr(config, "num_experts_per_tok", 0) / (getattr(config, "num_experts", None) or 1)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()} | quantized_shapes(model)
    found = {}
    for name, shape in shapes.items():
        words = name.split(".")
        if parts.embeddings in words and not model.config.tie_word_embeddings:
            continue
        if len(shape) == 2:
            found[name] = shape.numel()
        elif len(shape) == 3 and parts.mlp in words:
            found[name] = round(shape.numel() * routed)
    return found


def _described(model: Any) -> tuple[Any, Any]:
    """A model's config, of a student its teacher's; the names of its parts."""
    if isinstance(model, RadladsForCausalLM):
        return model.config.teacher_config(), model.parts
    return model.config, find_family(model.config)
