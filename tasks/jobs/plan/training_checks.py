"""Checks of the sizes of a recipe's training stages: batches, contexts, how often the data is read."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from transformers import PreTrainedConfig

from radlads.model.mixers.shared.registry import mixer_class
from radlads.model.sequence_parallel.limits import sharing_fault
from radlads.model.teacher.family import NO_RESTART
from radlads.model.teacher.load import find_family
from radlads.model.training.mixer_parts import has_log_decay, has_part
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.choice import late_choice
from radlads.tasks.contracts.recipe.sections import Recipe, SampleSource, Training
from radlads.tasks.contracts.recipe.training import runs_teacher
from radlads.tasks.contracts.stages import STUDENT_STAGES, TRAINING_STAGES, stage_info
from radlads.tasks.jobs.checkpoints.host_copy import has_room
from radlads.tasks.jobs.checkpoints.state_slices import ELEMENT_BYTES
from radlads.tasks.jobs.data.batch_plan import division_fault
from radlads.tasks.jobs.plan.checks import Findings
from radlads.tasks.jobs.plan.memory import average_bytes


def check_training(recipe: Recipe, positions: int | None, processes: int, findings: Findings) -> None:
    """Check batches and contexts; `positions`: the longest context that the teacher was trained on."""
    variant = recipe.student.variant
    if recipe.student.calibrate is not None and not mixer_class(variant).CALIBRATED:
        findings.faults.append(f"student.calibrate: {variant} has no parts that can be calibrated; leave it out")
    for stage in TRAINING_STAGES:
        section: Training | None = getattr(recipe, stage)
        if section is None:
            continue
        parts = section.parts
        for number, part in enumerate(parts, 1):
            _check_part(stage if len(parts) == 1 else f"{stage}.phases.{number - 1}", part, processes, findings)
        _check_watch(stage, section, findings)
        if positions is not None:
            _check_context(recipe, stage, section, positions, findings)
        if section.mixer_rate.start == 0 and section.rest_rate.start == 0 and not stage_info(stage).layerwise:
            findings.faults.append(f"{stage}: both learning rates start at 0, so nothing would train")
        _check_decay(recipe, stage, section, findings)
        _check_parts(recipe, stage, section, findings)
    if positions is not None and recipe.evaluate is not None and recipe.evaluate.context > positions:
        findings.warnings.append(
            f"evaluate.context ({recipe.evaluate.context}) is beyond the teacher's {positions} positions"
        )
    for name in recipe.datasets_used:
        for index, source in enumerate(recipe.data[name].sources):
            if positions is not None and isinstance(source, SampleSource) and source.context > positions:
                findings.faults.append(
                    f"data.{name}.sources.{index}.context ({source.context}) is beyond the {positions} positions that "
                    "the teacher was made for, and what it writes there is no text; shorten it"
                )


def _check_part(place: str, part: Training, processes: int, findings: Findings) -> None:
    groups = max(1, processes // part.sequence_parallel)
    if fault := division_fault(part.batch, processes, part.sequence_parallel):
        findings.faults.append(f"{place}.{fault}")
    elif (part.batch // groups) % part.micro_batch:
        findings.warnings.append(
            f"{place}.micro_batch ({part.micro_batch}) does not divide a process's {part.batch // groups} "
            f"sequences; a smaller one is used"
        )
    if part.tokens < part.batch * part.context:
        findings.faults.append(
            f"{place}.tokens ({part.tokens}) is less than one step (batch × context = {part.batch * part.context})"
        )


def _check_watch(stage: str, section: Training, findings: Findings) -> None:
    if section.watch.rolls_back and section.watch.rollback.every >= section.num_steps:
        findings.warnings.append(
            f"{stage}: a rollback can only go back to the beginning, because watch.rollback.every "
            f"({section.watch.rollback.every}) is not below its {section.num_steps} steps"
        )
    longest = max(part.own_steps for part in section.parts)
    findings.warnings += [
        f"{stage}.watch.{detector} finds nothing: it needs {steps} steps of a phase, and the longest has {longest}; "
        "give it a smaller window"
        for detector, steps in section.watch.steps_needed.items()
        if steps > longest
    ]


def _check_parts(recipe: Recipe, stage: str, section: Training, findings: Findings) -> None:
    """Settings of parts that the mixers do not have."""
    plain = stage_info(stage).makes == "teacher"
    what = "a plain model" if plain else f"the variant {recipe.student.variant}"
    end = "or change student.variant"

    def lacks(part: str) -> bool:
        return plain or not has_part(recipe.student.variant, part)

    if section.optimizer.decay_base_rate != 1.0 and lacks("decay_base"):
        findings.faults.append(f"{stage}.optimizer.decay_base_rate: {what} has no decay; leave the key out, {end}")
    only = [part for part in getattr(section, "train_only", ()) if part != "mixer" and lacks(part)]
    if only:
        findings.faults.append(f"{stage}.train_only: {what} has no {' and no '.join(only)}; leave them out, {end}")


def _check_decay(recipe: Recipe, stage: str, section: Training, findings: Findings) -> None:
    if section.decay_dtype in ("auto", "float32"):
        return
    plain = stage_info(stage).makes == "teacher"
    if plain or not has_log_decay(recipe.student.variant):
        what = "a plain model" if plain else f"the variant {recipe.student.variant}"
        findings.faults.append(
            f"{stage}.decay_dtype: {what} has no log decay of RWKV-7; leave the key out, or change student.variant"
        )


def _check_context(recipe: Recipe, stage: str, section: Training, positions: int, findings: Findings) -> None:
    """A teacher gives no targets beyond its positions; a stage without it needs only a student that works there."""
    taught = max((part.context for part in section.parts if runs_teacher(stage, part)), default=0)
    made_for = f"is beyond the {positions} positions that the teacher was made for"
    if taught > positions:
        alone = [name for name in STUDENT_STAGES if stage_info(name).trains and not stage_info(name).needs_teacher]
        instead = "train without the teacher there" if stage in alone else f"extend the context in {' or '.join(alone)}"
        findings.faults.append(
            f"{stage}.context ({taught}) {made_for}, and there it has nothing to teach; shorten it, or {instead}"
        )
    elif section.longest_context > positions and _sees_positions(recipe):
        findings.warnings.append(
            f"{stage}.context ({section.longest_context}) {made_for}, and softmax attention with rotary positions has "
            "to learn those beyond"
        )


def plan_checkpoint(
    stage: str, section: Training, trainable: int, resources: JobResources, findings: Findings
) -> dict[str, int]:
    """{bytes, host_bytes}: of a checkpoint in the store, and of the copy of its part that a process keeps in host
    memory while it is written. Warns if this machine, where it is the one that trains, has no room for the copies."""
    size = (ELEMENT_BYTES + average_bytes(section)) * trainable
    copied = -(-size // resources.processes)
    if resources.gpu_memory_gib is None and not has_room(copied, resources.processes):
        findings.warnings.append(
            f"{stage}: host memory has no room for a copy of what trains ({size / 2**30:.1f} GiB), so training waits "
            "while a checkpoint is written"
        )
    return {"bytes": size, "host_bytes": copied}


def check_restarts(recipe: Recipe, config: PreTrainedConfig, findings: Findings) -> None:
    """Packed documents need layers that restart where documents do. config: the teacher's."""
    if find_family(config).linear_attention is None:
        return
    for stage in recipe.training_stages:
        section: Training = getattr(recipe, stage)
        if any(part.reset_at_documents for part in section.parts):
            findings.faults.append(f"{stage}.reset_at_documents: {NO_RESTART}")


