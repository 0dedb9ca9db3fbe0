"""plan: teacher and student on the meta device, every option checked, memory, time and cost of each stage.

Nothing is loaded and no device is used, so that all faults are reported together within the first minute.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from radlads.model.teacher.load import find_family, load_generation_config, load_teacher_config, teacher_warnings
from radlads.model.teacher.refusals import size_fault
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.pins.content import ContentHashes
from radlads.tasks.contracts.pins.pins import (
    pin_teacher,
    pinned_commit,
    teacher_revision,
    tokenizer_fingerprint,
    with_commits,
)
from radlads.tasks.contracts.recipe.choice import AttentionChoice, late_choice
from radlads.tasks.contracts.recipe.memory import mlp_bits, teacher_bits
from radlads.tasks.contracts.recipe.sections import Recipe, Training
from radlads.tasks.contracts.specs import Pin, PlanReport, PlanSpec, TeacherRef
from radlads.tasks.contracts.stages import JUDGING_STAGES, TRAINING_STAGES
from radlads.tasks.jobs.common import Job, run_job
from radlads.tasks.jobs.plan.checks import (
    Findings,
    check_align,
    check_dataset,
    check_frozen,
    check_heldout,
    check_lora,
    check_masks,
    check_needle,
    check_special_tokens,
    check_tokenizer,
    check_zero_3,
)
from radlads.tasks.jobs.plan.choice_plan import choice_stage, plan_choice, planned_layers
from radlads.tasks.jobs.plan.cost import UTILISATION, judging_flops, stage_cost, training_flops
from radlads.tasks.jobs.plan.memory import USABLE, Memory, NetworkSizes, judging_memory
from radlads.tasks.jobs.plan.plan_pins import pin_contents, pin_hub, pinned_tokenizer
from radlads.tasks.jobs.plan.remedies import Setting, what_would_help, what_would_help_judging
from radlads.tasks.jobs.plan.sizes import count_networks, describe_device
from radlads.tasks.jobs.plan.training_checks import check_epochs, check_restarts, check_training, plan_checkpoint
from radlads.tasks.jobs.plan.weight_check import check_teacher_weights
from radlads.tasks.jobs.sources import load_tokenizer, resolve_teacher_path

logger = logging.getLogger("radlads")


def main(job: Job) -> dict[str, Any]:
    """Write plan.json. Raises UserError with one line per fault."""
    spec: PlanSpec = job.typed
    report = make_plan(
        spec.recipe, job.spec.resources, preview=spec.preview, sizes_only=spec.sizes_only, hashes=job.hashes
    )
    (job.output / "plan.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")
    for warning in report.warnings:
        logger.warning("%s", warning)
    return {
        "teacher_parameters": report.teacher_parameters,
        "student_parameters": report.student_parameters,
        "mixer_parameters": report.mixer_parameters,
        "gpu_hours": report.gpu_hours,
        "dollars": report.dollars,
        "warnings": len(report.warnings),
    }


def make_plan(
    recipe: Recipe,
    resources: JobResources,
    *,
    preview: bool = False,
    sizes_only: bool = False,
    hashes: ContentHashes | None = None,
) -> PlanReport:
    """Check everything and sum the costs; see PlanSpec for preview and sizes_only. Raises UserError with all faults."""
    findings = Findings()
    hashes = hashes or ContentHashes()
    subject = _open_subject(recipe, findings, hashes, sizes_only=sizes_only)
    if subject is None:
        raise UserError("\n".join(findings.faults))
    positions = getattr(subject.config, "max_position_embeddings", None)
    check_training(recipe, positions, resources.processes, findings)
    check_frozen(recipe, findings)
    check_zero_3(recipe, resources, findings)
    check_restarts(recipe, subject.config, findings)
    hub = {} if sizes_only else pin_hub(recipe, findings)
    data = {} if subject.tokenizer is None else _check_texts(recipe, subject.tokenizer, subject.config, hub, findings)
    check_masks(recipe, data, findings)
    networks = choice = None
    with findings.at("student"):
        choice = _choice(recipe, subject)
        networks = count_networks(recipe, subject.config)
    if networks is None:
        raise UserError("\n".join(findings.faults))
    layers, softmax = tuple[int, ...](), find_family(subject.config).softmax_layers(subject.config)
    if recipe.teacher is not None:
        layers = planned_layers(recipe.student, softmax)
        untied = recipe.student.untie_embeddings
        findings.warnings += teacher_warnings(subject.config, attention_layers=layers, untie_embeddings=untied)
    check_lora(recipe, networks.linear_names, findings)
    check_align(recipe, networks.hidden, len(layers), len(softmax), findings)
    device = describe_device(resources)
    epochs = check_epochs(recipe, data, findings)
    stages = _plan_stages(recipe, resources, networks, device, epochs, findings)
    if choice is not None:
        stages = choice_stage(choice, recipe, networks, device, resources, findings, stages)
    _refuse(findings, preview=preview)
    # Last, because every byte is read: all other faults were reported before.
    teacher, pins = subject.teacher, dict[str, Pin]()
    if not sizes_only:
        if teacher is not None:
            with findings.at("teacher"):
                trusted = teacher.trust_remote_code
                teacher = pin_teacher(teacher.path, revision=teacher.revision, trust_remote_code=trusted, hashes=hashes)
        pins = pin_contents(recipe, teacher, hub, findings, hashes)
        _refuse(findings, preview=preview)
    return PlanReport(
        teacher=teacher,
        tokenizer=subject.tokenizer_path,
        tokenizer_fingerprint=pinned_tokenizer(teacher, pins),
        pins=pins,
        teacher_parameters=networks.teacher_parameters,
        student_parameters=networks.student_parameters,
        mixer_parameters=networks.mixer_parameters,
        new_parameters=networks.new_parameters,
        idle_parameters=networks.idle,
        groups=networks.groups,
        num_layers=networks.num_layers,
        linear_layers=networks.num_linear,
        attention_layers=planned_layers(recipe.student, softmax),
        choice=choice,
        stages=stages,
        data=data,
        gpu_hours=_sum(stage["gpu_hours"] for stage in stages.values()),
        dollars=_sum(stage["dollars"] for stage in stages.values()),
        assumptions=device | {"utilisation": UTILISATION if resources.device == "cuda" else 1.0},
        warnings=tuple(findings.warnings),
        misfits=tuple(findings.misfits),
    )


def _refuse(findings: Findings, *, preview: bool) -> None:
    faults = [*findings.faults, *(() if preview else findings.misfits)]
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))


def _check_texts(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    pins: Mapping[str, Pin],
    findings: Findings,
) -> dict[str, dict[str, Any]]:
    """Everything that is read: datasets (returned by name, as check_dataset does), needles, benchmark tasks."""
    data = {
        name: check_dataset(name, with_commits(recipe.data[name], pins, f"data.{name}"), tokenizer, findings)
        for name in recipe.datasets_used
    }
    findings.warnings += [f"data.{name} is used by no stage" for name in recipe.data if name not in data]
    check_tokenizer(tokenizer, config, findings)
    check_heldout(recipe, data, findings)
    if recipe.needle is not None:
        check_needle(recipe.needle, tokenizer, getattr(config, "max_position_embeddings", None), findings)
    if recipe.evaluate is not None and recipe.evaluate.tasks:
        from radlads.tasks.jobs.judge.lmeval import check_tasks  # the harness takes seconds to import

        found = [pins.get(f"evaluate.tasks.{index}.path") for index in range(len(recipe.evaluate.tasks))]
        findings.faults += check_tasks(recipe.evaluate.tasks, [pin.commits if pin else {} for pin in found])
    return data


def _choice(recipe: Recipe, subject: _Subject) -> AttentionChoice | None:
    if subject.tokenizer is None:
        return late_choice(recipe)
    return plan_choice(recipe, subject.config, subject.tokenizer)


@dataclass(frozen=True)
class _Subject:
    """The model that is converted (or made): its config, its tokenizer, and the teacher, not pinned yet."""

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    tokenizer_path: str
    teacher: TeacherRef | None


def _open_subject(recipe: Recipe, findings: Findings, hashes: ContentHashes, *, sizes_only: bool) -> _Subject | None:
    if recipe.pretrain is not None:
        tokenizer = None
        with findings.at("pretrain.tokenizer"):
            commit = pinned_commit(tokenizer_fingerprint(recipe.pretrain.tokenizer, None, hashes))
            tokenizer = load_tokenizer(recipe.pretrain.tokenizer, revision=commit)
        with findings.at("pretrain.config"):
            config = pretrain_config(recipe.pretrain.config, len(tokenizer) if tokenizer is not None else 1)
            if tokenizer is not None:
                return _Subject(config, tokenizer, recipe.pretrain.tokenizer, None)
        return None
    assert recipe.teacher is not None
    path, trusted = recipe.teacher.path, recipe.teacher.trust_remote_code
    if sizes_only:
        with findings.at("teacher"):
            config = load_teacher_config(resolve_teacher_path(path), revision=recipe.teacher.revision)
            check_special_tokens(config, None)
            findings.warnings.append("only sizes are planned: no weights, tokenizer and text were looked at")
            return _Subject(config, None, path, TeacherRef(path=path, revision=recipe.teacher.revision, fingerprint=""))
        return None
    with findings.at("teacher"):
        # An unsupported model is reported before files that its folder lacks.
        load_teacher_config(resolve_teacher_path(path), revision=recipe.teacher.revision)
        revision = teacher_revision(path, recipe.teacher.revision, trust_remote_code=trusted)
        config = load_teacher_config(resolve_teacher_path(path), revision=revision)
        check_special_tokens(config, load_generation_config(resolve_teacher_path(path), config, revision=revision))
        findings.warnings += check_teacher_weights(resolve_teacher_path(path), config, revision)
        tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trusted)
        reference = TeacherRef(path=path, revision=revision, trust_remote_code=trusted, fingerprint="")
        return _Subject(config, tokenizer, path, reference)
    return None


def pretrain_config(raw: dict[str, Any], vocab_size: int) -> PreTrainedConfig:
    """The typed config of a teacher to be made; `vocab_size` if it has none. Raises UserError."""
    values = {"vocab_size": vocab_size, **raw}
    model_type = values.pop("model_type", None)
    if not model_type:
        raise UserError("it needs a model_type, e.g. qwen3")
    if fault := size_fault(values):
        raise UserError(fault)
    try:
        config = AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise UserError(f"transformers refuses it: {' '.join(str(error).split())[:300]}") from error
    find_family(config)
    return config


def _plan_stages(
    recipe: Recipe,
    resources: JobResources,
    networks: NetworkSizes,
    device: dict[str, Any],
    epochs: dict[str, float | None],
    findings: Findings,
) -> dict[str, dict[str, Any]]:
    stages: dict[str, dict[str, Any]] = {}
    limit = USABLE * device["memory_bytes"]
    for stage in TRAINING_STAGES:
        section = getattr(recipe, stage)
        if section is None:
            continue
        bits = teacher_bits(recipe, stage), mlp_bits(recipe, stage)
        setting = Setting(stage, section, resources, *bits, divisible=recipe.student.calibrate is None)
        memory = setting.memory(networks)
        if memory["total"] > limit:
            findings.misfits.append(_misfit(stage, memory, device, what_would_help(setting, networks, limit)))
        trainable = networks.trainable(stage, section)
        stages[stage] = {
            "tokens": section.seen_tokens,
            "steps": section.num_steps,
            "context": section.longest_context,
            "batch": section.batch,
            "trainable_parameters": trainable,
            "epochs": epochs.get(stage),
            "memory_bytes_per_gpu": memory,
            "checkpoint": plan_checkpoint(stage, trainable, resources, findings),
        } | stage_cost(training_flops(stage, section, networks), device["peak_flops"], resources)
        if len(section.parts) > 1:
            stages[stage]["phases"] = [_plan_phase(stage, part, networks, device, resources) for part in section.parts]
    for stage in JUDGING_STAGES:
        section = getattr(recipe, stage)
        if section is None or recipe.pretrain is not None:
            continue
        memory = judging_memory(section, networks, resources)
        if memory["total"] > limit:
            helps = what_would_help_judging(stage, section, networks, resources, limit)
            findings.misfits.append(_misfit(stage, memory, device, helps))
        cost = stage_cost(judging_flops(section, networks, recipe), device["peak_flops"], resources)
        stages[stage] = {"memory_bytes_per_gpu": memory} | cost
    return stages


def _plan_phase(
    stage: str, part: Training, networks: NetworkSizes, device: dict[str, Any], resources: JobResources
) -> dict[str, Any]:
    """The values of a phase that differ from its stage."""
    cost = stage_cost(training_flops(stage, part, networks), device["peak_flops"], resources)
    return {"tokens": part.seen_tokens, "steps": part.num_steps, "context": part.context, "batch": part.batch} | cost


def _misfit(stage: str, memory: Memory, device: dict[str, Any], helps: str) -> str:
    return (
        f"{stage} needs about {_gib(memory['total'])} on each {device['device']}, which has "
        f"{_gib(device['memory_bytes'])}; what would help: {helps}"
    )


def _gib(size: float) -> str:
    return f"{size / 1024**3:.1f} GiB"


def _sum(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


if __name__ == "__main__":
    run_job(main)
