"""Teachers kept as GGUF: their header is checked before anything runs, and transformers dequantises them once.

Reading needs the package `gguf`. transformers reads fewer settings of a file than llama.cpp, and does not say which it
leaves out: what would give another model than the file's is refused here.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedConfig
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_CONFIG_MAPPING,
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)
from transformers.utils import is_gguf_available

from radlads.model.teacher.load import parse_teacher_config
from radlads.model.teacher.weights import DAMAGED, build_empty
from radlads.model.weights.finite import check_finite
from radlads.model.weights.gguf_header import GgufHeader, read_gguf_header, write_without_words
from radlads.tasks.contracts.errors import UserError, error_text, first_line

NO_PACKAGE = "reading a GGUF file needs the package gguf: pip install 'radlads[gguf]'"
_MAX_SHARD_BYTES = 4_000_000_000
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WORDS = "tokenizer.ggml.tokens"
# Settings of sizes that transformers leaves at its own default for some architectures.
_SIZES = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "expert_feed_forward_length": "moe_intermediate_size",
}
# Settings that follow from others, or that the shapes of tensors confirm.
_IMPLIED = ("vocab_size", "rope.dimension_count", "rope.scaling.type", "attention.value_length")
_FAULTS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    NotImplementedError,
    StrictDataclassError,
)


@dataclass(frozen=True)
class GgufTeacher:
    """A file whose header is in order. kinds: ggml type → number of tensors, that with most elements first."""

    header: GgufHeader
    kinds: dict[str, int]

    @property
    def dtype(self) -> torch.dtype:
        """Of the dequantised weights: bfloat16 for blocks; else what most weights are kept in."""
        return _FLOATS.get(next(iter(self.kinds)), torch.bfloat16)

    @property
    def architecture(self) -> str:
        """llama.cpp's name."""
        return str(self.header.settings.get("general.architecture"))


def open_gguf(path: Path) -> GgufTeacher:
    """Check a file by its header. Raises UserError, one line: no whole file, a part of one, a type without a reader."""
    if not is_gguf_available():
        raise UserError(NO_PACKAGE)
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    header = read_gguf_header(path)
    if header.settings.get("split.count", 0) > 1:
        raise UserError(
            f"{path} is one of {header.settings['split.count']} parts; join them (llama-gguf-split --merge)"
        )
    elements: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for tensor in header.tensors:
        try:
            kind = GGMLQuantizationType(tensor.kind)
            block, size = GGML_QUANT_SIZES[kind]
            if kind.name not in kinds:
                _check_reads(kind, size)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise UserError(f"{path}: tensor {tensor.name} cannot be dequantised: {error_text(error)}") from error
        kinds[kind.name] += 1
        elements[kind.name] += tensor.count
        end = header.data_start + tensor.offset + math.ceil(tensor.count / block) * size
        if end > header.size:
            raise UserError(f"{path} is no whole GGUF file: it ends within {tensor.name}; download it again")
    if not kinds:
        raise UserError(f"{path} has no tensors (a vocabulary alone?); give the file with the weights")
    return GgufTeacher(header, {name: kinds[name] for name, _ in elements.most_common()})


def _check_reads(kind: Any, size: int) -> None:
    """Raises NotImplementedError for a type that the package names and does not dequantise."""
    from gguf import dequantize

    dequantize(np.zeros((1, size), np.uint8), kind)


