"""The sections of a recipe: every key a user may write, its type, its default and what it means.

Sizes are in tokens, batches in sequences; optimizer steps are derived. Where a default is a published number, the
source is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from radlads.tasks.contracts.recipe.base import OPERATIONAL, PLACE, AddedLater, Length, Place, Reads, Section, Seed
from radlads.tasks.contracts.recipe.chat_templates import SHIPPED
from radlads.tasks.contracts.recipe.choice import AttentionLayers, Calibration, check_choice, choice_data, listed_layers
from radlads.tasks.contracts.recipe.losses import (
    Align,
    CeSpikes,
    Comprehensive,
    Distill,
    Extend,
    Finetune,
    Lora,
    Phase,
    Pretrain,
)
from radlads.tasks.contracts.recipe.memory import FrozenBits
from radlads.tasks.contracts.recipe.training import Optimizer, Rate, Schedule, Training
from radlads.tasks.contracts.recipe.transplant import TransplantScale
from radlads.tasks.contracts.stages import DATA_SECTIONS, STUDENT_STAGES, TRAINING_STAGES

__all__ = [
    "Align",
    "CeSpikes",
    "Comprehensive",
    "Dataset",
    "Distill",
    "EvalTask",
    "Evaluate",
    "Extend",
    "FilesSource",
    "Finetune",
    "HubSource",
    "Lora",
    "Needle",
    "Optimizer",
    "Phase",
    "Pretrain",
    "Publish",
    "Rate",
    "RecallSource",
    "Recipe",
    "Resources",
    "SampleSource",
    "Schedule",
    "Section",
    "Source",
    "Student",
    "Teacher",
    "Training",
    "TransplantScale",
]


class Teacher(Section):
    """The frozen softmax-attention model."""

    path: Annotated[Place, Reads("teacher")]
    """A hub id, a local Hugging Face folder, or `demo` for the teacher shipped with the package."""
    revision: Annotated[str | None, PLACE] = None
    """Of the hub: a branch, a tag or a commit. The plan pins the commit that it is."""
    trust_remote_code: bool = False
    """Run the tokenizer's own code; of a hub id only with its commit as `revision`. A model's own code never runs: its
    family's class in transformers does."""
    bits: FrozenBits = 16
    """8: the matrices of its layers are held in 8 bit while it teaches. Judged is always the teacher as it is."""


class Student(Section):
    """The converted model."""

    variant: str = "rad_rwkv7"
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the variant; validated by the `plan` stage, which knows them."""
    attention_layers: AttentionLayers = ()
    """Layers, counted from 0, that stay softmax attention; or how many, and how to choose them. Empty: a pure recurrent
    student."""
    attention_rope: bool = False
    """Whether kept softmax layers use rotary positions after align. NoPE extrapolates far better (2601.22156)."""
    mlp_bits: FrozenBits = 16
    """8: stages that freeze the MLPs (experts included) hold them in 8 bit. The export stays the teacher's own."""
    untie_embeddings: bool = False
    """Give the student a head of its own where the teacher's is its embeddings; RADLADS found that to end badly."""
    transplant: TransplantScale = TransplantScale()
    calibrate: Calibration | None = None

    @model_validator(mode="after")
    def _layers_are_sane(self) -> Self:
        layers = listed_layers(self)
        if any(layer < 0 for layer in layers):
            raise ValueError(
                "attention_layers are counted from 0 and cannot be negative; leave it empty for a pure student"
            )
        if len(set(layers)) != len(layers):
            raise ValueError("attention_layers names a layer twice")
        return self


