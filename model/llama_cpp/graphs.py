"""Which of llama.cpp's graphs computes a student, and the one line that says why none does.

Both graphs are Llama's block with another attention: RMSNorm, mixer, RMSNorm, MLP with SiLU gate, none of them with
biases, embeddings and logits as they are. Families are allowed by name, not refused by name: what a new family scales,
caps or adds would otherwise be lost silently. Every tensor of the student must have a place in the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from radlads.model.llama_cpp import arwkv7, rwkv6qwen2
from radlads.model.llama_cpp.pieces import Piece, Source
from radlads.model.mixers.rad_rwkv6 import Mixer as RadRwkv6
from radlads.model.mixers.shared.mixer import Mixer
from radlads.model.mixers.shared.rwkv7_design import Rwkv7Mixer
from radlads.model.student.load import RadladsConfig, RadladsForCausalLM, read_student_config
from radlads.model.weights.weight_files import WeightFiles, open_weight_files
from radlads.tasks.contracts.errors import UserError

# Their code is Llama's but for attention, whose norms, biases and scales are read from the mixers, and for one
# projection with the rows of gate and up (phi3).
_LLAMA_BLOCKS = ("llama", "mistral", "ministral3", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3")
_OTHER_BLOCKS = {
    "gemma3_text": "its scaled embeddings, further norms and GELU",
    "olmo2": "its norms after attention and MLP",
    "olmo3": "its norms after attention and MLP",
    "exaone4": "its norms after attention and MLP",
    "glm4": "its further norms",
    "granite": "its scales of embeddings, residuals and logits",
    "cohere2": "its LayerNorms, parallel blocks and scale of logits",
    "qwen3_moe": "its experts",
    "qwen3_5_text": "its own linear attention",
}
# Kernels for heads of other widths are wrong (CPU, which works in steps of up to 64 channels) or missing (GPU).
_HEAD_DIMS = (64, 128)


@dataclass(frozen=True)
class GraphStudent:
    """A student that one of the graphs computes: what its file needs to say, and the file's tensors."""

    graph: ModuleType
    config: RadladsConfig
    mixers: dict[int, Any]
    pieces: tuple[Piece, ...]
    files: WeightFiles

    @property
    def name(self) -> str:
        """The graph's."""
        return str(self.graph.NAME)

    @property
    def num_words(self) -> int:
        """Rows of the embeddings."""
        return self.pieces[0].shape[0]


def open_for_llama_cpp(folder: str | Path) -> GraphStudent:
    """An exported folder as one of llama.cpp's graphs has it; of its weights little is read.

    Raises UserError, one line, where no graph computes this student, or its files do not fit its config.
    """
    config = read_student_config(Path(folder))
    with torch.device("meta"):
        student = RadladsForCausalLM(config)
    mixers = student.mixers()
    graph = _graph_of(config, mixers)
    files = open_weight_files(str(folder))
    _check_files(student, files, folder)
    source = Source(files)
    pieces = tuple(_all_pieces(source, graph, student))
    used = {name for piece in pieces for name in piece.sources}
    rest = sorted(student.state_dict().keys() - student.all_tied_weights_keys.keys() - used)
    if rest:
        raise UserError(_lacks(graph.NAME, f"a place for this student's tensor {rest[0]}"))
    if graph is rwkv6qwen2:
        _check_floor(source, mixers)
    return GraphStudent(graph, config, mixers, pieces, files)


def _graph_of(config: RadladsConfig, mixers: dict[int, Mixer]) -> ModuleType:
    variant, family = config.variant, str(config.teacher.get("model_type"))
    any_mixer = next(iter(mixers.values()), None)
    if any_mixer is None:
        raise UserError("no layer of this student is converted: export its teacher by llama.cpp's own scripts")
    if isinstance(any_mixer, RadRwkv6):
        graph: ModuleType = rwkv6qwen2
    elif isinstance(any_mixer, Rwkv7Mixer):
        graph = arwkv7
    else:
        raise UserError(f"no GGUF file of this student: llama.cpp has no graph with the recurrence of {variant}")
    name = graph.NAME
    if config.attention_layers:
        layers = ", ".join(map(str, config.attention_layers))
        raise UserError(_lacks(name, f"softmax attention, which this hybrid keeps in layers {layers}"))
    if family not in _LLAMA_BLOCKS:
        what = _OTHER_BLOCKS.get(family, "a block that is not Llama's")
        raise UserError(_lacks(name, f"what the family {family} computes: {what}"))
    for mixer in mixers.values():
        if reason := _of_shape(mixer) or graph.why_not(mixer):
            raise UserError(_lacks(name, reason))
    activation = config.teacher.get("hidden_act")
    if activation not in ("silu", "swish"):
        raise UserError(_lacks(name, f"the activation {activation} (hidden_act)"))
    return graph


