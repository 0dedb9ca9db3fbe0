"""Write a student as one GGUF file: header and settings by the package gguf, tensors streamed behind them."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from radlads.model.llama_cpp.graphs import GraphStudent
from radlads.model.llama_cpp.pieces import Piece
from radlads.model.llama_cpp.vocabulary import Vocabulary
from radlads.model.weights.finite import check_finite
from radlads.tasks.contracts.errors import UserError

# Type → its names in the package gguf: of a tensor, of a whole file.
_TYPES = {
    torch.float32: ("F32", "ALL_F32"),
    torch.float16: ("F16", "MOSTLY_F16"),
    torch.bfloat16: ("BF16", "MOSTLY_BF16"),
}
_NO_PACKAGE = "writing a GGUF file needs the package gguf: pip install 'radlads[gguf]'"
_QUANTIZATION_VERSION = 2  # ggml's, which its readers ask for


@dataclass(frozen=True)
class Card:
    """What a model's card says of it."""

    name: str
    license: str | None = None
    base_models: tuple[str, ...] = ()
    """Ids on the hub, OWNER/NAME."""


def write_gguf(
    student: GraphStudent, vocabulary: Vocabulary, card: Card, target: Path, *, dtype: torch.dtype | None = None
) -> None:
    """Write `target`, which must not exist, under another name first; what was begun is removed if anything is raised.

    dtype: of matrices, fp32, fp16 or bf16; None: as the student's are. Vectors and low-rank factors are fp32. At most
    64 MiB of a matrix in fp32 are held, of one that is made anew the whole. Raises UserError: the file exists, the
    package gguf is missing, a value is not finite or does not fit `dtype`.
    """
    dtype = _dtype(student, dtype)
    _refuse_existing(target)
    writer = _header(student, vocabulary, card, dtype)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        try:
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        with partial.open("ab") as stream:
            for piece in student.pieces:
                _pad(stream, writer.data_alignment)
                _write_piece(stream, piece, dtype)
            _pad(stream, writer.data_alignment)
            stream.flush()
            os.fsync(stream.fileno())
        _refuse_existing(target)  # which another process may have made meanwhile
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise UserError(f"{target} exists already; name a new file")


def _dtype(student: GraphStudent, dtype: torch.dtype | None) -> torch.dtype:
    stored = dtype or student.files.dtype("model.embed_tokens.weight")
    if stored not in _TYPES:
        raise UserError(f"the student's weights are {stored}: name --dtype f16, bf16 or f32")
    return stored


def _header(student: GraphStudent, vocabulary: Vocabulary, card: Card, dtype: torch.dtype) -> Any:
    """A writer that knows all but the tensors' bytes."""
    try:
        import gguf
    except ImportError as error:
        raise UserError(_NO_PACKAGE) from error
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it tells of every file
    writer = gguf.GGUFWriter(None, student.name)
    _add_card(writer, card)
    writer.add_file_type(gguf.LlamaFileType[_TYPES[dtype][1]])
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    config, shape = student.config, student.mixers[0].shape
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_wkv_head_size(shape.head_dim)
    writer.add_token_shift_count(1)
    writer.add_head_count(0)  # asked for and not used
    student.graph.add_settings(writer, student.mixers)
    _add_vocabulary(writer, vocabulary)
    for piece in student.pieces:
        stored = torch.float32 if piece.wide else dtype
        size = stored.itemsize * torch.Size(piece.shape).numel()
        kind = gguf.GGMLQuantizationType[_TYPES[stored][0]]
        writer.add_tensor_info(piece.name, piece.shape, None, size, raw_dtype=kind)
    return writer


def _add_card(writer: Any, card: Card) -> None:
    writer.add_type("model")
    writer.add_name(card.name)
    if card.license:
        writer.add_license(card.license)
    if card.base_models:
        writer.add_base_model_count(len(card.base_models))
    for i, model in enumerate(card.base_models):
        owner, _, name = model.rpartition("/")
        writer.add_base_model_name(i, name)
        if owner:
            writer.add_base_model_organization(i, owner)
            writer.add_base_model_repo_url(i, f"https://huggingface.co/{model}")


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([int(kind) for kind in vocabulary.kinds])
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    for name, value in vocabulary.ids.items():
        getattr(writer, f"add_{name}_token_id")(value)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _pad(stream: BinaryIO, alignment: int) -> None:
    stream.write(bytes(-stream.tell() % alignment))


def _write_piece(stream: BinaryIO, piece: Piece, dtype: torch.dtype) -> None:
    stored, written = torch.float32 if piece.wide else dtype, 0
    for block in piece.blocks():
        converted = block.to(stored).contiguous()
        origin = piece.sources[0] if piece.sources else piece.name
        check_finite(f"the student's tensor {origin}", converted, source=block, mend="no file was written")
        stream.write(memoryview(converted.view(-1).view(torch.uint8).numpy()))
        written += converted.numel()
    if written != torch.Size(piece.shape).numel():
        raise ValueError(f"{piece.name} has {written} values, not those of {piece.shape}")