class DocumentSource(Section):
    """What sources of documents that somebody else wrote have in common."""

    text_field: str = "text"
    messages_field: str | None = None
    """Chat data: the field that holds [{role, content}, ...]."""
    chat_template: Annotated[Place | None, Reads("files")] = None
    """What chats are rendered with: the name of a shipped template (chatml, llama-3, mistral-v3, mistral-v7, phi-3,
    phi-4, phi-4-mini, qwen2.5, qwen3), or a file ending with .jinja; None: the tokenizer's own. Shipped ones mark the
    assistant's words, so that chats of several turns can be masked."""
    special_tokens: Literal["text", "parse"] = "text"
    """What the text of a special token (`<|endoftext|>`, `</s>`) inside a document or a message is: text, or (parse)
    that token. What a chat template itself writes is always parsed. A file whose documents are separated by it wants
    `separator` instead."""
    bad_characters: Literal["error", "replace"] = "error"
    """Bytes that are not UTF-8, lone surrogates and NUL: an error with the line, or U+FFFD in their place, counted."""

    @field_validator("chat_template")
    @classmethod
    def _shipped_by_name(cls, value: str | None) -> str | None:
        if value is None or value.endswith(".jinja") or value.startswith(SHIPPED):
            return value
        return f"{SHIPPED}{value}"

    @model_validator(mode="after")
    def _template_is_used(self) -> Self:
        if self.chat_template is not None and self.messages_field is None:
            raise ValueError("chat_template is for chats; give messages_field, the field that holds them")
        return self


class HubSource(DocumentSource):
    """A dataset of the Hugging Face hub."""

    kind: Literal["hub"]
    path: Annotated[Place, Reads("dataset")]
    """A hub id, or a local folder of data files: an absolute path, or one that begins with `./`."""
    subset: str | None = None
    split: str = "train"
    revision: Annotated[str | None, PLACE] = None
    """A branch, a tag or a commit. The plan pins the commit that it is."""
    max_documents: int | None = Field(default=None, gt=0)


class FilesSource(DocumentSource):
    """Local parquet, jsonl, or text files, plain or gzipped (.gz)."""

    kind: Literal["files"]
    paths: Annotated[tuple[Place, ...], Reads("files")] = Field(min_length=1)
    """Files or globs; relative to the recipe's folder or the working directory. `demo:NAME` is a file shipped with
    the demo teacher."""
    separator: str | None = Field(default=None, min_length=1)
    """Text files only: what separates documents, e.g. <|endoftext|>; it is no part of them. None: every file is one
    document."""
    max_documents: int | None = Field(default=None, gt=0)


class SampleSource(Section):
    """Text sampled from the teacher itself, for when no corpus is at hand."""

    kind: Literal["sample"]
    tokens: int = Field(gt=0)
    context: int = Field(default=1024, gt=1)
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    batch: int = Field(default=64, gt=0)
    """Documents that are written at once. The text depends on it, so it is not taken from the machine."""
    seed: Seed = 1337


class RecallSource(Section):
    """Synthetic needle documents: a haystack with facts to remember, then questions about them."""

    kind: Literal["recall"]
    documents: int = Field(gt=0, le=10**9)
    lengths: tuple[Length, ...] = Field(default=(256, 512, 1024), min_length=1)
    """Document lengths in tokens, each as often as the others; facts in a haystack lie up to that far from their
    questions."""
    facts: Annotated[int | None, AddedLater()] = Field(default=None, gt=0, le=500)
    """Facts of a document, at most, and one for every 28 tokens. None: 8 in a haystack, 10 without one."""
    haystack: Annotated[tuple[Place, ...], Reads("files")] = ()
    """Files (as in `files`) that the filler sentences come from; empty: the built-in filler."""
    haystack_separator: str | None = None
    seed: Seed = 1337


Source = Annotated[HubSource | FilesSource | SampleSource | RecallSource, Field(discriminator="kind")]


class Dataset(Section):
    """Documents → one flat stream of tokens with boundaries, cut into shards of equal width."""

    sources: tuple[Source, ...] = Field(min_length=1)
    heldout_fraction: float = Field(default=0.02, gt=0, lt=0.5)
    """Share of the documents, chosen by a hash of their text, that no training stage sees."""
    shard_tokens: int = Field(default=1 << 22, gt=0)
    max_tokens: int | None = Field(default=None, gt=0)
    add_bos: bool = False
    """Put the tokenizer's BOS token before every document that does not begin with it; a chat whose template writes one
    keeps that one."""
    seed: Seed = 1337
    """Order of the documents."""