def check_sharing(
    recipe: Recipe, config: PreTrainedConfig, kept: Collection[int], processes: int, findings: Findings
) -> dict[str, tuple[int, ...]]:
    """Rows that processes share, where the networks allow it; returns stage → the numbers, above the present one, of
    those that could. config: the teacher's; kept: layers that stay softmax attention for certain."""
    softmax, late, possible = find_family(config).softmax_layers(config), late_choice(recipe) is not None, {}
    for stage in TRAINING_STAGES:
        section: Training | None = getattr(recipe, stage)
        if section is None or stage_info(stage).layerwise:
            continue
        every = late or runs_teacher(stage, section) or stage_info(stage).makes == "teacher"
        context, now = section.longest_context, section.sequence_parallel
        by_heads = mixer_class(recipe.student.variant).SHARES_ROWS_BY_HEADS
        fault = partial(sharing_fault, config, softmax if every else kept, context=context, by_heads=by_heads)
        if now > 1 and (found := fault(now)):
            findings.faults.append(f"{stage}.sequence_parallel: {found}")
        divides = all(part.context % processes == 0 for part in section.parts)
        numbers = [n for n in (2, 4, 8) if n > now and processes % n == 0 and divides]
        possible[stage] = tuple(n for n in numbers if fault(n) is None)
    return possible


def _sees_positions(recipe: Recipe) -> bool:
    """Whether the student has softmax attention with rotary positions; without these any length is possible."""
    return recipe.pretrain is not None or (recipe.student.attention_rope and bool(recipe.student.attention_layers))


def check_epochs(recipe: Recipe, data: dict[str, dict[str, Any]], findings: Findings) -> dict[str, float | None]:
    """Stage → epochs of its data (None: unknown); warns if there are more than two."""
    epochs: dict[str, float | None] = {}
    for stage in TRAINING_STAGES:
        section: Training | None = getattr(recipe, stage)
        if section is None or section.data not in data:
            continue
        share = 0.0 if section.mixed is None else section.mixed.share
        epochs[stage] = _epochs(stage, section.data, round(section.tokens * (1 - share)), data, findings)
        if section.mixed is not None and section.mixed.data in data:
            _epochs(stage, section.mixed.data, round(section.tokens * share), data, findings)
    return epochs


def _epochs(stage: str, name: str, read: int, data: dict[str, dict[str, Any]], findings: Findings) -> float | None:
    """Epochs of a stage over a dataset of which it reads `read` tokens."""
    tokens = data[name]["tokens"]
    if not tokens:
        return None
    if read > 2 * tokens:
        findings.warnings.append(
            f"{stage} reads {read} tokens of data.{name}, which has about {tokens}: {read / tokens:.1f} epochs"
        )
    return float(read / tokens)
