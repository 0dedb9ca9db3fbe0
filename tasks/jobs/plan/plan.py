"""plan: teacher and student on the meta device, every option checked, memory, time and cost of each stage.

Nothing is loaded and no device is used, so that all faults are reported together within the first minute.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from radlads.model.teacher.load import find_family, teacher_warnings
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.pins.content import ContentHashes
from radlads.tasks.contracts.pins.pins import pin_teacher, with_commits
from radlads.tasks.contracts.recipe.choice import AttentionChoice, late_choice
from radlads.tasks.contracts.recipe.sections import Evaluate, Recipe
from radlads.tasks.contracts.specs import GgufFile, Pin, PlanReport, PlanSpec, TeacherRef
from radlads.tasks.jobs.common import Job, run_job
from radlads.tasks.jobs.judge.ruler.prompts import check_ruler
from radlads.tasks.jobs.judge.speed import check_speed
from radlads.tasks.jobs.judge.texts import check_text
from radlads.tasks.jobs.judge.written.scores import check_generation
from radlads.tasks.jobs.plan.checks import (
    Findings,
    check_align,
    check_dataset,
    check_engines,
    check_frozen,
    check_heldout,
    check_lora,
    check_masks,
    check_needle,
    check_tokenizer,
)
from radlads.tasks.jobs.plan.choice_plan import plan_choice, planned_layers
from radlads.tasks.jobs.plan.memory import NetworkSizes
from radlads.tasks.jobs.plan.plan_pins import pin_contents, pin_hub, pinned_tokenizer
from radlads.tasks.jobs.plan.sizes import count_networks, describe_device
from radlads.tasks.jobs.plan.stage_plans import plan_stages
from radlads.tasks.jobs.plan.subject import Subject, open_subject
from radlads.tasks.jobs.plan.training_checks import check_epochs, check_restarts, check_sharing, check_training

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
    networks: NetworkSizes | None = None,
) -> PlanReport:
    """Check everything and sum the costs; see PlanSpec for preview and sizes_only. networks: as count_networks found
    them for this student, teacher and longest context. Raises UserError with all faults."""
    findings = Findings()
    hashes = hashes or ContentHashes()
    subject = open_subject(recipe, findings, hashes, sizes_only=sizes_only)
    if subject is None:
        raise UserError("\n".join(findings.faults))
    positions = getattr(subject.config, "max_position_embeddings", None)
    check_training(recipe, positions, resources.processes, findings)
    check_frozen(recipe, findings)
    check_engines(recipe, resources, findings)
    check_restarts(recipe, subject.config, findings)
    hub = {} if sizes_only else pin_hub(recipe, findings)
    data = {} if subject.tokenizer is None else _check_texts(recipe, subject.tokenizer, subject.config, hub, findings)
    _check_written(recipe.evaluate, subject.tokenizer, positions, resources, findings)
    check_masks(recipe, data, findings)
    choice = None
    with findings.at("student"):
        choice = _choice(recipe, subject, findings)
        networks = networks or count_networks(recipe, subject.config)
    if networks is None:
        raise UserError("\n".join(findings.faults))
    layers, softmax = tuple[int, ...](), find_family(subject.config).softmax_layers(subject.config)
    if recipe.teacher is not None:
        layers = planned_layers(recipe.student, softmax)
        untied = recipe.student.untie_embeddings
        findings.warnings += teacher_warnings(subject.config, attention_layers=layers, untie_embeddings=untied)
    sharings = check_sharing(recipe, subject.config, layers, resources.processes, findings)
    check_lora(recipe, networks.linear_names, findings)
    check_align(recipe, networks.hidden, len(layers), len(softmax), findings)
    device = describe_device(resources)
    epochs = check_epochs(recipe, data, findings)
    stages = plan_stages(recipe, resources, networks, device, data, epochs, choice, sharings, findings)
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
        gguf=_pinned_gguf(subject, teacher),
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
        assumptions=device,
        warnings=tuple(findings.warnings),
        misfits=tuple(findings.misfits),
        advice=tuple(findings.advice),
    )


def _pinned_gguf(subject: Subject, teacher: TeacherRef | None) -> GgufFile | None:
    """The teacher's file with its content, which is the teacher's fingerprint."""
    if subject.gguf is None or teacher is None:
        return None
    return subject.gguf.model_copy(update={"sha256": teacher.fingerprint})


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
        positions = getattr(config, "max_position_embeddings", None)
        check_needle(recipe.needle, tokenizer, positions, findings)
        with findings.at("needle.ruler"):
            findings.warnings += check_ruler(recipe.needle, tokenizer, positions)
    if recipe.evaluate is not None and recipe.evaluate.tasks:
        from radlads.tasks.jobs.judge.lmeval import check_tasks  # the harness takes seconds to import

        found = [pins.get(f"evaluate.tasks.{index}.path") for index in range(len(recipe.evaluate.tasks))]
        findings.faults += check_tasks(recipe.evaluate.tasks, [pin.commits if pin else {} for pin in found])
    if recipe.evaluate is not None and recipe.evaluate.suite is not None:
        from radlads.tasks.jobs.judge.suite.scores import check_suite  # imports the harness

        faults, notes = check_suite(recipe.evaluate.suite)
        findings.faults += faults
        findings.warnings += notes
    return data


def _check_written(
    section: Evaluate | None,
    tokenizer: PreTrainedTokenizerBase | None,
    positions: int | None,
    resources: JobResources,
    findings: Findings,
) -> None:
    """What `evaluate` lets the models write, and their speed."""
    if section is None:
        return
    for text in section.texts if tokenizer is not None else ():
        with findings.at("evaluate.texts"):
            check_text(text)
    if section.generation is not None and tokenizer is not None:
        with findings.at("evaluate.generation"):
            findings.warnings += check_generation(section.generation, tokenizer, section.add_bos, positions)
    if section.speed is not None:
        with findings.at("evaluate.speed"):
            findings.warnings += check_speed(section.speed, positions, resources)


def _choice(recipe: Recipe, subject: Subject, findings: Findings) -> AttentionChoice | None:
    if subject.tokenizer is None:
        return late_choice(recipe)
    return plan_choice(recipe, subject.config, subject.tokenizer, findings)


def _sum(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


if __name__ == "__main__":
    run_job(main)
