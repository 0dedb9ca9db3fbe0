"""Checks of a recipe before anything runs: every fault in one line, all of them reported at once."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from radlads.model.teacher.refusals import token_fault
from radlads.model.training.align_losses import no_spectrum
from radlads.model.training.lora import missing_target
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.memory import freezes_mlp, teacher_bits
from radlads.tasks.contracts.recipe.sections import (
    Dataset,
    FilesSource,
    HubSource,
    Needle,
    RecallSource,
    Recipe,
    SampleSource,
    Source,
    Training,
)
from radlads.tasks.contracts.recipe.training import runs_teacher
from radlads.tasks.contracts.stages import NEEDLE, stage_info
from radlads.tasks.jobs.data.encode import Encoder, Part
from radlads.tasks.jobs.data.prompts import read_prompts
from radlads.tasks.jobs.data.text.chat import open_chat_template
from radlads.tasks.jobs.data.text.documents import Document, first_documents
from radlads.tasks.jobs.data.text.recall import build_case, load_filler
from radlads.tasks.jobs.data.text.text_files import EXPANSION
from radlads.tasks.jobs.data.text.token_encoder import TokenEncoder, prompt_frame
from radlads.tasks.jobs.sources import expand_paths, resolve_file
from radlads.tasks.jobs.train.engines.build import NO_CALIBRATION, NO_OFFLOAD, why_not_recorded
from radlads.tasks.jobs.train.frozen_weights import trained_mlp

# Documents of each source that are read to check the source and to measure bytes per token.
_PROBED = 64


@dataclass
class Findings:
    """Faults stop the run; warnings are shown."""

    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    """Stages that need more memory than the device has."""
    advice: list[str] = field(default_factory=list)
    """What would take less time."""

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Record a UserError raised inside as faults at that place of the recipe."""
        try:
            yield
        except UserError as error:
            self.faults += [f"{place}: {line}" for line in str(error).splitlines() if line.strip()]


def check_dataset(
    name: str, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, findings: Findings
) -> dict[str, Any]:
    """Read the first documents of every source; returns {bytes, bytes_per_token, tokens, assistant}, and `passes` of a
    mixture; None: unknown.

    assistant: whether assistant-only training finds a token that counts. passes: how often each source is read.
    """
    total_bytes: float | None = 0.0
    sizes: list[float | None] = []
    ratio = None
    assistant: bool | None = False
    if dataset.add_bos and tokenizer.bos_token_id is None:
        findings.faults.append(f"data.{name}.add_bos is on, but the tokenizer has no BOS token")
    for index, source in enumerate(dataset.sources):
        place = f"data.{name}.sources.{index}"
        if isinstance(source, SampleSource):
            sizes.append(source.tokens)
            assistant = True
            with findings.at(place):
                if source.prompts:
                    read_prompts(source, tokenizer, _PROBED)
            continue
        sizes.append(None)
        with findings.at(place):
            documents = first_documents(source, tokenizer=tokenizer, count=_PROBED)
            if not documents:
                raise UserError("no document in it")
            part = _encode_beginnings(source, documents, tokenizer, dataset.add_bos)
            if part.mask.any():
                assistant = True
            elif len(documents) == _PROBED:  # the source has more documents
                assistant = assistant or None
            if specials := part.counts.get("special_tokens_as_text", 0):
                findings.warnings.append(_special_text(place, specials, len(documents), source))
            read, tokens = int(part.num_bytes.sum()), len(part.ids)
            ratio = read / max(1, tokens)
            if isinstance(source, RecallSource):
                sizes[-1] = source.documents * sum(source.lengths) / len(source.lengths)
                continue
            size = _size_of(source, read, len(documents))
            total_bytes = _add(total_bytes, size)
            sizes[-1] = None if size is None else size / ratio
    total_tokens = _total(dataset, sizes)
    mixed = _passes(name, dataset, sizes, total_tokens, findings)
    return mixed | {
        "bytes": None if total_bytes is None else round(total_bytes),
        "bytes_per_token": ratio,
        "tokens": None if total_tokens is None else round(total_tokens),
        "assistant": assistant,
    }


def _total(dataset: Dataset, sizes: Sequence[float | None]) -> float | None:
    """Tokens of a dataset, roughly, from those of its sources; None: unknown."""
    ends: list[float] = [] if dataset.max_tokens is None else [dataset.max_tokens]
    known = [size for size in sizes if size is not None]
    if dataset.shares is not None:  # it ends with the first source
        shares = zip(sizes, dataset.shares, dataset.sources, strict=True)
        ends += [size * source.repeats / share for size, share, source in shares if size is not None]
    elif len(known) == len(sizes):
        ends.append(sum(known))
    return min(ends, default=None)


