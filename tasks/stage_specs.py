"""What a recipe and its plan ask of the stages that make a student, the same with an orchestrator and without."""

from __future__ import annotations

from typing import Literal

from radlads.tasks.job import UserError
from radlads.tasks.recipe import Recipe, Training
from radlads.tasks.section_choice import run_tokens
from radlads.tasks.section_memory import mlp_bits, teacher_bits
from radlads.tasks.specs import ChooseSpec, PlanReport, TeacherRef, TrainSpec, TransplantSpec

TrainingStage = Literal["align", "distill", "finetune", "pretrain"]


def planned_teacher(report: PlanReport) -> TeacherRef:
    """The teacher as the plan pinned it. Raises UserError for a recipe that makes one instead."""
    if report.teacher is None:
        raise UserError("this recipe makes a teacher (`pretrain`) and converts none; run it with radlads-pretrain")
    return report.teacher


def transplant_spec(recipe: Recipe, report: PlanReport) -> TransplantSpec:
    """The student to be built: with the layers that the plan knows, none where they are chosen after align."""
    student = recipe.student
    # Named layers are kept as they were written. How MLPs are held while other things train, and what align starts
    # with, are no matter of the transplant and stay out of its digest.
    layers = student.attention_layers if isinstance(student.attention_layers, tuple) else report.attention_layers
    student = student.model_copy(update={"attention_layers": layers, "mlp_bits": 16, "calibrate": None})
    return TransplantSpec(teacher=planned_teacher(report), student=student)


def train_spec(recipe: Recipe, report: PlanReport, stage: TrainingStage) -> TrainSpec:
    """A training stage. Raises UserError where the recipe does not have it."""
    section: Training | None = getattr(recipe, stage)
    if section is None:
        raise UserError(f"the recipe '{recipe.name}' has no section `{stage}`")
    return TrainSpec.model_validate(
        {
            "objective": stage,
            "section": section,
            # The finetune stage needs no teacher; naming one in its digest would tie it to what it does not use.
            "teacher": planned_teacher(report) if stage in ("align", "distill") else None,
            "teacher_bits": teacher_bits(recipe, stage),
            "mlp_bits": mlp_bits(recipe, stage),
            "calibrate": recipe.student.calibrate if stage == "align" else None,
        }
    )


def choose_spec(recipe: Recipe, report: PlanReport) -> ChooseSpec | None:
    """The choice of attention layers after align; None where the recipe leaves nothing to choose then."""
    if report.choice is None:
        return None
    return ChooseSpec(
        section=report.choice,
        teacher=planned_teacher(report),
        attention_rope=recipe.student.attention_rope,
        run_tokens=run_tokens(recipe),
    )
