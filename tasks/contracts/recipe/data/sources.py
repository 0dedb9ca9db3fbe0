"""Datasets of a recipe: what documents they are made of."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from radlads.tasks.contracts.recipe.base import PLACE, AddedLater, Length, Place, Reads, Section, Seed
from radlads.tasks.contracts.recipe.data.chat_templates import SHIPPED
from radlads.tasks.contracts.recipe.judging.ruler import SyntheticTask


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
    """The field with a document's text, in parquet and JSON lines."""
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
    """The kind of source."""
    path: Annotated[Place, Reads("dataset")]
    """A hub id, or a local folder of data files: an absolute path or one that starts with `./`."""
    subset: str | None = None
    """The dataset's configuration on the hub; null: its default."""
    split: str = "train"
    """The dataset's split on the hub."""
    revision: Annotated[str | None, PLACE] = None
    """Branch, tag or commit. The plan resolves it to a commit and pins that."""
    max_documents: int | None = Field(default=None, gt=0)
    """Read only so many, from the beginning; null: all."""


class FilesSource(DocumentSource):
    """Local parquet, jsonl or text files; jsonl and text also compressed (.gz, .xz, .zst)."""

    kind: Literal["files"]
    """The kind of source."""
    paths: Annotated[tuple[Place, ...], Reads("files")] = Field(min_length=1)
    """Files or globs; relative to the recipe's folder or the working directory. `demo:NAME` is a file shipped with
    the demo teacher."""
    separator: str | None = Field(default=None, min_length=1)
    """Text files only: the separator between documents, e.g. <|endoftext|>. None: each file is one document."""
    max_documents: int | None = Field(default=None, gt=0)
    """Read only so many, from the beginning; null: all."""


class SampleSource(MixedSource):
    """Text sampled from the teacher, for use without a corpus."""

    kind: Literal["sample"]
    """The kind of source."""
    tokens: int = Field(gt=0)
    """Sampled in all."""
    context: int = Field(default=1024, gt=1)
    """Length of a sample, its prompt included, in tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling; 1: the teacher's own distribution."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus of sampling; 1: the whole distribution."""
    batch: int = Field(default=64, gt=0)
    """Documents sampled in parallel. The text depends on it, so it is part of the digest."""
    prompts: Annotated[tuple[Place, ...], Reads("files"), AddedLater()] = ()
    """Files (as in `files`) whose documents the teacher continues, in turn; empty: it begins with BOS."""
    prompts_separator: Annotated[str | None, AddedLater()] = Field(default=None, min_length=1)
    """As `separator` of `files`, for the prompts."""
    prompt_tokens: Annotated[int, AddedLater()] = Field(default=32, gt=0)
    """Tokens of a document's beginning that are given to the teacher."""
    static_cache: Annotated[bool, AddedLater()] = False
    """A cache of full length; on a GPU transformers then compiles the step. Rounding, so the text, differs."""
    seed: Seed = 1337
    """Of sampling."""

    @model_validator(mode="after")
    def _prompts_leave_room(self) -> Self:
        if self.prompts and self.prompt_tokens + 2 > self.context:
            raise ValueError("context must exceed prompt_tokens by 2: BOS, and one sampled token")
        return self


class RecallSource(MixedSource):
    """Synthetic recall text: a haystack with facts, then questions about them, or tasks of RULER with their answers."""

    kind: Literal["recall"]
    """The kind of source."""
    documents: int = Field(gt=0, le=10**9)
    """How many are written."""
    lengths: tuple[Length, ...] = Field(default=(256, 512, 1024), min_length=1)
    """Document lengths in tokens, used in turn. Facts in a haystack are up to that far from their questions."""
    facts: Annotated[int | None, AddedLater()] = Field(default=None, gt=0, le=500)
    """Maximum number of facts per document, and at most one per 28 tokens. None: 8 in a haystack, 10 without one."""
    haystack: Annotated[tuple[Place, ...], Reads("files")] = ()
    """Files (as in `files`) with the filler sentences; empty: the built-in filler."""
    haystack_separator: str | None = None
    """As `separator` of `files`, for the haystack."""
    seed: Seed = 1337
    """Of facts, prompts and their order."""
    ruler: Annotated[tuple[SyntheticTask, ...], AddedLater()] = ()
    """Tasks of RULER: a document is a prompt with its answer, of each task in turn. It shares no key, value, variable
    or word with what `needle.ruler` asks. Empty: facts. Source: 2404.06654."""
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
    """What it is made of; see the kinds below."""
    heldout_fraction: float = Field(default=0.02, gt=0, lt=0.5)
    """Fraction of the documents, selected by a hash of their text, that no training stage reads."""
    shard_tokens: int = Field(default=1 << 22, gt=0)
    """Tokens of a file of the product."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Stop after so many training tokens; null: read all sources to their ends. A mixture by weight needs no more than
    its shares."""
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
