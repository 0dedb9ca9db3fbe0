"""Documents → token ids, with what later stages must know of every document and of every held-out token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from radlads.tasks.job import UserError
from radlads.tasks.jobs.chat import render_chat
from radlads.tasks.jobs.common import write_json
from radlads.tasks.jobs.documents import Document

_ARRAYS = ("ids", "lengths", "num_bytes", "hashes", "heldout", "mask", "token_bytes")


@dataclass(frozen=True)
class Part:
    """Some consecutive documents, encoded. Flat arrays: `ids` and `mask` of all, `token_bytes` of the held-out ones."""

    ids: np.ndarray
    """Tokens, EOS of every document included."""
    lengths: np.ndarray
    """Tokens of each document."""
    num_bytes: np.ndarray
    """UTF-8 bytes of each document's text."""
    hashes: np.ndarray
    """First 64 bits of the sha256 of each document."""
    heldout: np.ndarray
    """Whether each document is held out."""
    mask: np.ndarray
    """1 where a token counts as a label in assistant-only training; empty when the dataset has no chats."""
    token_bytes: np.ndarray
    """UTF-8 bytes that each token of the held-out documents stands for; they sum to num_bytes. EOS and BOS: 0."""
    state: dict[str, Any]
    """Where the reader stood after these documents."""

    def save(self, folder: Path) -> None:
        """Write into a folder that appears whole or not at all."""
        temporary = folder.with_name(f".{folder.name}")
        temporary.mkdir(parents=True, exist_ok=True)
        for name in _ARRAYS:
            np.save(temporary / f"{name}.npy", getattr(self, name), allow_pickle=False)
        write_json(temporary / "state.json", self.state)
        temporary.rename(folder)

    @classmethod
    def load(cls, folder: Path) -> Part:
        """Open a saved part; the arrays stay on disk until they are read."""
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
        return cls(**arrays, state=json.loads((folder / "state.json").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Encoder:
    """Turns documents into a Part; the same documents give the same Part on every machine and in every process."""

    tokenizer: PreTrainedTokenizerBase
    add_bos: bool
    heldout_fraction: float
    with_mask: bool

    def encode(self, documents: Sequence[Document], state: dict[str, Any]) -> Part:
        """Encode in order. Raises UserError for a chat that its template refuses."""
        chats = [render_chat(self.tokenizer, d.messages) if d.messages is not None else None for d in documents]
        texts = [c.text if c else (d.text or "") for c, d in zip(chats, documents, strict=True)]
        hashes = [document_hash(document) for document in documents]
        heldout = [is_heldout(value, self.heldout_fraction) for value in hashes]
        offsets_needed = [c is not None or h for c, h in zip(chats, heldout, strict=True)]
        ids, offsets = self._tokenize(texts, offsets_needed)

        masks: list[np.ndarray] = []
        token_bytes: list[np.ndarray] = []
        for index, text in enumerate(texts):
            chat, spans = chats[index], offsets[index]
            if self.with_mask:
                masks.append(_chat_mask(spans, chat.assistant_spans) if chat else np.ones(len(ids[index]), np.uint8))
            if heldout[index]:
                token_bytes.append(_bytes_per_token(text, spans, len(ids[index])))
        frame = _Frame(self.tokenizer.bos_token_id if self.add_bos else None, self.tokenizer.eos_token_id)
        chat_end = [0 if chat else 1 for chat in chats]
        return Part(
            ids=_flat([frame.ids(i) for i in ids], np.uint32),
            lengths=np.array([len(i) + frame.extra for i in ids], np.int64),
            num_bytes=np.array([len(text.encode()) for text in texts], np.int64),
            hashes=np.array(hashes, np.uint64),
            heldout=np.array(heldout, np.bool_),
            mask=_flat([frame.wrap(m, end) for m, end in zip(masks, chat_end, strict=True)] if masks else [], np.uint8),
            token_bytes=_flat([frame.wrap(b, 0) for b in token_bytes], np.uint32),
            state=state,
        )

    def _tokenize(
        self, texts: list[str], offsets_needed: list[bool]
    ) -> tuple[list[list[int]], list[np.ndarray | None]]:
        """ids [documents][tokens] and, where needed and known, character spans [tokens, 2]."""
        ids: list[list[int]] = [[] for _ in texts]
        offsets: list[np.ndarray | None] = [None for _ in texts]
        for wanted in (False, True):
            chosen = [i for i, needed in enumerate(offsets_needed) if needed == wanted]
            if not chosen:
                continue
            encoded = self.tokenizer(
                [texts[i] for i in chosen],
                add_special_tokens=False,
                return_attention_mask=False,
                return_offsets_mapping=wanted and self.tokenizer.is_fast,
                verbose=False,
            )
            for position, i in enumerate(chosen):
                ids[i] = encoded["input_ids"][position]
                if "offset_mapping" in encoded:
                    offsets[i] = np.array(encoded["offset_mapping"][position], np.int64).reshape(-1, 2)
        return ids, offsets


@dataclass(frozen=True)
class _Frame:
    """What stands around a document's tokens: perhaps BOS before, always EOS after."""

    bos: int | None
    eos: int

    @property
    def extra(self) -> int:
        return 1 if self.bos is None else 2

    def ids(self, ids: list[int]) -> list[int]:
        return [*([] if self.bos is None else [self.bos]), *ids, self.eos]

    def wrap(self, values: np.ndarray, end: int) -> np.ndarray:
        before = np.zeros(self.extra - 1, values.dtype)
        return np.concatenate([before, values, np.array([end], values.dtype)])


def document_hash(document: Document) -> int:
    """First 64 bits of the sha256 of a document's text."""
    return int.from_bytes(hashlib.sha256(document.canonical.encode()).digest()[:8], "big")


def is_heldout(value: int, fraction: float) -> bool:
    """Whether a document with this hash is held out; equal texts always go the same way."""
    return value < int(fraction * 2**64)


def _flat(pieces: list[Any], dtype: Any) -> np.ndarray:
    return np.concatenate([np.asarray(p, dtype) for p in pieces]) if pieces else np.zeros(0, dtype)


def _chat_mask(spans: np.ndarray | None, assistant: Sequence[tuple[int, int]]) -> np.ndarray:
    """1 for the tokens whose characters overlap what the assistant said. [tokens]"""
    if spans is None:
        raise UserError("chats need a fast tokenizer (tokenizer.json), which tells where in the text each token is")
    mask = np.zeros(len(spans), np.uint8)
    for start, end in assistant:
        mask[(spans[:, 0] < end) & (spans[:, 1] > start)] = 1
    return mask


def _bytes_per_token(text: str, spans: np.ndarray | None, num_tokens: int) -> np.ndarray:
    """UTF-8 bytes of each token, telescoping over the ends of their spans so that they sum to the whole text.

    Without spans (slow tokenizers) the bytes are spread evenly over the document.
    """
    total = len(text.encode())
    if num_tokens == 0:
        return np.zeros(0, np.uint32)
    if spans is None:
        ends = np.arange(1, num_tokens + 1, dtype=np.int64) * total // num_tokens
    else:
        ends = np.maximum.accumulate(spans[:, 1] if text.isascii() else _byte_ends(text)[spans[:, 1]])
        ends[-1] = total
    return np.diff(ends, prepend=0).astype(np.uint32)


def _byte_ends(text: str) -> np.ndarray:
    """UTF-8 bytes before each character position. [characters + 1]"""
    code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (code_points >= 0x80).astype(np.int64) + (code_points >= 0x800) + (code_points >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)])
