"""Text → token ids, with the same rules for documents, chats and prompts.

Control tokens (a tokenizer's special tokens) are added by the document frame (BOS, EOS) or by a chat template. Their
text inside a document or message is encoded as plain text, unless parsing is requested. Added tokens that are not
special (`<think>`, `<tool_call>`) are vocabulary and always recognised.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from radlads.tasks.contracts.errors import UserError

# A Unicode noncharacter. _MARK and a private-use character represent one control token.
_MARK = "\ufdd0"
_FIRST_PRIVATE = 0xF0000


@dataclass(frozen=True)
class Control:
    """A control token written by a template: characters [start, end) of a rendered chat."""

    start: int
    end: int
    number: int
    """Index into `TokenEncoder.specials`."""


@dataclass
class TokenEncoder:
    """Encodes text with one tokenizer."""

    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def specials(self) -> tuple[str, ...]:
        """Texts of the control tokens, longest first, so that alternation matches the longest."""
        added = self.tokenizer.added_tokens_decoder.values()
        texts = {token.content for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        known = (text for text in texts if text.strip() and self._id(text) is not None)
        return tuple(sorted(known, key=lambda text: (-len(text), text)))

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Text of a control token → its index in `specials`."""
        return {text: number for number, text in enumerate(self.specials)}

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches the text of any control token."""
        return re.compile("|".join(map(re.escape, self.specials)) or r"(?!)")

    def count_specials(self, text: str) -> int:
        """Number of occurrences of control-token text."""
        return sum(1 for _ in self.special_pattern.finditer(text))

    def encode_texts(
        self, texts: Sequence[str], *, parse: bool = False, offsets: bool = False
    ) -> list[tuple[list[int], np.ndarray | None]]:
        """(ids, spans) of each text, without BOS or EOS. spans: character range [start, end) per token, [tokens, 2],
        or None unless `offsets` is set and the tokenizer is fast.

        parse: recognise control tokens. Raises UserError if the tokenizer produces them from plain text anyway.
        """
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=not parse,
            return_attention_mask=False,
            return_offsets_mapping=offsets and self.tokenizer.is_fast,
            verbose=False,
        )
        if not parse:
            self._check_plain(encoded["input_ids"])
        spans = encoded.get("offset_mapping") or [None] * len(texts)
        return [
            (ids, None if places is None else np.array(places, np.int64).reshape(-1, 2))
            for ids, places in zip(encoded["input_ids"], spans, strict=True)
        ]

    def encode_rendered(self, text: str, controls: Sequence[Control]) -> tuple[list[int], np.ndarray, np.ndarray]:
        """(ids, spans [tokens, 2], is_control [tokens]) of a rendered chat; only `controls` become control tokens.
        Raises UserError without a fast tokenizer."""
        pieces: list[str] = []
        # Offset in the marked text → offset in the text. A control token is two characters in the marked text.
        places: list[np.ndarray] = []
        at = 0
        for control in controls:
            pieces += [text[at : control.start], self._marks[control.number]]
            places += [np.arange(at, control.start), np.array([control.start, control.end])]
            at = control.end
        pieces.append(text[at:])
        places.append(np.arange(at, len(text) + 1))
        place_of = np.concatenate(places)
        encoded = self._marked_backend.encode("".join(pieces), add_special_tokens=False)
        ids = [self._id_of_mark.get(i, i) for i in encoded.ids]
        marked = np.array(encoded.offsets, np.int64).reshape(-1, 2)
        starts, ends = place_of[marked[:, 0]], place_of[marked[:, 1]]
        is_control = np.fromiter((i in self._id_of_mark for i in encoded.ids), np.bool_, len(ids))
        return ids, np.stack([starts, ends], axis=1), is_control

    def _check_plain(self, ids: Sequence[list[int]]) -> None:
        if self._suspicious:
            for row in ids:
                if not self._suspicious.isdisjoint(row):
                    token = self.tokenizer.convert_ids_to_tokens(next(i for i in row if i in self._suspicious))
                    raise UserError(
                        f"this tokenizer encodes the plain text of the control token '{token}' as that token; set "
                        "special_tokens: parse on the source to accept this"
                    )

    @cached_property
    def _suspicious(self) -> frozenset[int]:
        ids = {self._id(text) for text in self.specials}
        return frozenset(i for i in ids if i is not None and i != self.tokenizer.unk_token_id)

    def _id(self, text: str) -> int | None:
        token_id: Any = self.tokenizer.convert_tokens_to_ids(text)
        return token_id if token_id != self.tokenizer.unk_token_id or text == self.tokenizer.unk_token else None

    @cached_property
    def _marks(self) -> tuple[str, ...]:
        return tuple(_MARK + chr(_FIRST_PRIVATE + number) for number in range(len(self.specials)))

    @cached_property
    def _marked_backend(self) -> Tokenizer:
        """The tokenizer with each control token renamed to its mark; the original name is plain text to it."""
        if not self.tokenizer.is_fast:
            raise UserError("chats need a fast tokenizer (tokenizer.json), which reports token positions")
        backend = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        known = {token.content: token for token in self.tokenizer.added_tokens_decoder.values()}
        backend.add_tokens(
            [
                AddedToken(
                    mark,
                    single_word=False,
                    lstrip=text in known and known[text].lstrip,
                    rstrip=text in known and known[text].rstrip,
                    normalized=False,
                    special=False,
                )
                for mark, text in self._pairs
            ]
        )
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def _id_of_mark(self) -> dict[int, int]:
        ids = {self._marked_backend.token_to_id(mark): self._id(text) for mark, text in self._pairs}
        return {mark: known for mark, known in ids.items() if mark is not None and known is not None}

    @property
    def _pairs(self) -> Iterator[tuple[str, str]]:
        return zip(self._marks, self.specials, strict=True)


@dataclass(frozen=True)
class Frame:
    """The tokens around a document: BOS before, EOS after; None: no such token."""

    bos: int | None
    eos: int | None

    @property
    def before(self) -> tuple[int, ...]:
        """Tokens to put before a text without control tokens."""
        return () if self.bos is None else (self.bos,)

    def around(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """(before, after): tokens to add so that there is exactly one BOS and one EOS."""
        before = [token for token in self.before if token not in ids[:1]]
        # If BOS and EOS are the same token, a leading BOS does not count as EOS.
        words = ids[1:] if self.before and not before else ids
        after = [] if self.eos is None or self.eos in words[-1:] else [self.eos]
        return before, after


BARE = Frame(None, None)
"""A frame without tokens."""


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text: no BOS or EOS, and control-token text is plain text."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)[
        "input_ids"
    ]
    return ids


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer adds BOS by default, as in generation and the evaluation harness."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def prompt_frame(tokenizer: PreTrainedTokenizerBase, add_bos: bool | None = None) -> Frame:
    """The frame of a prompt. add_bos None: the tokenizer's default. Raises UserError if there is no BOS token."""
    if add_bos and tokenizer.bos_token_id is None:
        raise UserError("add_bos is on, but the tokenizer has no BOS token")
    with_bos = adds_bos(tokenizer) if add_bos is None else add_bos
    return Frame(tokenizer.bos_token_id if with_bos else None, None)
