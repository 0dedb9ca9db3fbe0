"""Load a checkpoint under OpenMOSE's names into a student, and write one back."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from radlads.model.student.configuration import FIRST_MIXER
from radlads.model.student.load import student_config
from radlads.model.student.modeling import RadladsForCausalLM
from radlads.model.teacher.load import find_family
from radlads.model.teacher.refusals import stored_refusal
from radlads.model.weights.finite import check_finite
from radlads.model.weights.openmose import MARKER, PUBLISHED_MARKERS, TENSOR_NAMES, OpenMoseModel, inspect_openmose
from radlads.model.weights.weight_files import WeightFiles, WeightWriter, open_weight_files
from radlads.tasks.contracts.errors import UserError

_OURS = {theirs: ours for ours, theirs in TENSOR_NAMES.items()} | {"ln_r": "q_norm", "ln_k": "k_norm"}
_BLOCK = re.compile(r"^blocks\.(\d+)\.(\w+)\.([\w.]+)$")
_ENDS = {"emb.weight": "embeddings", "ln_out.weight": "final_norm"}


def load_openmose(
    folder: str | Path,
    teacher_config: PreTrainedConfig,
    *,
    architecture: str | None = None,
    rope: bool | None = None,
    attention_rope: bool | None = None,
    dtype: torch.dtype | None = None,
) -> RadladsForCausalLM:
    """A student with the weights of a checkpoint's safetensors, in eval mode.

    teacher_config: of the model that it was made from, which its folder does not hold. architecture: see
    `inspect_openmose`. rope, attention_rope: whether its mixers and its kept attention layers rotate. None is
    the value in the folder's config.json (rwkv_architecture, nope_in_rwkv, nope_in_transformer), or the variant's
    published form, without rotary positions in attention. dtype: None keeps the checkpoint's. Raises UserError for a
    variant that cannot be determined, and for tensors that are missing, unexpected or misshapen.
    """
    files = open_weight_files(str(folder))
    said = _read_config(Path(folder))
    architecture = said.get("rwkv_architecture") if architecture is None else architecture
    if rope is None and "nope_in_rwkv" in said:
        rope = not said["nope_in_rwkv"]
    if attention_rope is None:
        attention_rope = not said.get("nope_in_transformer", True)
    held = inspect_openmose({name: files.shape(name) for name in files.names()}, architecture=architecture)
    family = find_family(teacher_config)
    if held.num_layers != teacher_config.num_hidden_layers:
        raise UserError(f"the checkpoint has {held.num_layers} layers, its teacher {teacher_config.num_hidden_layers}")
    if held.qk_norm != (family.q_norm is not None):
        has = "has" if held.qk_norm else "has no"
        raise UserError(f"the checkpoint {has} norms of r and k, unlike teachers of the family {family.model_type}")
    head = {"lm_head.weight", "head.weight"} & set(files.names())
    config = student_config(
        teacher_config,
        variant=held.variant,
        options=held.options if rope is None else {**held.options, "rope": rope},
        attention_layers=held.attention_layers,
        attention_rope=attention_rope,
        untie_embeddings=bool(head),
    )
    config.first_values = FIRST_MIXER  # as there
    parts = SimpleNamespace(**config.family)
    with torch.device("meta"):
        expected = {
            name: tensor.shape for name, tensor in RadladsForCausalLM(copy.deepcopy(config)).state_dict().items()
        }
    if not head:
        expected.pop("lm_head.weight", None)
    state = dict(_read(files, held, expected, parts))
    missing = sorted(expected.keys() - state.keys())
    if missing:
        raise UserError(f"the checkpoint lacks {len(missing)} tensors of {held.variant}, first {missing[0]}")
    if dtype is None:
        dtype = files.dtype(files.names()[0])
    student = RadladsForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    return student.eval()


def openmose_tensors(student: RadladsForCausalLM, *, marker: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The student's tensors in the Hugging Face layout of OpenMOSE's checkpoints, one at a time.

    marker: add the published `layer_architecture` of each layer. Raises UserError for a variant without such
    names or without a known marker.
    """
    variant = student.config.variant
    if variant.startswith("rad_"):
        raise UserError(f"{variant} is RADLADS's own mixer; OpenMOSE has no names for it")
    if marker and variant not in PUBLISHED_MARKERS:
        known = ", ".join(PUBLISHED_MARKERS)
        raise UserError(f"the architecture marker of {variant} is not known; known: {known}")
    first = student.config.first_attention()
    if first is not None and getattr(student.mixers()[min(student.mixers())], "v0", None) is not None:
        raise UserError(
            f"OpenMOSE's models take first values from the first recurrent layer, this student from layer {first}, "
            "which is softmax attention; keep other layers than this one"
        )
    parts, mixers = student.parts, set(student.mixers())
    tied = set(student.all_tied_weights_keys)
    for name, tensor in student.state_dict().items():
        if name in tied:
            continue
        layer, part = _in_attention(name, parts)
        if layer is None:
            yield name, tensor
            continue
        first, _, rest = part.partition(".")
        theirs = TENSOR_NAMES.get(first, first) if layer in mixers else first
        yield f"model.layers.{layer}.self_attn.{theirs}{'.' + rest if rest else ''}", tensor
    if marker:
        for layer in sorted(mixers):
            value = torch.tensor([PUBLISHED_MARKERS[variant]], dtype=student.dtype)
            yield f"model.layers.{layer}.self_attn.{MARKER}", value


