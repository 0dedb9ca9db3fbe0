"""The sections of a recipe: all keys with type, default and meaning.

Sizes are in tokens, batches in sequences; optimizer steps are derived. Published defaults have their source.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from radlads.tasks.contracts.recipe.base import OPERATIONAL, PLACE, AddedLater, Length, Place, Reads, Section, Seed
from radlads.tasks.contracts.recipe.chat_templates import SHIPPED
from radlads.tasks.contracts.recipe.choice import AttentionLayers, Calibration, check_choice, check_layers, choice_data
from radlads.tasks.contracts.recipe.judging.generation import EvalGeneration, EvalSpeed
from radlads.tasks.contracts.recipe.judging.needle import Needle
from radlads.tasks.contracts.recipe.judging.ruler import Ruler, SyntheticTask
from radlads.tasks.contracts.recipe.judging.suite import EvalSuite
from radlads.tasks.contracts.recipe.judging.texts import EvalText
from radlads.tasks.contracts.recipe.losses import (
    Align,
    Comprehensive,
    Distill,
    Extend,
    Finetune,
    Lora,
    Phase,
    Pretrain,
)
from radlads.tasks.contracts.recipe.machines import Resources
from radlads.tasks.contracts.recipe.memory import FrozenBits
from radlads.tasks.contracts.recipe.teacher import Teacher, TransplantScale
from radlads.tasks.contracts.recipe.training import Optimizer, Rate, Schedule, Training
from radlads.tasks.contracts.stages import DATA_SECTIONS, STUDENT_STAGES, TRAINING_STAGES

__all__ = [
    "Align",
    "Comprehensive",
    "Dataset",
    "Distill",
    "EvalSuite",
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
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the variant, validated by the `plan` stage."""
    attention_layers: AttentionLayers = ()
    """Indices (from 0) of the layers that keep softmax attention, or a rule to choose them. Empty: a pure student."""
    attention_rope: bool = False
    """Whether attention layers use rotary positions after align. NoPE extrapolates far better (2601.22156)."""
    attention_log_scale: Annotated[int | None, AddedLater()] = Field(default=None, ge=2)
    """a, where attention layers multiply the scores of a query at position t of its document by log_a(t + a)
    (2601.22156): 1 at its first token, slowly more beyond a tokens. None: not at all. Layers with a window do not."""
    mlp_bits: FrozenBits = 16
    """8: stages that freeze the MLPs (experts included) hold them as int8. The export has the teacher's weights."""
    untie_embeddings: bool = False
    """Give the student a separate head if the teacher ties it to the embeddings; RADLADS reports worse results."""
    transplant: TransplantScale = TransplantScale()
    calibrate: Calibration | None = None

    @model_validator(mode="after")
    def _layers_are_sane(self) -> Self:
        check_layers(self)
        return self


class MixedSource(Section):
    """Settings that all sources share: their part in a mixture."""

    weight: Annotated[float | None, AddedLater()] = Field(default=None, gt=0)
    """Its share of the training tokens, over the sum of all weights. Without weights, sources are read to their ends,
    interleaved by bytes."""
    repeats: Annotated[int, AddedLater()] = Field(default=1, ge=1, le=1000)
    """How often its documents are read, at most, to reach its weight."""

    @property
    def has_chats(self) -> bool:
        """Whether its documents are chats, whose assistant can be trained alone."""
        return False


class DocumentSource(MixedSource):
    """Settings that `hub` and `files` sources share."""

    text_field: str = "text"
    messages_field: str | None = None
    """Chat data: the field with [{role, content}, ...]."""
    chat_template: Annotated[Place | None, Reads("files")] = None
    """The template that renders chats: the name of a shipped one (chatml, llama-3, mistral-v3, mistral-v7, phi-3,
    phi-4, phi-4-mini, qwen2.5, qwen3), or a file ending in .jinja; None: the tokenizer's own. Shipped templates mark
    the assistant's text, so that multi-turn chats can be masked."""
    special_tokens: Literal["text", "parse"] = "text"
    """How the text of a special token (`<|endoftext|>`, `</s>`) in a document or message is encoded: as plain text, or
    (parse) as that token. Tokens of a chat template are always parsed. For files with such a separator between
    documents, set `separator` instead."""
    bad_characters: Literal["error", "replace"] = "error"
    """Handling of invalid UTF-8, lone surrogates and NUL: an error with the line, or replacement by U+FFFD."""

    @property
    def has_chats(self) -> bool:
        return self.messages_field is not None

    @field_validator("chat_template")
    @classmethod
    def _shipped_by_name(cls, value: str | None) -> str | None:
        if value is None or value.endswith(".jinja") or value.startswith(SHIPPED):
            return value
        return f"{SHIPPED}{value}"

    @model_validator(mode="after")
    def _template_is_used(self) -> Self:
        if self.chat_template is not None and self.messages_field is None:
            raise ValueError("chat_template is for chats; set messages_field, the field with the messages")
        return self