def _passes(
    name: str, dataset: Dataset, sizes: Sequence[float | None], total: float | None, findings: Findings
) -> dict[str, list[float | None]]:
    """How often a mixture reads each source, roughly; warns of repeats, and of a source that has too little."""
    if dataset.shares is None or total is None:
        return {}
    wanted = total if dataset.max_tokens is None else dataset.max_tokens
    passes = [None if not size else share * wanted / size for size, share in zip(sizes, dataset.shares, strict=True)]
    for index, (count, source) in enumerate(zip(passes, dataset.sources, strict=True)):
        place = f"data.{name}.sources.{index}"
        if count is not None and count > source.repeats * 1.05:
            findings.warnings.append(
                f"{place} would be read about {count:.1f} times for its weight, and repeats allows {source.repeats}: "
                "tokenize will end with that; raise repeats, or lower its weight or max_tokens"
            )
        elif count is not None and count > 1.05:
            findings.warnings.append(f"{place} is read about {count:.1f} times, as its weight asks")
    return {"passes": passes}


def _encode_beginnings(
    source: Source, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, add_bos: bool
) -> Part:
    """The beginnings of some documents, encoded. Raises UserError for a document that cannot be encoded."""
    # The beginning is enough to measure; a document can be as long as a book.
    beginnings = [d if d.text is None else dataclasses.replace(d, text=d.text[:20_000]) for d in documents]
    return Encoder(tokenizer, add_bos, 0.0, with_mask=True, sources=(source,)).encode(beginnings, {})


def _special_text(place: str, count: int, documents: int, source: Source) -> str:
    parted = isinstance(source, FilesSource) and source.separator is None and source.messages_field is None
    hint = "; if it stands between documents, set separator" if parted else ""
    return (
        f"{place}: the text of special tokens (such as <|endoftext|>) stands {count} times in the first {documents} "
        f"documents, and is taken as text; special_tokens: parse takes it for the tokens{hint}"
    )


def _size_of(source: FilesSource | HubSource, read: int, documents: int) -> float | None:
    """Bytes of text in a source, roughly; None for the hub."""
    per_document = read / documents
    if isinstance(source, HubSource):
        return None if source.max_documents is None else source.max_documents * per_document
    paths = [resolve_file(name) for name in expand_paths(source.paths)]
    size = sum(path.stat().st_size * EXPANSION.get(path.suffix, 1.0) for path in paths)
    return size if source.max_documents is None else min(size, source.max_documents * per_document)


def _add(total: float | None, more: float | None) -> float | None:
    return None if total is None or more is None else total + more


def check_frozen(recipe: Recipe, findings: Findings) -> None:
    """8-bit weights must be frozen, and need a library of their own."""
    eight = recipe.student.mlp_bits == 8 and recipe.teacher is not None
    for stage in recipe.training_stages:
        section: Training = getattr(recipe, stage)
        if not eight or not stage_info(stage).trains_whole_student:
            continue
        if not freezes_mlp(stage, section):
            findings.faults.append(trained_mlp(stage))
        elif runs_teacher(stage, section) and teacher_bits(recipe, stage) == 16:
            findings.warnings.append(
                f"{stage} holds the frozen MLPs twice, in 8 bit for the student and in 16 for the teacher; once is "
                "enough with teacher.bits: 8 (less memory) or student.mlp_bits: 16 (the teacher's own numbers)"
            )
    if (eight or (recipe.teacher is not None and recipe.teacher.bits == 8)) and find_spec("torchao") is None:
        findings.faults.append("holding weights in 8 bit needs torchao: pip install 'radlads[quant]'")


def check_engines(recipe: Recipe, resources: JobResources, findings: Findings) -> None:
    """CUDA graphs need passes that are alike; ZeRO-3 divides what some settings need whole."""
    for stage in recipe.training_stages if resources.cuda_graphs == "on" else ():
        if (reason := why_not_recorded(getattr(recipe, stage), resources)) is not None:
            findings.faults.append(f"resources.cuda_graphs, {stage}: {reason}")
    if resources.zero_stage != 3:
        return
    if resources.offload_optimizer:
        findings.faults.append(f"resources: {NO_OFFLOAD}")
    if recipe.student.calibrate is not None:
        findings.faults.append(f"student.calibrate: {NO_CALIBRATION}")


def check_lora(recipe: Recipe, known: Sequence[str], findings: Findings) -> None:
    """LoRA targets must exist. known: the names of the student's linear modules."""
    for stage in recipe.training_stages:
        lora = getattr(getattr(recipe, stage), "lora", None)
        if lora is not None and (fault := missing_target(lora.targets, known)):
            findings.faults.append(f"{stage}.{fault}")


