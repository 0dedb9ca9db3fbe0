"""The sections of a recipe: all keys with type, default and meaning.

Sizes are in tokens, batches in sequences; optimizer steps are derived. Published defaults have their source.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from radlads.tasks.contracts.recipe.base import OPERATIONAL, AddedLater, Section
from radlads.tasks.contracts.recipe.choice import AttentionLayers, check_choice, check_layers, choice_data
from radlads.tasks.contracts.recipe.data.sources import (
    Dataset,
    DocumentSource,
    FilesSource,
    HubSource,
    MixedSource,
    RecallSource,
    SampleSource,
    Source,
)
from radlads.tasks.contracts.recipe.judging.evaluate import EvalTask, Evaluate
from radlads.tasks.contracts.recipe.judging.needle import Needle
from radlads.tasks.contracts.recipe.judging.ruler import Ruler
from radlads.tasks.contracts.recipe.judging.suite import EvalSuite
from radlads.tasks.contracts.recipe.loss_terms import Comprehensive, Lora
from radlads.tasks.contracts.recipe.losses import Align, Distill, Extend, Finetune, Phase, Pretrain
from radlads.tasks.contracts.recipe.machines import Resources
from radlads.tasks.contracts.recipe.memory import FrozenBits
from radlads.tasks.contracts.recipe.teacher import Calibration, Teacher, TransplantScale
from radlads.tasks.contracts.recipe.training import Optimizer, Rate, Schedule, Training
from radlads.tasks.contracts.stages import DATA_SECTIONS, STUDENT_STAGES, TRAINING_STAGES

__all__ = [
    "Align",
    "Comprehensive",
    "Dataset",
    "Distill",
    "DocumentSource",
    "EvalSuite",
    "EvalTask",
    "Evaluate",
    "Extend",
    "FilesSource",
    "Finetune",
    "HubSource",
    "Lora",
    "MixedSource",
    "Needle",
    "Optimizer",
    "Phase",
    "Pretrain",
    "Publish",
    "Rate",
    "RecallSource",
    "Recipe",
    "Resources",
    "Ruler",
    "SampleSource",
    "Schedule",
    "Source",
    "Student",
    "Teacher",
    "Training",
]


class Student(Section):
    """The converted model."""

    variant: str = "rad_rwkv7"
    """The mixer that replaces attention: a file of model/mixers. Source: RADLADS (2505.03005)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the variant, validated by the `plan` stage."""
    attention_layers: AttentionLayers = ()
    """Indices (from 0) of the layers that keep softmax attention, or a rule to choose them. Empty: a pure student."""
    attention_rope: bool = False
    """Whether attention layers use rotary positions after align. Without them they read contexts far beyond those of
    training. Source: HALO (2601.22156)."""
    attention_log_scale: Annotated[int | None, AddedLater()] = Field(default=None, ge=2)
    """a, where attention layers multiply the scores of a query at position t of its document by log_a(t + a): 1 at its
    first token, slowly more beyond a tokens. null: not at all. Layers with a window do not. Source: HALO (2601.22156)
    has it."""
    mlp_bits: FrozenBits = 16
    """8: stages that freeze the MLPs (experts included) hold them as int8. The export has the teacher's weights.
    Source: 8 in the hxa079 run."""
    untie_embeddings: bool = False
    """Give the student a separate head if the teacher ties it to the embeddings; worse results are reported. Source:
    RADLADS (2505.03005)."""
    transplant: TransplantScale = TransplantScale()
    """Multipliers of the projections that are copied."""
    calibrate: Calibration | None = None
    """Fit a few parameters of each mixer to the teacher's activations before align; null: not at all."""

    @model_validator(mode="after")
    def _layers_are_sane(self) -> Self:
        check_layers(self)
        return self


class Publish(Section):
    """The report, the model card and the exported folder."""

    title: str | None = None
    """Of the report and the model card; null: the names of recipe and run."""
    license: str | None = None
    """Of the student, in its card; `radlads export --public` needs one."""
    max_shard_bytes: int = Field(default=4_000_000_000, gt=0)
    """Largest file of the exported weights."""


DatasetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]


class Recipe(Section):
    """A conversion, or the training of a small teacher, with its data and evaluation."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)
    """Of the recipe, in lower case: MLflow's experiment, and the beginning of the names of runs."""
    description: str = ""
    """A sentence or two for lists of recipes, the report and the model card."""
    sources: tuple[str, ...] = ()
    """Sources of the numbers (paper, section, model card) and deviations from them."""
    teacher: Teacher | None = None
    """The model to convert; not beside `pretrain`."""
    student: Student = Student()
    """What it becomes."""
    data: dict[DatasetName, Dataset] = Field(min_length=1)
    """Datasets by a name of your own, which stages refer to."""
    pretrain: Pretrain | None = None
    """Train a small teacher instead of converting one."""
    align: Align | None = None
    """Stage 1. A stage whose section is missing does not run."""
    distill: Distill | None = None
    """Stage 2."""
    finetune: Finetune | None = None
    """Stage 3."""
    extend: Annotated[Extend | None, AddedLater()] = None
    """Stage 4: longer contexts."""
    evaluate: Evaluate | None = None
    """Scores of teacher and student."""
    needle: Needle | None = None
    """Retrieval by generation, and RULER."""
    publish: Publish = Publish()
    """Of the report and the model card, which are always made."""
    resources: Annotated[Resources, OPERATIONAL] = Resources()
    """Machines and how they are used."""

    @model_validator(mode="after")
    def _datasets_exist(self) -> Self:
        if (self.teacher is None) == (self.pretrain is None):
            raise ValueError("give exactly one of `teacher` (to convert it) and `pretrain` (to train one)")
        for name in DATA_SECTIONS:
            section = getattr(self, name)
            if section is not None and section.data not in self.data:
                raise ValueError(f"{name}.data is '{section.data}', but `data` has {_or_list(self.data)}")
            mixed = section.mixed if isinstance(section, Training) else None
            if mixed is not None and mixed.data not in self.data:
                raise ValueError(f"{name} mixes in rows of '{mixed.data}', but `data` has {_or_list(self.data)}")
            if mixed is not None and mixed.data == section.data:
                raise ValueError(f"{name} mixes rows of '{mixed.data}' into itself; name another dataset")
        check_choice(self)
        return self

    @property
    def training_stages(self) -> tuple[str, ...]:
        """The stages of this recipe that train a student, in order."""
        return tuple(s for s in STUDENT_STAGES if s in TRAINING_STAGES and getattr(self, s) is not None)

    @property
    def datasets_used(self) -> tuple[str, ...]:
        """Names of the datasets that some stage reads, in the order of `data`."""
        sections = [section for name in DATA_SECTIONS if (section := getattr(self, name)) is not None]
        used = {section.data for section in sections} | {choice_data(self)}
        used |= {name for section in sections if isinstance(section, Training) for name in section.datasets.values()}
        return tuple(name for name in self.data if name in used)


def _or_list(names: Mapping[str, Any]) -> str:
    return " and ".join(f"'{name}'" for name in names)
