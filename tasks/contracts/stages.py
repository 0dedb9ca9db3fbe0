"""The table of stages: for each its name, its job, its inputs, and the properties that other code depends on.

All lists of stages are derived from this table; docs/contributing.md ("Add a stage") describes the other steps for a
new row. Code that concerns a single stage, such as a page of the report, refers to its row (`NEEDLE.name`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator


@dataclass(frozen=True)
class StageInfo:
    """One row of the table."""

    name: str
    """Used in digests, store keys, recipes and all output."""
    spec: str
    """Name of the class in specs.py that types JobSpec.spec."""
    program: str
    """Module under radlads.tasks.jobs that does the work."""
    does: str
    """A phrase that describes it; the model card prints it for training stages."""
    section: str | None = None
    """Key of the recipe's section that enables the stage; None: other stages imply it."""
    inputs: tuple[str, ...] = ()
    """Names of its inputs, among `student` (the newest model), `data` (a dataset), `mixed_data` (a second dataset, of a
    training stage whose section mixes rows in), `models` (earlier models, by stage), `products` (all products so far).
    Besides, stages that read a teacher which is a GGUF file have the input `teacher`, the product of dequantize."""
    distributed: bool = False
    """Whether its job is started as several ranks, one per device."""
    uses_device: bool = False
    """Whether its job computes on the run's device; others run on the CPU and wait for no GPU."""
    needs_teacher: bool = False
    """Whether its job always runs or reads the teacher, which its digest then names. For other training stages the
    section decides (`runs_teacher` of recipe/training.py)."""
    trains: bool = False
    layerwise: bool = False
    """Trains each mixer separately, inside the teacher: the student as a whole is not run."""
    makes: Literal["student", "teacher"] | None = None
    """The kind of model in its product: a converted student, or a teacher trained from random weights."""
    judges: bool = False
    several: bool = False
    """A run may have several of it, each with the name in its spec."""
    loss: str = "loss"
    """Of a training stage: the quantity of its curve, with the unit."""

    @property
    def matches_logits(self) -> bool:
        """Whether it trains the whole student toward its teacher's logits."""
        return self.trains and self.needs_teacher and not self.layerwise

    @property
    def trains_whole_student(self) -> bool:
        """Whether it trains a converted student as a whole, its MLPs included unless they are frozen."""
        return self.trains and self.makes == "student" and not self.layerwise