def check_align(recipe: Recipe, width: int, kept: int, num_layers: int, findings: Findings) -> None:
    """A loss must have the terms that it asks for, and mixers to align. width: of the model; kept: softmax layers,
    of the `num_layers` that could be converted."""
    if recipe.align is None:
        return
    if fault := no_spectrum(recipe.align, width):
        findings.faults.append(f"align.{fault}")
    if kept == num_layers:
        findings.faults.append(
            f"student.attention_layers keeps all {num_layers} layers, so there is nothing to align: name fewer, or "
            "drop the section `align`"
        )


def check_masks(recipe: Recipe, data: dict[str, dict[str, Any]], findings: Findings) -> None:
    """Assistant-only training needs chats in which the assistant speaks. data: as check_dataset returned it, where it
    was read."""
    for stage in recipe.training_stages:
        section: Training = getattr(recipe, stage)
        if getattr(section, "assistant_only", False):
            _check_mask(stage, section.data, recipe, data, findings)


def _check_mask(stage: str, name: str, recipe: Recipe, data: dict[str, dict[str, Any]], findings: Findings) -> None:
    if not any(source.has_chats for source in recipe.data[name].sources):
        findings.faults.append(
            f"{stage}.assistant_only is on, but no source of data.{name} has messages_field (or is recall with chat)"
        )
        return
    if name not in data or any(fault.startswith(f"data.{name}.sources.") for fault in findings.faults):
        return  # not read
    silent = f"{stage}.assistant_only is on, but the assistant says nothing in data.{name}"
    cure = "look at messages_field, the roles of the chats and the chat template"
    if data[name]["assistant"] is False:
        findings.faults.append(f"{silent}: nothing would be learnt; {cure}")
    elif data[name]["assistant"] is None:
        findings.warnings.append(f"{silent}'s first {_PROBED} chats; {cure}")


def check_heldout(recipe: Recipe, data: dict[str, dict[str, Any]], findings: Findings) -> None:
    """Warn if less text is held out than evaluate scores; without any, the run would fail at its last stage."""
    if recipe.evaluate is None or not data[recipe.evaluate.data]["tokens"]:
        return
    held = round(data[recipe.evaluate.data]["tokens"] * recipe.data[recipe.evaluate.data].heldout_fraction)
    if held == 0:
        findings.faults.append(
            f"evaluate scores held-out text, and next to nothing of data.{recipe.evaluate.data} is held out; raise its "
            "heldout_fraction, or give it more text"
        )
    elif held < recipe.evaluate.heldout_tokens:
        findings.warnings.append(
            f"evaluate.heldout_tokens is {recipe.evaluate.heldout_tokens}, but about {held} tokens of "
            f"data.{recipe.evaluate.data} are held out; all of them are scored"
        )


def check_needle(
    section: Needle, tokenizer: PreTrainedTokenizerBase, positions: int | None, findings: Findings
) -> None:
    """Depths, the haystack, and whether the shortest prompt can hold its question."""
    with findings.at(NEEDLE.name):
        outside = [depth for depth in section.depths if not 0 <= depth <= 1]
        if outside:
            raise UserError(f"depths are shares from 0 to 1 (given: {outside[0]})")
        if section.chat_template:
            if not tokenizer.chat_template:
                raise UserError("chat_template is on, but the tokenizer has no chat template")
            open_chat_template(TokenEncoder(tokenizer), None).prompt("What does the red dog say?")
        filler = load_filler(
            [resolve_file(name) for name in expand_paths(section.haystack)], section.haystack_separator
        )
        frame = prompt_frame(tokenizer, section.add_bos)
        build_case(tokenizer, filler, length=min(section.lengths), depth=0.5, rng=random.Random(0), frame=frame)
        beyond = [length for length in section.lengths if positions is not None and length > positions]
        if beyond:
            findings.warnings.append(
                f"needle.lengths {beyond} are beyond the {positions} positions that the teacher was made for; expect "
                f"failures there"
            )


def check_special_tokens(config: PreTrainedConfig, generation: GenerationConfig | None) -> None:
    """Raises UserError if a config, or the settings for generation, has a special token beyond the vocabulary."""
    for settings, where in ((config, "config"), (generation, "generation_config")):
        if settings is not None and (fault := token_fault(vars(settings), config.vocab_size, where)):
            raise UserError(fault)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, findings: Findings) -> None:
    """Every id must have an embedding."""
    if len(tokenizer) > config.vocab_size:
        findings.faults.append(
            f"the tokenizer has {len(tokenizer)} tokens, but the model only {config.vocab_size} embeddings; "
            f"they do not belong together"
        )
