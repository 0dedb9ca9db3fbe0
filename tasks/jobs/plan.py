"""plan: teacher and student on the meta device, every option checked, and what each stage will take and cost.

Nothing is loaded and no device is used, so that whatever is wrong is said in the first minute, all of it at once.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from radlads.model.modeling import parameter_group
from radlads.model.student import build_student
from radlads.model.teacher import find_family, load_teacher_config, teacher_warnings
from radlads.tasks.job import JobResources, UserError
from radlads.tasks.jobs.checks import (
    Findings,
    check_dataset,
    check_epochs,
    check_heldout,
    check_masks,
    check_needle,
    check_tokenizer,
    check_training,
)
from radlads.tasks.jobs.choice_plan import choice_stage, plan_choice, planned_layers
from radlads.tasks.jobs.common import Job, run_job
from radlads.tasks.jobs.cost import UTILISATION, device_peak, judging_flops, stage_cost, training_flops
from radlads.tasks.jobs.memory import Networks, judging_memory, training_memory, what_would_help
from radlads.tasks.jobs.sources import (
    first_line,
    load_tokenizer,
    pin_teacher,
    resolve_files,
    resolve_teacher_path,
    tokenizer_fingerprint,
)
from radlads.tasks.sections import Recipe
from radlads.tasks.specs import PlanReport, TeacherRef

logger = logging.getLogger("radlads")

# A device is never quite full: fragmentation, and estimates that are a little off.
_USABLE = 0.95


def main(job: Job) -> dict[str, Any]:
    """Write plan.json. Raises UserError with one line per fault."""
    report = make_plan(job.typed.recipe, job.spec.resources)
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


def make_plan(recipe: Recipe, resources: JobResources) -> PlanReport:
    """Check everything and add it up. Raises UserError with all faults."""
    findings = Findings()
    subject = _open_subject(recipe, findings)
    if subject is None:
        raise UserError("\n".join(findings.faults))
    positions = getattr(subject.config, "max_position_embeddings", None)
    data = {name: check_dataset(name, recipe.data[name], subject.tokenizer, findings) for name in recipe.datasets_used}
    findings.warnings += [f"data.{name} is used by no stage" for name in recipe.data if name not in data]
    check_tokenizer(subject.tokenizer, subject.config, findings)
    check_training(recipe, positions, resources.processes, findings)
    check_masks(recipe, findings)
    check_heldout(recipe, data, findings)
    if recipe.needle is not None:
        check_needle(recipe.needle, subject.tokenizer, positions, findings)
    if recipe.evaluate is not None and recipe.evaluate.tasks:
        from radlads.tasks.jobs.lmeval import check_tasks  # the harness takes seconds to import

        findings.faults += check_tasks(recipe.evaluate.tasks)
    networks = choice = None
    with findings.at("student"):
        choice = plan_choice(recipe, subject.config, subject.tokenizer)
        networks = count_networks(recipe, subject.config)
    if networks is None:
        raise UserError("\n".join(findings.faults))
    if recipe.teacher is not None:
        layers = planned_layers(recipe.student, networks.num_layers)
        untied = recipe.student.untie_embeddings
        findings.warnings += teacher_warnings(subject.config, attention_layers=layers, untie_embeddings=untied)
    device = describe_device(resources)
    epochs = check_epochs(recipe, data, findings)
    stages = _plan_stages(recipe, resources, networks, device, epochs, findings)
    if choice is not None:
        stages = choice_stage(choice, recipe, networks, device, resources, findings, stages)
    files = {}
    for name in recipe.datasets_used:
        with findings.at(f"data.{name}"):
            files[name] = resolve_files(recipe.data[name].sources)
    if findings.faults:
        raise UserError("\n".join(dict.fromkeys(findings.faults)))
    return PlanReport(
        teacher=subject.teacher,
        tokenizer=subject.tokenizer_path,
        tokenizer_fingerprint=tokenizer_fingerprint(subject.tokenizer_path, subject.revision),
        files=files,
        teacher_parameters=networks.teacher_parameters,
        student_parameters=networks.student_parameters,
        mixer_parameters=networks.mixer_parameters,
        num_layers=networks.num_layers,
        attention_layers=planned_layers(recipe.student, networks.num_layers),
        choice=choice,
        stages=stages,
        data=data,
        gpu_hours=_sum(stage["gpu_hours"] for stage in stages.values()),
        dollars=_sum(stage["dollars"] for stage in stages.values()),
        assumptions=device | {"utilisation": UTILISATION if resources.device == "cuda" else 1.0},
        warnings=tuple(findings.warnings),
    )


@dataclass(frozen=True)
class _Subject:
    """What is converted (or made): its config, its tokenizer, and the teacher pinned by content."""

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    tokenizer_path: str
    teacher: TeacherRef | None

    @property
    def revision(self) -> str | None:
        return self.teacher.revision if self.teacher else None


def _open_subject(recipe: Recipe, findings: Findings) -> _Subject | None:
    if recipe.pretrain is not None:
        tokenizer = None
        with findings.at("pretrain.tokenizer"):
            tokenizer = load_tokenizer(recipe.pretrain.tokenizer)
        with findings.at("pretrain.config"):
            config = pretrain_config(recipe.pretrain.config, len(tokenizer) if tokenizer is not None else 1)
            if tokenizer is not None:
                return _Subject(config, tokenizer, recipe.pretrain.tokenizer, None)
        return None
    assert recipe.teacher is not None
    path, trusted = recipe.teacher.path, recipe.teacher.trust_remote_code
    with findings.at("teacher"):
        teacher = pin_teacher(path, revision=recipe.teacher.revision, trust_remote_code=trusted)
        config = load_teacher_config(resolve_teacher_path(path), revision=teacher.revision, trust_remote_code=trusted)
        tokenizer = load_tokenizer(path, revision=teacher.revision, trust_remote_code=trusted)
        return _Subject(config, tokenizer, path, teacher)
    return None


def pretrain_config(raw: dict[str, Any], vocab_size: int) -> PreTrainedConfig:
    """The typed config of a teacher to be made; `vocab_size` where it names none. Raises UserError."""
    values = {"vocab_size": vocab_size, **raw}
    model_type = values.pop("model_type", None)
    if not model_type:
        raise UserError("it needs a model_type, e.g. qwen3")
    try:
        config = AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"transformers refuses it: {first_line(error)}") from error
    find_family(config)
    return config


def count_networks(recipe: Recipe, config: PreTrainedConfig) -> Networks:
    """Build teacher and student on the meta device and count. Raises UserError for options that do not fit."""
    family = find_family(config)
    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(config)
        if recipe.pretrain is not None:
            student, mixers = teacher, set()
        else:
            student = build_student(
                config,
                variant=recipe.student.variant,
                options=recipe.student.options,
                attention_layers=planned_layers(recipe.student, config.num_hidden_layers),
                attention_rope=recipe.student.attention_rope,
                untie_embeddings=recipe.student.untie_embeddings,
            )
            mixers = set(student.mixers())
    groups: dict[str, int] = {}
    for name, parameter in student.named_parameters():
        group = parameter_group(name, family, mixers)
        groups[group] = groups.get(group, 0) + parameter.numel()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Networks(
        num_layers=config.num_hidden_layers,
        num_recurrent=len(mixers),
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        width=heads * head_dim,
        head_dim=head_dim,
        kv_width=(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
        vocab=config.vocab_size,
        teacher_parameters=0 if recipe.pretrain is not None else sum(p.numel() for p in teacher.parameters()),
        student_parameters=sum(groups.values()),
        groups=groups,
    )


def describe_device(resources: JobResources) -> dict[str, Any]:
    """{device, processes, peak_flops, memory_bytes} of one process's device; on a CPU its share of the machine."""
    if resources.device == "cuda" and torch.cuda.is_available():
        name: str | None = torch.cuda.get_device_name(0)
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        name, memory = None, psutil.virtual_memory().total // resources.processes
    return {
        "device": name or resources.device,
        "processes": resources.processes,
        "peak_flops": device_peak(name, resources),
        "memory_bytes": memory,
    }