def _of_shape(mixer: Mixer) -> str | None:
    """What of a mixer's sizes neither graph has."""
    shape = mixer.shape
    if shape.head_dim not in _HEAD_DIMS:
        return f"kernels for heads of {shape.head_dim} channels; it has those for {_HEAD_DIMS[0]} and {_HEAD_DIMS[1]}"
    if shape.width != shape.hidden_size:
        return f"attention of another width ({shape.width}) than the model's ({shape.hidden_size})"
    if shape.o_bias:
        return "a bias of attention's output"
    if shape.output_gate:
        return "the gate on attention's output that the teacher has"
    return None if shape.q_scale == 1 else f"a scale of scores of its own ({shape.q_scale:g} times the usual)"


def _lacks(graph: str, what: str) -> str:
    return f"no GGUF file of this student: llama.cpp's graph {graph} lacks {what}"


def _check_files(student: RadladsForCausalLM, files: WeightFiles, folder: str | Path) -> None:
    """Raises UserError where a tensor is missing or misshapen, or of a type that is no float."""
    expected = {n: tuple(t.shape) for n, t in student.state_dict().items() if n not in student.all_tied_weights_keys}
    for name, shape in expected.items():
        if name not in files or files.shape(name) != shape:
            found = files.shape(name) if name in files else "missing"
            raise UserError(f"the student in {folder} does not fit its config: {name} is {found}, not {shape}")
        if not files.dtype(name).is_floating_point or files.dtype(name).itemsize < 2:
            raise UserError(f"the student in {folder} cannot be exported: its tensor {name} is {files.dtype(name)}")


def _all_pieces(source: Source, graph: ModuleType, student: RadladsForCausalLM) -> Iterator[Piece]:
    """Embeddings first. A head that is tied to them is written out, because both graphs want one."""
    embeddings = "model.embed_tokens.weight"
    yield source.matrix("token_embd.weight", embeddings)
    for layer, mixer in student.mixers().items():
        prefix = f"model.layers.{layer}."
        yield source.vector(f"blk.{layer}.attn_norm.weight", f"{prefix}input_layernorm.weight")
        yield from graph.mixer_pieces(source, mixer, layer, f"{prefix}self_attn.")
        yield source.vector(f"blk.{layer}.ffn_norm.weight", f"{prefix}post_attention_layernorm.weight")
        yield from _mlp_pieces(source, layer, f"{prefix}mlp.")
    yield source.vector("output_norm.weight", "model.norm.weight")
    yield source.matrix("output.weight", embeddings if student.all_tied_weights_keys else "lm_head.weight")


def _mlp_pieces(source: Source, layer: int, prefix: str) -> Iterator[Piece]:
    fused = f"{prefix}gate_up_proj.weight"
    if fused in source.files:
        rows = source.files.shape(fused)[0]
        yield source.matrix(f"blk.{layer}.ffn_gate.weight", fused, 0, rows // 2)
        yield source.matrix(f"blk.{layer}.ffn_up.weight", fused, rows // 2, rows)
    else:
        for part in ("gate", "up"):
            yield source.matrix(f"blk.{layer}.ffn_{part}.weight", f"{prefix}{part}_proj.weight")
    yield source.matrix(f"blk.{layer}.ffn_down.weight", f"{prefix}down_proj.weight")


def _check_floor(source: Source, mixers: dict[int, Any]) -> None:
    """Raises UserError where the floor of rad_rwkv6's decay can be reached."""
    for layer, mixer in mixers.items():
        if count := rwkv6qwen2.floor_reached(source, mixer, f"model.layers.{layer}.self_attn."):
            what = f"the floor of the decay (exp(-5)), which {count} of {mixer.shape.width} channels of layer {layer}"
            raise UserError(_lacks(rwkv6qwen2.NAME, f"{what} can reach"))