PLAN = StageInfo("plan", "PlanSpec", "plan.plan", "checks every option and size, and pins all inputs")
DEQUANTIZE = StageInfo(
    "dequantize",
    "DequantizeSpec",
    "teacher.dequantize",
    "makes a Hugging Face folder of a GGUF teacher",
    needs_teacher=True,
)
TOKENIZE = StageInfo("tokenize", "TokenizeSpec", "data.tokens", "makes one of the recipe's datasets", several=True)
TRANSPLANT = StageInfo(
    "transplant",
    "TransplantSpec",
    "transplant",
    "builds the student from the teacher's weights",
    uses_device=True,
    needs_teacher=True,
    makes="student",
)
PRETRAIN = StageInfo(
    "pretrain",
    "TrainSpec",
    "train.train",
    "next-token cross entropy from random weights",
    section="pretrain",
    inputs=("data",),
    distributed=True,
    uses_device=True,
    trains=True,
    makes="teacher",
    loss="cross entropy, nats a token",
)
ALIGN = StageInfo(
    "align",
    "TrainSpec",
    "train.train",
    "each mixer regressed on the output of the attention that it replaces, on the teacher's own input",
    section="align",
    inputs=("data", "student"),
    distributed=True,
    uses_device=True,
    needs_teacher=True,
    trains=True,
    layerwise=True,
    makes="student",
    loss="distance of attention outputs",
)
CHOOSE = StageInfo(
    "choose",
    "ChooseSpec",
    "choose.choose",
    "restores the softmax attention of the layers that need it most",
    inputs=("data", "student"),
    distributed=True,
    uses_device=True,
    needs_teacher=True,
    makes="student",
)
DISTILL = StageInfo(
    "distill",
    "TrainSpec",
    "train.train",
    "KL(teacher‖student) of the logits",
    section="distill",
    inputs=("data", "student"),
    distributed=True,
    uses_device=True,
    needs_teacher=True,
    trains=True,
    makes="student",
    loss="distillation loss, nats a token",
)
FINETUNE = StageInfo(
    "finetune",
    "TrainSpec",
    "train.train",
    "next-token cross entropy",
    section="finetune",
    inputs=("data", "student"),
    distributed=True,
    uses_device=True,
    trains=True,
    makes="student",
    loss="cross entropy, nats a token",
)
EXTEND = StageInfo(
    "extend",
    "TrainSpec",
    "train.train",
    "next-token cross entropy at longer contexts",
    section="extend",
    inputs=("data", "student"),
    distributed=True,
    uses_device=True,
    trains=True,
    makes="student",
    loss="cross entropy (and KL, where asked for), nats a token",
)
EVALUATE = StageInfo(
    "evaluate",
    "EvaluateSpec",
    "judge.evaluate",
    "held-out loss, KL and benchmark tasks, of the teacher and of every model of the run",
    section="evaluate",
    inputs=("student", "data", "models"),
    distributed=True,
    uses_device=True,
    needs_teacher=True,
    judges=True,
)
NEEDLE = StageInfo(
    "needle",
    "NeedleSpec",
    "judge.needle",
    "retrieval over depth and length, by generation",
    section="needle",
    inputs=("student", "models"),
    distributed=True,
    uses_device=True,
    needs_teacher=True,
    judges=True,
)
PUBLISH = StageInfo(
    "publish",
    "PublishSpec",
    "report.publish",
    "the report, the model card and the exported folder",
    section="publish",
    inputs=("products",),
)

STAGES: dict[str, StageInfo] = {
    stage.name: stage
    for stage in (
        PLAN,
        DEQUANTIZE,
        TOKENIZE,
        TRANSPLANT,
        PRETRAIN,
        ALIGN,
        CHOOSE,
        DISTILL,
        FINETUNE,
        EXTEND,
        EVALUATE,
        NEEDLE,
        PUBLISH,
    )
}
"""Name → row, in the order of a run."""
TRAINING_STAGES = tuple(name for name, stage in STAGES.items() if stage.trains)
"""Pretraining included."""
MODEL_STAGES = tuple(name for name, stage in STAGES.items() if stage.makes is not None)
STUDENT_STAGES = tuple(name for name, stage in STAGES.items() if stage.makes == "student")
JUDGING_STAGES = tuple(name for name, stage in STAGES.items() if stage.judges)
DATA_SECTIONS = tuple(stage.section for stage in STAGES.values() if stage.section and "data" in stage.inputs)
"""Sections of the recipe that name a dataset."""


def stage_info(name: str) -> StageInfo:
    """The row of a stage. Raises ValueError, one line, for an unknown name."""
    if name not in STAGES:
        raise ValueError(f"'{name}' is not a stage; the stages are {', '.join(STAGES)}")
    return STAGES[name]


def logits_reference(students: Iterable[str]) -> str | None:
    """Among the stages that made a run's models, in order: the last one trained on the teacher's logits, if another
    followed it. Later training on text alone can lose abilities, recall first; so this model is evaluated as well."""
    names = list(students)
    matched = [name for name in names if stage_info(name).matches_logits]
    return matched[-1] if matched and names[-1] != matched[-1] else None


def _known(name: str) -> str:
    return stage_info(name).name


def _known_training(name: str) -> str:
    if not stage_info(name).trains:
        raise ValueError(f"'{name}' is not a training stage; those are {', '.join(TRAINING_STAGES)}")
    return name


Stage = Annotated[str, AfterValidator(_known)]
"""The name of a stage."""
TrainingStage = Annotated[str, AfterValidator(_known_training)]
"""The name of a stage that trains."""
