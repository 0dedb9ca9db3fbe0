"""Documents → token ids, with per-document metadata and the byte counts of held-out tokens."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from radlads.tasks.contracts.recipe.recipe import FilesSource, HubSource, Source
from radlads.tasks.jobs.data.text.chat import ChatTemplate, open_chat_template
from radlads.tasks.jobs.data.text.documents import Document
from radlads.tasks.jobs.data.text.token_encoder import Frame, TokenEncoder


@dataclass(frozen=True)
class Part:
    """Consecutive documents, encoded, as flat arrays. `token_bytes` covers the held-out documents only."""

    ids: np.ndarray
    """Token ids, including the BOS and EOS of each document."""
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
    """UTF-8 bytes of text per token of the held-out documents; they sum to num_bytes. EOS and BOS: 0."""
    state: dict[str, Any]
    """State of the reader after these documents."""
    counts: dict[str, int] = field(default_factory=dict)
    """Occurrences by kind: special_tokens_as_text, special_tokens_parsed, replaced_characters,
    chats_without_assistant."""

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return len(self.ids)

    @property
    def train_tokens(self) -> int:
        """Tokens of the documents that are not held out."""
        return int(np.asarray(self.lengths)[~np.asarray(self.heldout)].sum())


@dataclass
class _Encoded:
    """One tokenized document, before framing."""

    text: str
    ids: list[int]
    spans: np.ndarray | None
    """Character range of each token; None if not needed or not known."""
    mask: list[int] | None = None
    """Assistant mask of a chat; None for plain text."""


@dataclass(frozen=True)
class Encoder:
    """Encodes documents into a Part; deterministic across machines and processes."""

    tokenizer: PreTrainedTokenizerBase
    add_bos: bool
    heldout_fraction: float
    with_mask: bool
    sources: Sequence[Source] = ()
    """The sources that `Document.source` indexes; a document without one is encoded with the defaults."""

    def encode(self, documents: Sequence[Document], state: dict[str, Any]) -> Part:
        """Encode in order. Raises UserError for a chat that its template rejects."""
        counts: Counter[str] = Counter()
        hashes = [document_hash(document) for document in documents]
        heldout = [is_heldout(value, self.heldout_fraction) for value in hashes]
        encoded = self._encode(documents, heldout, counts)
        frame = Frame(self.tokenizer.bos_token_id if self.add_bos else None, self.tokenizer.eos_token_id)
        ids: list[list[int]] = []
        masks: list[np.ndarray] = []
        token_bytes: list[np.ndarray] = []
        for one, held in zip(encoded, heldout, strict=True):
            before, after = frame.around(one.ids)
            ids.append([*before, *one.ids, *after])
            if self.with_mask:
                # EOS is a label after plain text; a chat already ends with an end-of-turn label.
                inner = [1] * len(one.ids) if one.mask is None else one.mask
                end = [1 if one.mask is None else 0] * len(after)
                masks.append(np.array([*([0] * len(before)), *inner, *end], np.uint8))
            if held:
                sizes = bytes_per_token(one.text, one.spans, len(one.ids))
                token_bytes.append(np.pad(sizes, (len(before), len(after))))
        counts["replaced_characters"] += sum(document.replaced for document in documents)
        return Part(
            ids=_flat(ids, np.uint32),
            lengths=np.array([len(i) for i in ids], np.int64),
            num_bytes=np.array([len(one.text.encode()) for one in encoded], np.int64),
            hashes=np.array(hashes, np.uint64),
            heldout=np.array(heldout, np.bool_),
            mask=_flat(masks, np.uint8),
            token_bytes=_flat(token_bytes, np.uint32),
            state=state,
            counts={name: count for name, count in counts.items() if count},
        )

    def _encode(self, documents: Sequence[Document], heldout: list[bool], counts: Counter[str]) -> list[_Encoded]:
        encoded: dict[int, _Encoded] = {}
        # Texts with the same tokenizer options are encoded together.
        for parse in (False, True):
            for held in (False, True):
                chosen = [
                    i
                    for i, document in enumerate(documents)
                    if document.messages is None and self._parses(document) == parse and heldout[i] == held
                ]
                texts = [documents[i].text or "" for i in chosen]
                results = self._tokens.encode_texts(texts, parse=parse, offsets=held)
                for i, text, (ids, spans) in zip(chosen, texts, results, strict=True):
                    encoded[i] = _Encoded(text, ids, spans)
                    counts[_count_of(parse)] += self._tokens.count_specials(text)
        for i, document in enumerate(documents):
            if document.messages is not None:
                encoded[i] = self._encode_chat(document, counts)
        return [encoded[i] for i in range(len(documents))]

    def _encode_chat(self, document: Document, counts: Counter[str]) -> _Encoded:
        rendered = self._template(document.source).render(document.messages or (), document.where or "a chat")
        ids, spans, mask = self._template(document.source).encode(rendered)
        counts["special_tokens_as_text"] += self._tokens.count_specials(rendered.text) - len(rendered.controls)
        counts["chats_without_assistant"] += not any(mask)
        return _Encoded(rendered.text, ids, spans, mask)

    @cached_property
    def _tokens(self) -> TokenEncoder:
        return TokenEncoder(self.tokenizer)

    @cached_property
    def _templates(self) -> dict[int, ChatTemplate]:
        return {}

    def _template(self, number: int) -> ChatTemplate:
        if number not in self._templates:
            source = self._source(number)
            name = source.chat_template if source else None
            parse = source is not None and source.special_tokens == "parse"
            self._templates[number] = open_chat_template(self._tokens, name, parse=parse)
        return self._templates[number]

    def _parses(self, document: Document) -> bool:
        source = self._source(document.source)
        return source is not None and source.special_tokens == "parse"

    def _source(self, number: int) -> FilesSource | HubSource | None:
        source = self.sources[number] if number < len(self.sources) else None
        return source if isinstance(source, FilesSource | HubSource) else None


def _count_of(parse: bool) -> str:
    return "special_tokens_parsed" if parse else "special_tokens_as_text"


def document_hash(document: Document) -> int:
    """First 64 bits of the sha256 of a document's canonical text."""
    return int.from_bytes(hashlib.sha256(document.canonical.encode()).digest()[:8], "big")


def is_heldout(value: int, fraction: float) -> bool:
    """Whether a document with this hash is held out. Equal texts always get the same split."""
    return value < int(fraction * 2**64)


def _flat(pieces: list[Any], dtype: Any) -> np.ndarray:
    return np.concatenate([np.asarray(p, dtype) for p in pieces]) if pieces else np.zeros(0, dtype)


def bytes_per_token(text: str, spans: np.ndarray | None, num_tokens: int) -> np.ndarray:
    """UTF-8 bytes per token, [num_tokens]: differences between span ends, so that they sum to the whole text.

    Without spans (slow tokenizers) the bytes are distributed evenly over the tokens.
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
    """UTF-8 byte offset of each character position, [characters + 1]."""
    code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (code_points >= 0x80).astype(np.int64) + (code_points >= 0x800) + (code_points >= 0x10000)
    return np.concatenate([[0], np.cumsum(widths)])
