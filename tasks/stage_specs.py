"""What a recipe and its plan ask of the stages that make a student, the same with an orchestrator and without."""

from __future__ import annotations

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.pins.pins import with_commits
from radlads.tasks.contracts.recipe.choice import late_choice, run_tokens
from radlads.tasks.contracts.recipe.memory import mlp_bits, teacher_bits
from radlads.tasks.contracts.recipe.recipe import Recipe, SampleSource, Training
from radlads.tasks.contracts.recipe.training import runs_teacher
from radlads.tasks.contracts.specs import (
    ChooseSpec,
    EvaluateSpec,
    NeedleSpec,
    Pin,
    PlanReport,
    TeacherRef,
    TokenizeSpec,
    TrainSpec,
    TransplantSpec,
)
from radlads.tasks.contracts.stages import EVALUATE, NEEDLE, stage_info


def planned_teacher(report: PlanReport) -> TeacherRef:
    """The teacher as the plan pinned it. Raises UserError for a recipe that makes one instead."""
    if report.teacher is None:
        raise UserError("this recipe makes a teacher (`pretrain`) and converts none; run it with radlads-pretrain")
    return report.teacher


def pins_under(report: PlanReport, section: str, field: str) -> dict[str, Pin]:
    """The pins of a section of the recipe, by their locations in a spec that has it as `field`."""
    return {
        f"{field}.{location.removeprefix(f'{section}.')}": pin
        for location, pin in report.pins.items()
        if location.startswith(f"{section}.")
    }


def tokenize_spec(recipe: Recipe, report: PlanReport, name: str) -> TokenizeSpec:
    """One of the recipe's datasets."""
    pins = pins_under(report, f"data.{name}", "dataset")
    dataset = with_commits(recipe.data[name], pins, "dataset")
    samples = any(isinstance(source, SampleSource) for source in dataset.sources)
    return TokenizeSpec(
        name=name,
        dataset=dataset,
        pins=pins,
        tokenizer=report.tokenizer,
        tokenizer_fingerprint=report.tokenizer_fingerprint,
        trust_remote_code=_trusts_tokenizer(report),
        teacher=planned_teacher(report) if samples else None,
    )


def transplant_spec(recipe: Recipe, report: PlanReport) -> TransplantSpec:
    """The student to be built: with the layers that the plan knows, none where they are chosen after align."""
    student = recipe.student
    # Named layers are kept as they were written. How MLPs are held while other things train, and what align starts
    # with, are no matter of the transplant and stay out of its digest.
    layers = student.attention_layers if isinstance(student.attention_layers, tuple) else report.attention_layers
    student = student.model_copy(update={"attention_layers": layers, "mlp_bits": 16, "calibrate": None})
    return TransplantSpec(teacher=planned_teacher(report), student=student)


def train_spec(recipe: Recipe, report: PlanReport, stage: str) -> TrainSpec:
    """A training stage. Raises UserError where the recipe does not have it."""
    info = stage_info(stage)
    section: Training | None = getattr(recipe, stage)
    if section is None:
        raise UserError(f"the recipe '{recipe.name}' has no section `{stage}`")
    return TrainSpec.model_validate(
        {
            "objective": stage,
            "section": section,
            "pins": pins_under(report, stage, "section"),
            "trust_remote_code": _trusts_tokenizer(report),
            # A stage without a teacher names none in its digest, which would tie it to what it does not use.
            "teacher": planned_teacher(report) if runs_teacher(stage, section) else None,
            "teacher_bits": teacher_bits(recipe, stage),
            "mlp_bits": mlp_bits(recipe, stage),
            "calibrate": recipe.student.calibrate if info.layerwise else None,
        }
    )


def choose_spec(recipe: Recipe, report: PlanReport) -> ChooseSpec | None:
    """The choice of attention layers after align; None where the recipe leaves nothing to choose then."""
    choice, asked = report.choice, late_choice(recipe)
    if choice is None or asked is None:
        return None
    # The plan made the probe smaller where it had to; how many sequences are read at once may have changed since.
    probe = choice.recall.model_copy(update={"micro_batch": asked.recall.micro_batch})
    return ChooseSpec(
        section=choice.model_copy(update={"recall": probe}),
        pins=pins_under(report, "student.attention_layers", "section"),
        teacher=planned_teacher(report),
        attention_rope=recipe.student.attention_rope,
        run_tokens=run_tokens(recipe),
    )


def evaluate_spec(recipe: Recipe, report: PlanReport, *, other_teacher: bool = False) -> EvaluateSpec:
    """Held-out loss and tasks; other_teacher as in EvaluateSpec. Raises UserError where there is no `evaluate`."""
    if recipe.evaluate is None:
        raise UserError(f"the recipe '{recipe.name}' has no section `evaluate`")
    pins = pins_under(report, EVALUATE.name, "section")
    teacher = planned_teacher(report)
    return EvaluateSpec(section=recipe.evaluate, pins=pins, teacher=teacher, other_teacher=other_teacher)


def needle_spec(recipe: Recipe, report: PlanReport, *, other_teacher: bool = False) -> NeedleSpec:
    """Retrieval by generation. other_teacher: as in NeedleSpec. Raises UserError where the recipe has no such stage."""
    if recipe.needle is None:
        raise UserError(f"the recipe '{recipe.name}' has no section `needle`")
    return NeedleSpec(
        section=recipe.needle,
        pins=pins_under(report, NEEDLE.name, "section"),
        teacher=planned_teacher(report),
        other_teacher=other_teacher,
        training_length=recipe.needle.training_length or _longest_context(recipe),
    )


def _longest_context(recipe: Recipe) -> int:
    """The longest context, in tokens, that a training stage of the recipe sees; the needle's own where none trains."""
    contexts = [getattr(recipe, stage).longest_context for stage in recipe.training_stages]
    return max(contexts, default=max(recipe.needle.lengths) if recipe.needle is not None else 1)


def _trusts_tokenizer(report: PlanReport) -> bool:
    return report.teacher is not None and report.teacher.trust_remote_code
