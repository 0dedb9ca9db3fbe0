"""Build a student from a teacher's config, or load one that was exported."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from radlads.model.mixers.shared.registry import find_variant, mixer_class, validate_options
from radlads.model.student.configuration import FIRST_LAYER, RadladsConfig
from radlads.model.student.modeling import RadladsForCausalLM
from radlads.model.teacher.load import find_family
from radlads.model.teacher.refusals import named_weights, stored_refusal
from radlads.model.weights.checkpoint_files import read_headers
from radlads.model.weights.finite import check_finite
from radlads.tasks.contracts.errors import UserError

__all__ = [
    "RadladsConfig",
    "RadladsForCausalLM",
    "build_student",
    "load_student",
    "read_student_config",
    "student_config",
]


def student_config(
    teacher_config: PreTrainedConfig,
    *,
    variant: str,
    options: Mapping[str, Any],
    attention_layers: Sequence[int],
    attention_rope: bool,
    attention_log_scale: int | None = None,
    untie_embeddings: bool = False,
) -> RadladsConfig:
    """The config of a student, with every option and rank filled in. Raises UserError if it cannot be built.

    untie_embeddings: give the student a head of its own where the teacher's is tied to its embeddings.
    """
    family = find_family(teacher_config)
    defining, initial = validate_options(variant, options, teacher_config).split()
    num_layers = teacher_config.num_hidden_layers
    beyond = [layer for layer in attention_layers if not 0 <= layer < num_layers]
    if beyond:
        raise UserError(
            f"attention_layers names layer {beyond[0]}, but the teacher has the layers 0 to {num_layers - 1}"
        )
    linear = sorted(set(attention_layers) - set(family.softmax_layers(teacher_config)))
    if linear:
        raise UserError(
            f"attention_layers names layer {linear[0]}, which is linear attention in the teacher and stays so; softmax "
            f"are the layers {', '.join(map(str, family.softmax_layers(teacher_config)))}"
        )
    return RadladsConfig(
        teacher=teacher_config.to_dict(),
        family=family.names(),
        variant=variant,
        options=defining,
        constants=mixer_class(variant).CONSTANTS,
        initial_values=initial,
        attention_layers=tuple(attention_layers),
        attention_rope=attention_rope,
        attention_log_scale=attention_log_scale,
        first_values=FIRST_LAYER,
        tie_word_embeddings=bool(teacher_config.tie_word_embeddings) and not untie_embeddings,
    )


def build_student(
    teacher_config: PreTrainedConfig,
    *,
    variant: str,
    options: Mapping[str, Any],
    attention_layers: Sequence[int],
    attention_rope: bool,
    attention_log_scale: int | None = None,
    untie_embeddings: bool = False,
    dtype: torch.dtype | None = None,
) -> RadladsForCausalLM:
    """A student with fresh weights (transplant copies the teacher's). Works under `torch.device("meta")`.

    dtype: of its parameters; None is torch's default. Raises UserError if it cannot be built.
    """
    config = student_config(
        teacher_config,
        variant=variant,
        options=options,
        attention_layers=attention_layers,
        attention_rope=attention_rope,
        attention_log_scale=attention_log_scale,
        untie_embeddings=untie_embeddings,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        return RadladsForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def load_student(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> RadladsForCausalLM:
    """Load an exported folder with this package's own classes (its remote code is not run), in eval mode.

    dtype: None keeps the saved one. Raises UserError when it is no exported student, its files are incomplete or not
    one set, a tensor is missing, unexpected or misshapen, or values are not finite.
    """
    config = read_student_config(Path(folder))
    for name, entry in read_headers(str(folder)).items():
        if reason := stored_refusal(entry.dtype):
            raise UserError(f"the student in {folder} cannot be loaded: its tensor {name} {reason}")
    try:
        student, report = RadladsForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the student in {folder}: {' '.join(str(error).split())[:300]}") from error
    faults = [f"{kind.replace('_', ' ')}: {sorted(map(str, names))[:3]}" for kind, names in report.items() if names]
    if faults:
        raise UserError(f"the student in {folder} does not fit its config: {'; '.join(faults)}")
    if config.tie_word_embeddings and not student.all_tied_weights_keys:
        raise UserError(
            f"the student in {folder} does not fit its config: tie_word_embeddings is true, but it has a head of its "
            "own, other than its embeddings"
        )
    for name, tensor in student.state_dict().items():
        check_finite(f"the student in {folder} cannot be used: its tensor {name}", tensor)
    return student.to(device).eval()


def read_student_config(folder: Path) -> RadladsConfig:
    """The config of an exported folder. Raises UserError if it has none that this code can load."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"no exported student in {folder}: config.json is missing")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        model_type = raw.get("model_type") if isinstance(raw, dict) else None
        if model_type != RadladsConfig.model_type:
            raise UserError(f"{folder} holds a '{model_type}' model, not an exported student")
        if reason := named_weights(raw):
            raise UserError(f"the student in {folder} cannot be loaded: its {reason}")
        config = RadladsConfig.from_pretrained(folder)
        if "initial_values" not in raw:
            _separate_initial_values(config)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, StrictDataclassError) as error:
        raise UserError(f"cannot read {path}: {type(error).__name__} {' '.join(str(error).split())[:300]}") from error
    _check_options(config, folder)
    return config


def _separate_initial_values(config: RadladsConfig) -> None:
    """Exports of version 0.1.0 hold initial values among the options, and rad_rwkv7's constants by other names."""
    initial = find_variant(config.variant).Options.initial_names()
    config.initial_values = {name: value for name, value in config.options.items() if name in initial}
    config.options = {name: value for name, value in config.options.items() if name not in initial}
    config.constants.pop("removal_key_scale_init", None)
    scale = config.constants.pop("decay_scale", None)  # e^-offset
    if scale is not None:
        config.constants["decay_offset"] = round(-math.log(scale), 12)


def _check_options(config: RadladsConfig, folder: Path) -> None:
    """Raises UserError where the options are not those that define this code's variant, one by one."""
    kind = find_variant(config.variant).Options
    expected, actual = kind.model_fields.keys() - kind.initial_names(), config.options.keys()
    if expected != actual:
        raise UserError(
            f"the student in {folder} was exported by another version of {config.variant}: its options lack "
            f"{sorted(expected - actual) or 'nothing'} and have {sorted(actual - expected) or 'nothing'} unknown here"
        )