class HubSource(DocumentSource):
    """A dataset of the Hugging Face hub."""

    kind: Literal["hub"]
    path: Annotated[Place, Reads("dataset")]
    """A hub id, or a local folder of data files: an absolute path or one that starts with `./`."""
    subset: str | None = None
    split: str = "train"
    revision: Annotated[str | None, PLACE] = None
    """Branch, tag or commit. The plan resolves it to a commit and pins that."""
    max_documents: int | None = Field(default=None, gt=0)


class FilesSource(DocumentSource):
    """Local parquet, jsonl or text files; jsonl and text also compressed (.gz, .xz, .zst)."""

    kind: Literal["files"]
    paths: Annotated[tuple[Place, ...], Reads("files")] = Field(min_length=1)
    """Files or globs; relative to the recipe's folder or the working directory. `demo:NAME` is a file shipped with
    the demo teacher."""
    separator: str | None = Field(default=None, min_length=1)
    """Text files only: the separator between documents, e.g. <|endoftext|>. None: each file is one document."""
    max_documents: int | None = Field(default=None, gt=0)


class SampleSource(MixedSource):
    """Text sampled from the teacher, for use without a corpus."""

    kind: Literal["sample"]
    tokens: int = Field(gt=0)
    context: int = Field(default=1024, gt=1)
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    batch: int = Field(default=64, gt=0)
    """Documents sampled in parallel. The text depends on it, so it is part of the digest."""
    prompts: Annotated[tuple[Place, ...], Reads("files"), AddedLater()] = ()
    """Files (as in `files`) whose documents the teacher continues, in turn; empty: it begins with BOS."""
    prompts_separator: Annotated[str | None, AddedLater()] = Field(default=None, min_length=1)
    prompt_tokens: Annotated[int, AddedLater()] = Field(default=32, gt=0)
    """Tokens of a document's beginning that are given to the teacher."""
    static_cache: Annotated[bool, AddedLater()] = False
    """A cache of full length; on a GPU transformers then compiles the step. Rounding, so the text, differs."""
    seed: Seed = 1337

    @model_validator(mode="after")
    def _prompts_leave_room(self) -> Self:
        if self.prompts and self.prompt_tokens + 2 > self.context:
            raise ValueError("context must exceed prompt_tokens by 2: BOS, and one sampled token")
        return self


class RecallSource(MixedSource):
    """Synthetic recall text: a haystack with facts, then questions about them, or tasks of RULER with their answers."""

    kind: Literal["recall"]
    documents: int = Field(gt=0, le=10**9)
    lengths: tuple[Length, ...] = Field(default=(256, 512, 1024), min_length=1)
    """Document lengths in tokens, used in turn. Facts in a haystack are up to that far from their questions."""
    facts: Annotated[int | None, AddedLater()] = Field(default=None, gt=0, le=500)
    """Maximum number of facts per document, and at most one per 28 tokens. None: 8 in a haystack, 10 without one."""
    haystack: Annotated[tuple[Place, ...], Reads("files")] = ()
    """Files (as in `files`) with the filler sentences; empty: the built-in filler."""
    haystack_separator: str | None = None
    seed: Seed = 1337
    ruler: Annotated[tuple[SyntheticTask, ...], AddedLater()] = ()
    """Tasks of RULER: a document is a prompt with its answer, of each task in turn. It shares no key, value, variable
    or word with what `needle.ruler` asks. Empty: facts."""
    chat: Annotated[bool, AddedLater()] = False
    """Prompts of `ruler` are the user's message and answers the assistant's, in the tokenizer's chat template, so that
    `assistant_only` trains the answers alone."""

    @property
    def has_chats(self) -> bool:
        return self.chat

    @model_validator(mode="after")
    def _options_belong_together(self) -> Self:
        if self.chat and not self.ruler:
            raise ValueError("chat is for tasks of RULER; name them in ruler, or leave chat out")
        if self.facts is not None and self.ruler:
            raise ValueError("facts is for documents of facts; leave it out beside ruler, or use two sources")
        return self


