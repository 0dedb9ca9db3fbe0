"""The spec of each stage, from a recipe and its plan; the same with and without an orchestrator."""

from __future__ import annotations

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.pins.pins import with_commits
from radlads.tasks.contracts.recipe.choice import late_choice, run_tokens
from radlads.tasks.contracts.recipe.memory import mlp_bits, teacher_bits
from radlads.tasks.contracts.recipe.recipe import Recipe, SampleSource, Training
from radlads.tasks.contracts.recipe.training import runs_teacher
from radlads.tasks.contracts.specs import (
    ChooseSpec,
    DequantizeSpec,
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
    """The teacher as the plan pinned it. Raises UserError for a recipe that trains a teacher."""
    if report.teacher is None:
        raise UserError("this recipe makes a teacher (`pretrain`) and converts none; run it with radlads-pretrain")
    return report.teacher


def pins_under(report: PlanReport, section: str, field: str) -> dict[str, Pin]:
    """The pins of a section of the recipe, keyed by location in a spec whose field `field` is that section."""
    return {
        f"{field}.{location.removeprefix(f'{section}.')}": pin
        for location, pin in report.pins.items()
        if location.startswith(f"{section}.")
    }


def dequantize_spec(report: PlanReport) -> DequantizeSpec | None:
    """The folder that is made of a GGUF teacher; None for any other."""
    return None if report.gguf is None else DequantizeSpec(teacher=planned_teacher(report))


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
    """The student to build: with the attention layers of the plan, or with none if they are chosen after align."""
    student = recipe.student
    # Layers named in the recipe are kept as written. How MLPs are frozen during training, and how align initialises, do
    # not affect the transplant and stay out of its digest.
    layers = student.attention_layers if isinstance(student.attention_layers, tuple) else report.attention_layers
    student = student.model_copy(update={"attention_layers": layers, "mlp_bits": 16, "calibrate": None})
    return TransplantSpec(teacher=planned_teacher(report), student=student)


def train_spec(recipe: Recipe, report: PlanReport, stage: str) -> TrainSpec:
    """A training stage. Raises UserError if the recipe does not have it."""
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
            # A stage without a teacher has none in its digest, so that its product does not depend on an unused
            # teacher.
            "teacher": planned_teacher(report) if runs_teacher(stage, section) else None,
            "teacher_bits": teacher_bits(recipe, stage),
            "mlp_bits": mlp_bits(recipe, stage),
            "calibrate": recipe.student.calibrate if info.layerwise else None,
        }
    )


def choose_spec(recipe: Recipe, report: PlanReport) -> ChooseSpec | None:
    """The choice of attention layers after align; None if the recipe chooses none then."""
    choice, requested = report.choice, late_choice(recipe)
    if choice is None or requested is None:
        return None
    # The plan reduced the probe to its budget if necessary; its micro_batch may have changed since then.
    probe = choice.recall.model_copy(update={"micro_batch": requested.recall.micro_batch})
    return ChooseSpec(
        section=choice.model_copy(update={"recall": probe}),
        pins=pins_under(report, "student.attention_layers", "section"),
        teacher=planned_teacher(report),
        attention_rope=recipe.student.attention_rope,
        run_tokens=run_tokens(recipe),
    )


def evaluate_spec(recipe: Recipe, report: PlanReport, *, other_teacher: bool = False) -> EvaluateSpec:
    """Held-out loss and tasks; other_teacher as in EvaluateSpec. Raises UserError if there is no `evaluate`."""
    if recipe.evaluate is None:
        raise UserError(f"the recipe '{recipe.name}' has no section `evaluate`")
    pins = pins_under(report, EVALUATE.name, "section")
    teacher = planned_teacher(report)
    return EvaluateSpec(section=recipe.evaluate, pins=pins, teacher=teacher, other_teacher=other_teacher)


def needle_spec(recipe: Recipe, report: PlanReport, *, other_teacher: bool = False) -> NeedleSpec:
    """Retrieval by generation. other_teacher: as in NeedleSpec. Raises UserError if the recipe has no such stage."""
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
    """The longest context, in tokens, of the recipe's training stages; the needle's own if there are none."""
    contexts = [getattr(recipe, stage).longest_context for stage in recipe.training_stages]
    return max(contexts, default=max(recipe.needle.lengths) if recipe.needle is not None else 1)


def _trusts_tokenizer(report: PlanReport) -> bool:
    return report.teacher is not None and report.teacher.trust_remote_code