def _plan_stages(
    recipe: Recipe,
    resources: JobResources,
    networks: Networks,
    device: dict[str, Any],
    epochs: dict[str, float | None],
    findings: Findings,
) -> dict[str, dict[str, Any]]:
    stages: dict[str, dict[str, Any]] = {}
    for stage in ("pretrain", "align", "distill", "finetune"):
        section = getattr(recipe, stage)
        if section is None:
            continue
        memory = training_memory(stage, section, networks, resources)
        if memory["total"] > _USABLE * device["memory_bytes"]:
            findings.faults.append(
                f"{stage} needs about {_gib(memory['total'])} on each {device['device']}, which has "
                f"{_gib(device['memory_bytes'])}; what would help: {what_would_help(stage, section, memory, resources)}"
            )
        stages[stage] = {
            "tokens": section.num_steps * section.batch * section.context,
            "steps": section.num_steps,
            "context": section.context,
            "batch": section.batch,
            "trainable_parameters": networks.trainable(stage, section.freeze),
            "epochs": epochs.get(stage),
            "memory_bytes_per_gpu": memory,
        } | stage_cost(training_flops(stage, section, networks), device["peak_flops"], resources)
    for stage, section in (("evaluate", recipe.evaluate), ("needle", recipe.needle)):
        if section is None or recipe.pretrain is not None:
            continue
        memory = judging_memory(section, networks, resources)
        if memory["total"] > _USABLE * device["memory_bytes"]:
            findings.faults.append(
                f"{stage} needs about {_gib(memory['total'])} on each {device['device']}, which has "
                f"{_gib(device['memory_bytes'])}; what would help: {stage}.batch: {max(1, section.batch // 2)}"
            )
        cost = stage_cost(judging_flops(section, networks), device["peak_flops"], resources)
        stages[stage] = {"memory_bytes_per_gpu": memory} | cost
    return stages


def _gib(size: float) -> str:
    return f"{size / 1024**3:.1f} GiB"


def _sum(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def plan_of(folder: Path) -> PlanReport:
    """Read a committed plan."""
    return PlanReport.model_validate_json((folder / "plan.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_job(main)
