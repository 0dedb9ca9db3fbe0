"""The layers that stay attention, as far as a plan can determine them, and the cost of choosing the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from radlads.model.convert.layer_choice import DifficultyWeights, even_layers, last_layers, spaced_layers
from radlads.model.student.load import student_config
from radlads.model.teacher.load import find_family
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.choice import (
    AttentionChoice,
    Difficulty,
    fit_probe,
    late_choice,
    run_tokens,
)
from radlads.tasks.contracts.recipe.sections import Evaluate, Recipe, Student
from radlads.tasks.jobs.choose.choice_probe import check_probe
from radlads.tasks.jobs.plan.checks import Findings
from radlads.tasks.jobs.plan.cost import passes_cost
from radlads.tasks.jobs.plan.memory import USABLE, NetworkSizes
from radlads.tasks.jobs.plan.timing.judged_memory import judging_memory
from radlads.tasks.jobs.plan.timing.passes import Device


def planned_layers(student: Student, softmax: Sequence[int]) -> tuple[int, ...]:
    """The layers that the transplanted student keeps: those named, even, last; none where align comes first.

    softmax: the teacher's layers that have softmax attention. Raises UserError.
    """
    layers = student.attention_layers
    if not isinstance(layers, AttentionChoice):
        return tuple(sorted(layers))
    if not layers.after_align:
        chosen = (even_layers if layers.choose == "even" else last_layers)(layers.count, len(softmax))
        return tuple(softmax[i] for i in chosen)
    return ()


def plan_choice(
    recipe: Recipe, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, findings: Findings
) -> AttentionChoice | None:
    """The choice after align, with its probe fitted to its budget; None if nothing is chosen then.

    Raises UserError if no choice is possible: too many layers, gaps that cannot be met, a probe that cannot be made.
    """
    choice = late_choice(recipe)
    if choice is None:
        return None
    softmax = find_family(config).softmax_layers(config)
    last_layers(choice.count, len(softmax))  # says what is wrong with the count
    student = recipe.student
    student_config(
        config,
        variant=student.variant,
        options=student.options,
        attention_layers=softmax[: choice.count],
        attention_rope=student.attention_rope,
        attention_log_scale=student.attention_log_scale,
    )
    if choice.choose == "difficulty":
        weights = difficulty_weights(choice.difficulty)
        alike = dict.fromkeys(range(len(softmax)), 0.0)
        spaced_layers(alike, choice.count, num_layers=len(softmax), weights=weights)
        return choice
    try:
        fitted = fit_probe(choice, num_layers=len(softmax), tokens=run_tokens(recipe))
    except ValueError as error:
        raise UserError(str(error)) from None
    findings.warnings += check_probe(fitted, tokenizer, getattr(config, "max_position_embeddings", None))
    return fitted


def difficulty_weights(section: Difficulty) -> DifficultyWeights:
    """The section in the solver's form."""
    return DifficultyWeights(**section.model_dump())


def choice_stage(
    choice: AttentionChoice,
    recipe: Recipe,
    networks: NetworkSizes,
    device: dict[str, Any],
    resources: JobResources,
    findings: Findings,
) -> dict[str, Any]:
    """The stage `choose`: tokens of its forward passes, memory, time."""
    probe = choice.recall
    reading = Evaluate(context=max(*probe.lengths, probe.context), batch=probe.micro_batch)
    memory = judging_memory(reading, networks, resources)
    if memory["total"] > USABLE * device["memory_bytes"]:
        findings.misfits.append(
            f"choose needs about {memory['total'] / 1024**3:.1f} GiB on each {device['device']}, which has "
            f"{device['memory_bytes'] / 1024**3:.1f} GiB; what would help: attention_layers.recall.micro_batch: "
            f"{max(1, probe.micro_batch // 2)}, or choose: even"
        )
    tokens = 0
    if choice.choose == "recall":
        tokens = choice.passes(networks.num_softmax) * (probe.quiz_tokens + probe.heldout_tokens)
    flops, layers = networks.multiplied.forward_flops(probe.context), networks.num_layers
    computing = Device(device["kind"], resources.processes, resources.threads).forward_seconds(
        flops, tokens, layers, probe.micro_batch * probe.context
    )
    cost = passes_cost(computing, networks, resources, exported=networks.student_parameters)
    sizes = {"tokens": tokens, "share": tokens / max(1, run_tokens(recipe)), "memory_bytes_per_gpu": memory}
    return sizes | {"flops": flops * tokens} | cost