def export_openmose(
    student: RadladsForCausalLM, folder: str | Path, *, marker: bool = False, max_shard_bytes: int = 4_000_000_000
) -> None:
    """Write the student's weights under OpenMOSE's names as safetensors. Raises UserError: see `openmose_tensors`."""
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in openmose_tensors(student, marker=marker)}
    writer = WeightWriter(Path(folder), layout, max_shard_bytes=max_shard_bytes)
    for name, tensor in openmose_tensors(student, marker=marker):
        check_finite(f"the student's tensor {name}", tensor)
        writer.write(name, tensor)
    writer.close()


def _read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; {} without one."""
    path = folder / "config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is no JSON object: {error}") from error


def _read(
    files: WeightFiles, held: OpenMoseModel, expected: Mapping[str, torch.Size], parts: SimpleNamespace
) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors by our names. Raises UserError for one without a counterpart in the student."""
    recurrent = set(range(held.num_layers)) - set(held.attention_layers)
    for name in files.names():
        if name in held.unused:
            continue
        ours = _our_name(name, parts, recurrent)
        if ours not in expected:
            raise UserError(f"the checkpoint's tensor '{name}' has no place in a {held.variant} student")
        shape, needed = files.shape(name), expected[ours]
        # Vectors are [1,1,A] or [A], depending on the age of the file.
        if _without_ones(shape) != _without_ones(needed):
            raise UserError(f"'{name}' is {tuple(shape)} in the checkpoint and {tuple(needed)} in the student")
        if reason := stored_refusal(files.stored_dtype(name)):
            raise UserError(f"the checkpoint's tensor '{name}' {reason}")
        tensor = files.read(name).view(needed)
        check_finite(f"the checkpoint's tensor '{name}'", tensor)
        yield ours, tensor


def _our_name(name: str, parts: SimpleNamespace, recurrent: set[int]) -> str:
    """A tensor's name in the student, from either layout."""
    if name == "head.weight":
        return "lm_head.weight"
    if name in _ENDS:
        return f"model.{getattr(parts, _ENDS[name])}.weight"
    match = _BLOCK.match(name)
    if match:
        layer, kind, rest = match.groups()
        if kind == "ffn":
            rest = re.sub(r"^(gate|up|down)[.]", r"\1_proj.", rest)
            name = f"model.{parts.layers}.{layer}.{parts.mlp}.{rest}"
        else:
            kinds = {"ln1": parts.input_norm, "ln2": parts.mlp_norm, "att": parts.attention}
            name = f"model.{parts.layers}.{layer}.{kinds.get(kind, kind)}.{rest}"
    found, part = _in_attention(name, parts)
    if found is None or found not in recurrent:
        return name
    first, _, rest = part.partition(".")
    return f"model.{parts.layers}.{found}.{parts.attention}.{_OURS.get(first, first)}{'.' + rest if rest else ''}"


def _in_attention(name: str, parts: SimpleNamespace) -> tuple[int | None, str]:
    """Layer and the rest of the name, for a tensor of an attention module or mixer."""
    match = re.match(rf"^model\.{parts.layers}\.(\d+)\.{parts.attention}\.(.+)$", name)
    return (int(match.group(1)), match.group(2)) if match else (None, name)


def _without_ones(shape: tuple[int, ...] | torch.Size) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