Source = Annotated[HubSource | FilesSource | SampleSource | RecallSource, Field(discriminator="kind")]


class Dataset(Section):
    """Documents → one flat token stream with document boundaries, in shards of equal length."""

    sources: tuple[Source, ...] = Field(min_length=1)
    heldout_fraction: float = Field(default=0.02, gt=0, lt=0.5)
    """Fraction of the documents, selected by a hash of their text, that no training stage reads."""
    shard_tokens: int = Field(default=1 << 22, gt=0)
    max_tokens: int | None = Field(default=None, gt=0)
    add_bos: bool = False
    """Prepend the tokenizer's BOS token to each document that does not start with it."""
    seed: Seed = 1337
    """Seed of the document order."""

    @model_validator(mode="after")
    def _all_have_weights_or_none(self) -> Self:
        without = [str(index) for index, source in enumerate(self.sources) if source.weight is None]
        if without and len(without) < len(self.sources):
            raise ValueError(f"give all sources a weight, or none; without one: {', '.join(without)} (from 0)")
        if without and any(source.repeats > 1 for source in self.sources):
            raise ValueError("repeats is for mixtures; give every source a weight")
        return self

    @property
    def shares(self) -> tuple[float, ...] | None:
        """Share of each source in the training tokens; None without weights."""
        weights = [source.weight for source in self.sources if source.weight is not None]
        return tuple(weight / sum(weights) for weight in weights) or None


class EvalTask(Section):
    """One lm-evaluation-harness task."""

    name: str
    path: Annotated[Place | None, Reads("task")] = None
    """Folder with the task's YAML file, for tasks that the harness does not ship and for offline use."""
    num_fewshot: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, gt=0)


class Evaluate(Section):
    """Evaluation of teacher and student in one run."""

    data: str = "train"
    heldout_tokens: int = Field(default=65536, gt=0)
    context: int = Field(default=512, gt=1)
    batch: Annotated[int | None, OPERATIONAL] = Field(default=None, gt=0)
    """Rows at once; None: as many as fit, by their length."""
    tasks: tuple[EvalTask, ...] = ()
    texts: Annotated[tuple[EvalText, ...], AddedLater()] = ()
    """Texts beside the held-out ones, scored as a whole."""
    suite: Annotated[EvalSuite | None, AddedLater()] = None
    generation: Annotated[EvalGeneration | None, AddedLater()] = None
    speed: Annotated[EvalSpeed | None, AddedLater()] = None
    add_bos: bool | None = None
    """Prepend BOS to task prompts, as `add_bos_token` of the harness's `hf` model. None: the tokenizer's default, which
    published scores use."""
    seed: Seed = 1234

    @model_validator(mode="after")
    def _tasks_have_one_name(self) -> Self:
        twice = {task.name for task in self.tasks} & set(self.suite.tasks if self.suite is not None else ())
        if twice:
            raise ValueError(f"{', '.join(sorted(twice))}: in `tasks` and in `suite`; leave it out of one of them")
        names = [text.name for text in self.texts]
        if len(set(names)) < len(names):
            raise ValueError("texts has a name twice")
        return self

    @property
    def longest(self) -> int:
        """The longest row, in tokens, without those of harness tasks."""
        texts = (text.context for text in self.texts)
        return max(self.context, 0 if self.generation is None else self.generation.longest_row, *texts)

    @property
    def all_tasks(self) -> tuple[EvalTask, ...]:
        """Those of the suite too, without their files."""
        if self.suite is None:
            return self.tasks
        shots, limit = self.suite.num_fewshot, self.suite.limit
        return *self.tasks, *(EvalTask(name=n, num_fewshot=shots.get(n), limit=limit) for n in self.suite.tasks)


class Publish(Section):
    """The report, the model card and the exported folder."""

    title: str | None = None
    license: str | None = None
    max_shard_bytes: int = Field(default=4_000_000_000, gt=0)


DatasetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]


class Recipe(Section):
    """A conversion, or the training of a small teacher, with its data and evaluation."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)
    description: str = ""
    sources: tuple[str, ...] = ()
    """Sources of the numbers (paper, section, model card) and deviations from them."""
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
