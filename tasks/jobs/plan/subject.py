"""The model that a recipe converts or makes: its config and tokenizer, checked before anything else is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from radlads.model.teacher.gguf import check_gguf_tensors, load_gguf_config, open_gguf
from radlads.model.teacher.load import (
    NoTeacherError,
    find_family,
    load_generation_config,
    load_teacher_config,
    parse_teacher_config,
)
from radlads.model.teacher.refusals import size_fault
from radlads.model.teacher.weights import open_teacher_weights
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.pins.content import ContentHashes
from radlads.tasks.contracts.pins.known_teachers import known_config
from radlads.tasks.contracts.pins.pins import pinned_commit, teacher_revision, tokenizer_fingerprint
from radlads.tasks.contracts.pins.places import is_gguf
from radlads.tasks.contracts.recipe.sections import Recipe
from radlads.tasks.contracts.specs import GgufFile, TeacherRef
from radlads.tasks.jobs.plan.checks import Findings, check_special_tokens
from radlads.tasks.jobs.sources import load_tokenizer, resolve_teacher_path
from radlads.tasks.jobs.teacher.gguf_file import describe_gguf

SIZES_ONLY = "only sizes are planned: no weights, tokenizer and text were looked at"
"""The warning of such a plan."""


@dataclass(frozen=True)
class Subject:
    """The model that is converted (or made): its config, its tokenizer, and the teacher, not pinned yet."""

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    tokenizer_path: str
    teacher: TeacherRef | None
    gguf: GgufFile | None = None


def open_subject(recipe: Recipe, findings: Findings, hashes: ContentHashes, *, sizes_only: bool) -> Subject | None:
    """None if it cannot be used; `findings` has the reason then. sizes_only: as in PlanSpec."""
    if recipe.pretrain is not None:
        tokenizer = None
        with findings.at("pretrain.tokenizer"):
            commit = pinned_commit(tokenizer_fingerprint(recipe.pretrain.tokenizer, None, hashes))
            tokenizer = load_tokenizer(recipe.pretrain.tokenizer, revision=commit)
        with findings.at("pretrain.config"):
            config = pretrain_config(recipe.pretrain.config, len(tokenizer) if tokenizer is not None else 1)
            if tokenizer is not None:
                return Subject(config, tokenizer, recipe.pretrain.tokenizer, None)
        return None
    assert recipe.teacher is not None
    path, trusted = recipe.teacher.path, recipe.teacher.trust_remote_code
    if is_gguf(path):
        with findings.at("teacher"):
            return _open_gguf(path, findings, sizes_only=sizes_only)
        return None
    if sizes_only:
        with findings.at("teacher"):
            config = _config_for_sizes(path, recipe.teacher.revision, findings)
            check_special_tokens(config, None)
            findings.warnings.append(SIZES_ONLY)
            return Subject(config, None, path, TeacherRef(path=path, revision=recipe.teacher.revision, fingerprint=""))
        return None
    with findings.at("teacher"):
        # An unsupported model is reported before files that its folder lacks.
        load_teacher_config(resolve_teacher_path(path), revision=recipe.teacher.revision)
        revision = teacher_revision(path, recipe.teacher.revision, trust_remote_code=trusted)
        config = load_teacher_config(resolve_teacher_path(path), revision=revision)
        check_special_tokens(config, load_generation_config(resolve_teacher_path(path), config, revision=revision))
        findings.warnings += _check_weights(resolve_teacher_path(path), config, revision)
        tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trusted)
        reference = TeacherRef(path=path, revision=revision, trust_remote_code=trusted, fingerprint="")
        return Subject(config, tokenizer, path, reference)
    return None


def known_teacher_config(path: str) -> PreTrainedConfig | None:
    """Of a well-known teacher of the hub, from the table that comes with the package; None for any other."""
    known = known_config(path)
    return None if known is None else parse_teacher_config(known)


def _config_for_sizes(path: str, revision: str | None, findings: Findings) -> PreTrainedConfig:
    """The teacher's own config; where its hub cannot be reached, that of a well-known teacher. Raises UserError."""
    place = resolve_teacher_path(path)
    try:
        return load_teacher_config(place, revision=revision)
    except NoTeacherError:
        known = None if Path(place).exists() else known_teacher_config(path)
        if known is None:
            raise
        findings.warnings.append(
            f"{path} was not found on the hub or in its cache: its sizes are those that radlads knows"
        )
        return known


def _open_gguf(path: str, findings: Findings, *, sizes_only: bool) -> Subject:
    """From the file's header alone. Raises UserError."""
    teacher = open_gguf(Path(resolve_teacher_path(path)))
    config = load_gguf_config(teacher)
    check_special_tokens(config, None)
    findings.warnings += [SIZES_ONLY] if sizes_only else check_gguf_tensors(teacher, config)
    tokenizer = None if sizes_only else load_tokenizer(path)
    return Subject(config, tokenizer, path, TeacherRef(path=path, fingerprint=""), describe_gguf(teacher, ""))


def pretrain_config(raw: dict[str, Any], vocab_size: int) -> PreTrainedConfig:
    """The typed config of a teacher to be made; `vocab_size` if it has none. Raises UserError."""
    values = {"vocab_size": vocab_size, **raw}
    model_type = values.pop("model_type", None)
    if not model_type:
        raise UserError("it needs a model_type, e.g. qwen3")
    if fault := size_fault(values):
        raise UserError(fault)
    try:
        config = AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise UserError(f"transformers refuses it: {' '.join(str(error).split())[:300]}") from error
    find_family(config)
    return config


def _check_weights(path: str, config: PreTrainedConfig, revision: str | None) -> list[str]:
    """Warnings, one line each, by the headers of the teacher's files. Raises UserError for weights that are
    truncated, missing, misshapen or quantised."""
    weights = open_teacher_weights(path, config, revision=revision, download=False)
    dtype = str(weights.dtype).removeprefix("torch.")
    return [
        f"{count} of the teacher's tensors are kept as {kept} and are rounded to {dtype}, as its config.json says; "
        "set its dtype to keep them as they are"
        for kept, count in weights.rounded().items()
    ]