class EvalTask(Section):
    """One lm-evaluation-harness task."""

    name: str
    path: Annotated[Place | None, Reads("task")] = None
    """Folder with the task's YAML file, for tasks that the harness does not ship or that must run offline."""
    num_fewshot: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, gt=0)


class Evaluate(Section):
    """Teacher beside student in one run."""

    data: str = "train"
    heldout_tokens: int = Field(default=65536, gt=0)
    context: int = Field(default=512, gt=1)
    batch: Annotated[int, OPERATIONAL] = Field(default=8, gt=0)
    tasks: tuple[EvalTask, ...] = ()
    add_bos: bool | None = None
    """Of the tasks' prompts, as `add_bos_token` of the harness's `hf` model. None, as published scores are made: what
    the tokenizer does by itself."""
    seed: Seed = 1234


class Needle(Section):
    """Needle in a haystack: a fact at a depth of a text, asked for at its end; the answer is generated and matched."""

    lengths: tuple[Length, ...] = Field(default=(256, 512, 1024), min_length=1)
    """Prompt lengths in tokens, the question included."""
    depths: tuple[float, ...] = Field(default=(0.0, 0.25, 0.5, 0.75, 1.0), min_length=1)
    trials: int = Field(default=5, ge=5)
    batch: Annotated[int, OPERATIONAL] = Field(default=8, gt=0)
    max_new_tokens: int = Field(default=16, gt=0)
    training_length: int | None = Field(default=None, gt=0)
    """Drawn as a dashed line; None: the longest context of the training stages."""
    haystack: Annotated[tuple[Place, ...], Reads("files")] = ()
    haystack_separator: str | None = None
    chat_template: bool = False
    """Ask in a user's message, rendered with the tokenizer's own chat template, which comes on top of the length."""
    add_bos: bool | None = None
    """Of the prompts. None: what the tokenizer does by itself."""
    seed: Seed = 1234


class Publish(Section):
    """The report, the model card and the exported folder."""

    title: str | None = None
    license: str | None = None
    max_shard_bytes: int = Field(default=4_000_000_000, gt=0)


class Resources(Section):
    """Where jobs run. Not part of any digest: the same recipe on more GPUs is the same run."""

    launcher: Literal["local"] = "local"
    """What starts the jobs. local: processes of this machine."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    processes: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = "auto"
    """Processes of a DeepSpeed job; auto: one a GPU, one on a CPU."""
    zero_stage: Literal[0, 1, 2] = 1
    threads: int | None = Field(default=None, gt=0, le=4096)
    """CPU threads of one process; None: the machine's cores shared among them."""
    offload_optimizer: bool = False
    """Keep fp32 masters and Adam's moments in host memory, and step there. Slower; frees 12 bytes a trained number."""
    gpu_memory_gib: float | None = Field(default=None, gt=0)
    """Memory of one GPU, for a plan that is made where there is none; None: asked of the GPU."""
    dollars_per_gpu_hour: float | None = Field(default=None, ge=0)
    """For the plan's and the report's cost."""


DatasetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]


class Recipe(Section):
    """One experiment worth naming."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)
    description: str = ""
    sources: tuple[str, ...] = ()
    """Where the numbers come from: paper, section, model card; and what deviates from it."""
    teacher: Teacher | None = None
    student: Student = Student()
    data: dict[DatasetName, Dataset] = Field(min_length=1)
    pretrain: Pretrain | None = None
    align: Align | None = None
    distill: Distill | None = None
    finetune: Finetune | None = None
    extend: Annotated[Extend | None, AddedLater()] = None
    evaluate: Evaluate | None = None
    needle: Needle | None = None
    publish: Publish = Publish()
    resources: Annotated[Resources, OPERATIONAL] = Resources()

    @model_validator(mode="after")
    def _datasets_exist(self) -> Self:
        if (self.teacher is None) == (self.pretrain is None):
            raise ValueError("give `teacher` (to convert one) or `pretrain` (to make one), not both and not neither")
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
