"""Opens the models of an evaluation job: the teacher, the student, and the models of earlier stages."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from radlads.model.student.load import load_student
from radlads.model.teacher.load import load_teacher
from radlads.tasks.contracts.specs import TeacherRef
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.judge.divided import hold, loading_device
from radlads.tasks.jobs.sources import load_tokenizer
from radlads.tasks.jobs.teacher.place import TEACHER_INPUT, teacher_place

STUDENT = "student"
TEACHER = "teacher"


def student_names(job: Job, *, not_models: tuple[str, ...] = ("data", TEACHER_INPUT)) -> list[str]:
    """Input names of the models: the student first, then earlier stages in input order."""
    return [STUDENT, *(name for name in job.spec.inputs if name not in (STUDENT, *not_models))]


def open_teacher(job: Job, reference: TeacherRef) -> PreTrainedModel:
    """Load the frozen teacher on this rank's device, or divided over the ranks. Collective."""
    place = teacher_place(job, reference)
    teacher = load_teacher(place.path, dtype=job.dtype, device=loading_device(job), revision=place.revision)
    return hold(job, as_judged(teacher))


def open_tokenizer(job: Job, reference: TeacherRef) -> PreTrainedTokenizerBase:
    """Load the teacher's tokenizer. Collective."""
    place = teacher_place(job, reference)
    return load_tokenizer(place.path, revision=place.revision, trust_remote_code=reference.trust_remote_code)


@contextmanager
def opened_student(job: Job, name: str) -> Iterator[PreTrainedModel]:
    """Load one student on this rank's device, or divided over the ranks; free its memory on exit. Collective."""
    model = hold(job, as_judged(load_student(job.input(name) / "model", dtype=job.dtype, device=loading_device(job))))
    try:
        yield model
    finally:
        torch.nn.Module.to(model, "meta")
        gc.collect()
        if job.device.type == "cuda":
            torch.cuda.empty_cache()


def continue_ids(
    model: PreTrainedModel,
    ids_BT: torch.Tensor,
    mask_BT: torch.Tensor | None = None,
    *,
    given: Mapping[str, Any] | None = None,
    **options: Any,
) -> torch.Tensor:
    """Prompts and their continuations by `generate`. given: further arguments of it; options: of GenerationConfig,
    replacing all model defaults."""
    generate: Any = model.generate
    mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
    config = GenerationConfig(use_cache=True, **options)
    rows: torch.Tensor = generate(
        ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        generation_config=config,
        **(given or {}),
    )
    return rows


def as_judged(model: PreTrainedModel) -> PreTrainedModel:
    """Freeze a model and reset its generation config: a repetition penalty, for example, would bias the comparison."""
    model.eval().requires_grad_(False)
    model.generation_config = GenerationConfig()
    return model
