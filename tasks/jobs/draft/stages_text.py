"""The training stages of a drafted recipe, as YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from radlads.tasks.contracts.stages import ALIGN, DISTILL, FINETUNE
from radlads.tasks.jobs.draft.protocols import Effort, Rates, is_small, is_toy
from radlads.tasks.jobs.draft.subject import Candidate

_SHORT = 512
_FINETUNE_TOKENS = 16 * 16384
"""Of a step (the code of RADLADS's 32B run)."""


@dataclass(frozen=True)
class Fit:
    """What fitting to the machine decides. passes: stage → (micro_batch, gradient_checkpointing), and `distill.long` of
    its longer phase."""

    passes: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    zero_stage: int = 1
    teacher_bits: int = 16
    offload: bool = False
    freeze_mlp: bool = False

    @property
    def freeze_line(self) -> list[str]:
        """Of distill and finetune."""
        return [
            "  freeze: [mlp]         # as the Reka conversions; costs quality: it does not fit otherwise"
        ] * self.freeze_mlp


@dataclass(frozen=True)
class Sizes:
    """Contexts in tokens; batches in sequences, multiples of the processes. long: of distill's second phase."""

    align: int
    align_batch: int
    distill: int
    distill_batch: int
    long: int
    long_batch: int
    finetune: int
    finetune_batch: int

    def longest(self, effort: Effort) -> int:
        """Context that an effort trains."""
        return self.finetune if effort.finetune else self.long if effort.distill_long else self.distill


@dataclass(frozen=True)
class Stages:
    """What the three stages are written from. processes: of the machine."""

    hybrid: bool
    toy: bool
    effort: Effort
    sizes: Sizes
    rates: Rates
    fit: Fit
    processes: int

    def passes(self, name: str, batch: int) -> tuple[int, str]:
        """micro_batch and gradient_checkpointing; before the fit the whole part of a process."""
        return self.fit.passes.get(name, (batch // self.processes, "false"))


def sizes_of(teacher: Candidate, effort: Effort, processes: int) -> Sizes:
    """Contexts within the teacher's positions; batches of RADLADS (table 2), of SmolLM2's recipes, of smoke's."""

    def even(batch: int) -> int:
        return max(1, round(batch / processes)) * processes

    def within(context: int) -> int:
        return min(context, teacher.context)

    finetune = within(effort.finetune_context)
    if is_toy(teacher.parameters):
        return Sizes(within(256), even(16), within(512), even(4), within(512), even(4), finetune, even(4))
    return Sizes(
        align=within(_SHORT),
        align_batch=even(64 if is_small(teacher.parameters) else 32),
        distill=within(_SHORT),
        distill_batch=even(96),
        long=within(4 * _SHORT),
        long_batch=even(24),
        finetune=finetune,
        finetune_batch=even(_FINETUNE_TOKENS // finetune),
    )


def align_text(stages: Stages) -> str:
    """Stage 1."""
    effort, sizes, hybrid = stages.effort, stages.sizes, stages.hybrid
    micro, checkpointing = stages.passes(ALIGN.name, sizes.align_batch)
    kind = "cosine" if hybrid and not stages.toy else "quarter_cosine"
    return "\n".join(
        [
            "align:                  # each mixer learns its layer's attention; cheap, and most of the way",
            "  data: text",
            f"  loss: {'mse             # HALO' if hybrid else 'l2              # RADLADS'}",
            f"  tokens: {effort.align:_}",
            f"  context: {sizes.align}",
            f"  batch: {sizes.align_batch}",
            f"  micro_batch: {micro}",
            f"  mixer_rate: {_rate(stages.rates.align)}",
            f"  schedule: {{kind: {kind}, warmup_steps: {5 if stages.toy else 50}}}",
            f"  gradient_checkpointing: {checkpointing}",
        ]
    )


def distill_text(stages: Stages) -> str:
    """Stage 2."""
    effort, sizes, mixers, rest = stages.effort, stages.sizes, stages.rates.mixers, stages.rates.rest
    micro, checkpointing = stages.passes(DISTILL.name, sizes.distill_batch)
    lines = [
        "distill:                # the whole student learns the teacher's next-token probabilities (KL)",
        "  data: text",
        f"  tokens: {effort.distill:_}",
        f"  context: {sizes.distill}",
        f"  batch: {sizes.distill_batch}",
        f"  micro_batch: {micro}",
        f"  mixer_rate: {_rate(mixers)}",
        f"  rest_rate: {_rate(rest)}",
        f"  schedule: {{kind: {stages.rates.schedule}, warmup_steps: {10 if stages.toy else 50}}}",
        f"  gradient_checkpointing: {checkpointing}",
        *stages.fit.freeze_line,
    ]
    if effort.distill_long:
        middle, middle_rest = (start**0.5 * end**0.5 for start, end in (mixers, rest))
        micro, _ = stages.passes(f"{DISTILL.name}.long", sizes.long_batch)
        lines += [
            "  phases:",
            f"    - {{tokens: {effort.distill - effort.distill_long:_}, mixer_rate: {_rate((mixers[0], middle))},",
            f"       rest_rate: {_rate((rest[0], middle_rest))}}}",
            f"    - {{tokens: {effort.distill_long:_}, context: {sizes.long}, batch: {sizes.long_batch},",
            f"       micro_batch: {micro}, mixer_rate: {_rate((middle, mixers[1]))},",
            f"       rest_rate: {_rate((middle_rest, rest[1]))}}}",
        ]
    return "\n".join(lines)


def finetune_text(stages: Stages) -> str:
    """Stage 3; "" without it."""
    effort, sizes = stages.effort, stages.sizes
    if not effort.finetune:
        return ""
    micro, checkpointing = stages.passes(FINETUNE.name, sizes.finetune_batch)
    rate = (1e-4, 1e-5) if stages.toy else (1e-5, 1e-5)
    return "\n".join(
        [
            "finetune:               # longer contexts, on the text itself",
            "  data: text",
            f"  tokens: {effort.finetune:_}",
            f"  context: {sizes.finetune}",
            f"  batch: {sizes.finetune_batch}",
            f"  micro_batch: {micro}",
            f"  mixer_rate: {_rate(rate)}      # {'ours' if stages.toy else 'RADLADS, table 2'}",
            f"  rest_rate: {_rate((1e-5, 1e-5))}",
            f"  schedule: {{kind: constant, warmup_steps: {2 if stages.toy else 50}}}",
            f"  gradient_checkpointing: {checkpointing}",
            *stages.fit.freeze_line,
        ]
    )


def _rate(rate: tuple[float, float]) -> str:
    start, final = (f"{value:.1e}".replace("e-0", "e-") for value in rate)
    return f"{{start: {start}, final: {final}}}"
