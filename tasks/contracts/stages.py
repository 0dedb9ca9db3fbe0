"""The one table of stages: what each is called, what its job is, what it reads, and what the rest must know of it.

Whatever lists stages asks this table; docs/contributing.md ("Add a stage") says what a new row takes besides. Products
and code meet here too: code that is about one stage, a page of the report for one, names its row (`NEEDLE.name`).
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
    """In digests, store keys, the recipe and everything that people read."""
    spec: str
    """Name of the class in specs.py that types JobSpec.spec."""
    program: str
    """Module under radlads.tasks.jobs that does the work."""
    does: str
    """What it does, in a phrase; the model card prints it for the stages that train."""
    section: str | None = None
    """Key of the recipe that asks for the stage; None: it follows from others."""
    inputs: tuple[str, ...] = ()
    """Names of the inputs that it reads of: `student` (the newest model), `data` (a dataset; `mixed_data` is
    another one, of a training stage whose section mixes rows in), `models` (the ones before
    the newest, by stage), `products` (everything so far)."""
    distributed: bool = False
    """Whether its job is started as several ranks, one a device."""
    uses_device: bool = False
    """Whether its job computes on the run's device; the others stay on the CPU and wait for no GPU."""
    needs_teacher: bool = False
    """Whether its job always runs or reads the teacher, which its digest then names. A training stage that need not may
    be asked to by its section (`runs_teacher` of recipe/training.py)."""
    trains: bool = False
    layerwise: bool = False
    """Trains each mixer by itself, inside the teacher: the student as a whole is not run."""
    makes: Literal["student", "teacher"] | None = None
    """The model in its product: a converted student, or a teacher from nothing."""
    judges: bool = False
    several: bool = False
    """A run may have several, each under the name that its spec has."""
    loss: str = "loss"
    """Of a training stage: what its curve shows, with the unit."""

    @property
    def matches_logits(self) -> bool:
        """Whether it trains the whole student toward its teacher's logits."""
        return self.trains and self.needs_teacher and not self.layerwise

    @property
    def trains_whole_student(self) -> bool:
        """Whether it trains a converted student as a whole, its MLPs included unless they are frozen."""
        return self.trains and self.makes == "student" and not self.layerwise


PLAN = StageInfo("plan", "PlanSpec", "plan.plan", "checks every option and size, and pins what is read")
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
"""Name → row, in the order in which a run goes through them."""
TRAINING_STAGES = tuple(name for name, stage in STAGES.items() if stage.trains)
"""Pretraining included."""
MODEL_STAGES = tuple(name for name, stage in STAGES.items() if stage.makes is not None)
STUDENT_STAGES = tuple(name for name, stage in STAGES.items() if stage.makes == "student")
JUDGING_STAGES = tuple(name for name, stage in STAGES.items() if stage.judges)
DATA_SECTIONS = tuple(stage.section for stage in STAGES.values() if stage.section and "data" in stage.inputs)
"""Sections of the recipe that name a dataset."""


def stage_info(name: str) -> StageInfo:
    """The row of a stage. Raises ValueError, one line, for a name that is none."""
    if name not in STAGES:
        raise ValueError(f"'{name}' is no stage; the stages are {', '.join(STAGES)}")
    return STAGES[name]


def logits_reference(students: Iterable[str]) -> str | None:
    """Of the stages that made a run's models, in order: the last that matched the teacher's logits, where another came
    after it. Training on text alone can lose what it had kept, recall before all; so it is judged as well."""
    names = list(students)
    matched = [name for name in names if stage_info(name).matches_logits]
    return matched[-1] if matched and names[-1] != matched[-1] else None


def _known(name: str) -> str:
    return stage_info(name).name


def _known_training(name: str) -> str:
    if not stage_info(name).trains:
        raise ValueError(f"'{name}' is no training stage; those are {', '.join(TRAINING_STAGES)}")
    return name


Stage = Annotated[str, AfterValidator(_known)]
"""The name of a stage."""
TrainingStage = Annotated[str, AfterValidator(_known_training)]
"""The name of a stage that trains."""