def load_gguf_config(teacher: GgufTeacher) -> PreTrainedConfig:
    """The typed config, from the file's settings. Raises UserError for an architecture that transformers does not read
    or that has no family, and for rotary positions that are scaled or on a part of the head, which it leaves out."""
    header, architecture = teacher.header, teacher.architecture
    scaling = header.settings.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise UserError(
            f"the rotary positions of {header.path} are scaled ({scaling}), which transformers does not read; "
            "give the model's Hugging Face folder"
        )
    try:
        with TemporaryDirectory() as folder:
            write_without_words(header, Path(folder) / header.path.name)
            raw, _ = PreTrainedConfig.get_config_dict(folder, gguf_file=header.path.name)
        raw = {key: value for key, value in raw.items() if key != "_model_name_or_path"}
        if "vocab_size" not in raw and _WORDS in header.settings:
            raw["vocab_size"] = header.settings[_WORDS]
        for setting, name in _SIZES.items():
            if (value := header.settings.get(f"{architecture}.{setting}")) is not None:
                raw[name] = value
        if architecture == "gemma3" and "head_dim" in raw:  # as llama.cpp scales scores; the file does not say
            raw["query_pre_attn_scalar"] = raw["head_dim"]
        config = parse_teacher_config(raw)
    except UserError:
        raise
    except _FAULTS as error:
        raise UserError(
            f"transformers cannot read {header.path} (architecture '{architecture}'): {error_text(error)}; give the "
            "model's Hugging Face folder"
        ) from error
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated = header.settings.get(f"{architecture}.rope.dimension_count", head)
    if rotated != head * (config.rope_parameters or {}).get("partial_rotary_factor", 1):
        raise UserError(
            f"{header.path} rotates {rotated} of a head's {head} channels, which transformers does not read; give the "
            "model's Hugging Face folder"
        )
    config.dtype = teacher.dtype
    return config


def check_gguf_tensors(teacher: GgufTeacher, config: PreTrainedConfig) -> list[str]:
    """Warnings. Raises UserError unless each tensor of the file has its place in the model, of its size, and each place
    its tensor: transformers drops the one and fills the other with random numbers."""
    header, model = teacher.header, build_empty(config)
    processor = TENSOR_PROCESSORS.get(teacher.architecture, TensorProcessor)(config=config.to_dict())
    # Of the whole model alone: given a module, the function makes its table again for each of the modules inside.
    whole = SimpleNamespace(config=config, state_dict=model.state_dict, named_children=tuple)
    try:
        places = get_gguf_hf_weights_map(whole, processor)
    except _FAULTS as error:
        raise UserError(
            f"the tensors of {header.path} (architecture '{teacher.architecture}') cannot be placed: "
            f"{first_line(error)}; give the model's Hugging Face folder"
        ) from error
    found: Counter[str] = Counter()
    for tensor in header.tensors:
        # Experts have no suffix there.
        place = places.get(tensor.name) or places.get(tensor.name.removesuffix(".weight"))
        if place is None:
            raise UserError(
                f"{header.path} has the tensor {tensor.name}, for which a {config.model_type} of transformers has no "
                "place: it would be another model without it; give the model's Hugging Face folder"
            )
        found[place] += tensor.count
    for name, parameter in model.state_dict().items():
        if name in model.all_tied_weights_keys and name not in found:
            continue
        if found[name] != parameter.numel():
            what = f"{found[name]} numbers for" if found[name] else "nothing for"
            raise UserError(f"{header.path} has {what} {name}, which takes {parameter.numel()} by its own settings")
    prefix = f"{teacher.architecture}."
    known = {*GGUF_CONFIG_MAPPING.get(config.model_type, ()), *_SIZES, *_IMPLIED}
    known |= {*GGUF_CONFIG_MAPPING.get(teacher.architecture, ())}
    unread = sorted(key for key in header.settings if key.startswith(prefix) and key.removeprefix(prefix) not in known)
    if not unread:
        return []
    return [f"transformers does not read these settings of the GGUF file: {', '.join(unread)}; the teacher is without"]


def dequantise(teacher: GgufTeacher, config: PreTrainedConfig, folder: Path) -> int:
    """Write the model as a Hugging Face folder, without a tokenizer; returns its parameters. The whole model is in
    memory. Raises UserError for tensors that are missing, left over or not finite."""
    path = teacher.header.path
    causal_models: Any = AutoModelForCausalLM
    model, loaded = causal_models.from_pretrained(
        str(path.parent),
        gguf_file=path.name,
        config=config,
        dtype=teacher.dtype,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, loaded[kind])):
            raise UserError(f"transformers has {len(names)} {kind.replace('_', ' ')} in {path}, first {names[0]}")
    for name, tensor in model.state_dict().items():
        check_finite(f"teacher tensor {name}", tensor, mend=DAMAGED)
    model.save_pretrained(folder, max_shard_size=_MAX_SHARD_BYTES)
    return int(model.num_parameters())
