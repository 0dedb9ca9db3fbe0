"""A tokenizer as a GGUF file has it: byte-level BPE, or SentencePiece's BPE with bytes for what is unknown.

Everything is read from the tokenizer that runs, not from files beside it, so that what was trained is what is written.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from transformers import PreTrainedTokenizerBase

from radlads.model.llama_cpp.pretokenizers import pretokenizer_name
from radlads.tasks.contracts.errors import UserError

logger = logging.getLogger("radlads")
_SPACE = "▁"
_NONE = "no GGUF file of this tokenizer: "


class Kind(IntEnum):
    """What a token is; GGUF's numbers (`tokenizer.ggml.token_type`)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """Every token's text and kind by its id, and how text becomes tokens."""

    model: str
    """gpt2 or llama, llama.cpp's two kinds of BPE."""
    pre: str
    tokens: list[str]
    kinds: list[Kind]
    merges: list[str] | None
    """Of gpt2: pairs, the first one merged first."""
    scores: list[float] | None
    """Of llama: a pair is merged first if its token's score is highest."""
    add_space_prefix: bool
    add_bos: bool
    add_eos: bool
    ids: dict[str, int]
    """bos, eos, unk, pad → id, where there is one."""
    chat_template: str | None


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, num_words: int) -> Vocabulary:
    """num_words: rows of the model's embeddings, of which the last ones may have no token.

    Raises UserError, one line, for a tokenizer that llama.cpp does not have.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{_NONE}it has no tokenizer.json")
    state = json.loads(backend.to_str())
    model = state["model"]
    if model.get("type") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError(f"{_NONE}llama.cpp is given byte-level and SentencePiece BPE, and this is {model.get('type')}")
    tokens, kinds = _tokens(state, num_words)
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    add_bos, add_eos = _added_at_ends(tokenizer)
    named = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    sentencepiece = bool(model.get("byte_fallback"))
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre="default" if sentencepiece else pretokenizer_name(state),
        tokens=tokens,
        kinds=kinds,
        merges=None if sentencepiece else [" ".join(pair) for pair in pairs],
        scores=_scores(tokens, kinds, pairs) if sentencepiece else None,
        add_space_prefix=sentencepiece and _space_prefix(state),
        add_bos=add_bos,
        add_eos=add_eos,
        ids={name: int(value) for name, value in named.items() if value is not None},
        chat_template=_template(tokenizer),
    )


def _tokens(state: Mapping[str, Any], num_words: int) -> tuple[list[str], list[Kind]]:
    model, sentencepiece = state["model"], bool(state["model"].get("byte_fallback"))
    tokens = [f"[PAD{i}]" for i in range(num_words)]
    kinds = [Kind.UNUSED] * num_words
    added = {token["id"]: token for token in state["added_tokens"]}
    known = {i: text for text, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
    if max(known, default=0) >= num_words:
        raise UserError(f"{_NONE}it has the id {max(known)}, and the model's embeddings have {num_words} rows")
    for i, text in known.items():
        tokens[i], kinds[i] = text, Kind.NORMAL
        if i in added and added[i]["special"]:
            kinds[i] = Kind.CONTROL
        elif i in added:
            tokens[i], kinds[i] = text.replace(_SPACE, " ") if sentencepiece else text, Kind.USER_DEFINED
        if sentencepiece and text == model.get("unk_token"):
            kinds[i] = Kind.UNKNOWN
        elif sentencepiece and i not in added and _is_byte(text):
            kinds[i] = Kind.BYTE
    strips = [one["content"] for one in added.values() if one["lstrip"] or one["rstrip"] or one["single_word"]]
    if strips:
        logger.warning("llama.cpp takes the spaces beside %s for text, which this tokenizer drops", strips[0])
    return tokens, kinds


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _scores(tokens: Sequence[str], kinds: Sequence[Kind], pairs: Sequence[tuple[str, ...]]) -> list[float]:
    """SentencePiece merges the pair whose token has the highest score; tokenizer.json has the order of all pairs.

    Raises UserError where no scores give this order: pairs of a token that are not in a row, tokens without a pair.
    """
    order: dict[str, int] = {}
    last = ""
    for left, right in pairs:
        token = left + right
        if token != last and token in order:
            raise UserError(f"{_NONE}its pairs of {token!r} are not merged one after the other, as SentencePiece does")
        order.setdefault(token, len(order))
        last = token
    whole = [t for t, kind in zip(tokens, kinds, strict=True) if kind == Kind.NORMAL and len(t) > 1 and t not in order]
    if whole:
        raise UserError(f"{_NONE}its token {whole[0]!r} is made by no pair, and llama.cpp would make it")
    return [-float(order.get(text, len(order))) for text in tokens]


def _space_prefix(state: Mapping[str, Any]) -> bool:
    """Whether text gets a space before it, of a SentencePiece tokenizer; in an old file the normalizer says so, in a
    newer one the pre-tokenizer."""
    normalizer, split = state.get("normalizer"), state.get("pre_tokenizer")
    parts = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    known, prefix = [], False
    for part in parts:
        if part["type"] == "Prepend" and part["prepend"] == _SPACE:
            prefix = True
        elif part["type"] != "Replace" or part["content"] != _SPACE or part["pattern"] != {"String": " "}:
            raise UserError(f"{_NONE}llama.cpp does not normalise text by {part['type']}")
        known.append(part["type"])
    if split is None and "Replace" in known:
        return prefix
    if split is not None and split["type"] == "Metaspace" and split["replacement"] == _SPACE and not split.get("split"):
        if split["prepend_scheme"] == "first":
            logger.warning("llama.cpp puts a space before text after control tokens too, which this tokenizer does not")
        return bool(split["prepend_scheme"] != "never")
    raise UserError(f"{_NONE}llama.cpp's SentencePiece splits no text by {(split or {}).get('type', 'nothing')}")


def _added_at_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer begins a text with bos and ends it with eos."""
    bare = list(tokenizer("a", add_special_tokens=False).input_ids)
    full = list(tokenizer("a", add_special_tokens=True).input_ids)
    for begin in (False, True):
        for end in (False, True):
            if full == [*[tokenizer.bos_token_id] * begin, *bare, *[tokenizer.eos_token_id] * end]:
                return begin, end
    raise UserError(f"{_NONE}it adds other tokens to a text than bos before it and eos behind it")


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template or None
