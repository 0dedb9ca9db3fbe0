"""The names by which llama.cpp knows how byte-level BPE tokenizers split text before they merge.

llama.cpp has the expressions in its own code (src/llama-vocab.cpp) and a file only names them (`tokenizer.ggml.pre`).
The name is found here by what `tokenizer.json` says, so an unknown way to split is refused and never guessed. Text is
normalised by neither: of tokenizers that do (NFC, as Qwen2's) text in another form may have other tokens there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from radlads.tasks.contracts.errors import UserError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{words}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{words}"
    r"|\p{N}{digits}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BY_THREE = rf"{_WORDS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_BY_ONE = rf"{_WORDS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_TEKKEN = _CASED.replace("{words}", "").replace("{digits}", "")
_GPT_4O = _CASED.replace("{words}", f"{_WORDS}?").replace("{digits}", "{1,3}")

# (steps, whether a word that is a token is not merged) → name. A step: `gpt2`, the expression of GPT-2; `digits`, each
# for itself; or an expression. A name stands for an expression and for whether whole words are looked up first.
_NAMES = {
    (("gpt2",), False): "gpt-2",
    (("digits", "gpt2"), False): "smollm",
    ((_BY_THREE,), True): "llama-bpe",
    ((_BY_THREE,), False): "dbrx",
    ((_BY_ONE,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
    ((_GPT_4O,), False): "gpt-4o",
}


def pretokenizer_name(state: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a byte-level BPE splits text; state: `tokenizer.json`. Raises UserError without one."""
    kind = (state.get("normalizer") or {"type": "NFC"}).get("type")
    if kind != "NFC":
        raise UserError(f"no GGUF file of this tokenizer: llama.cpp does not normalise text by {kind}")
    steps = tuple(_steps(state.get("pre_tokenizer")))
    key = (steps, bool(state["model"].get("ignore_merges", False)))
    if key not in _NAMES:
        how = " then ".join(steps) or "nothing"
        raise UserError(
            f"no GGUF file of this tokenizer: llama.cpp has no name for how it splits text ({how[:120]}"
            f"{', whole words first' * key[1]})"
        )
    return _NAMES[key]


def _steps(split: Any) -> list[str]:
    """The steps of a pre-tokenizer; one that is unknown is named by its type and settings, and is in no table."""
    if split is None:
        return []
    kind = split.get("type")
    if kind == "Sequence":
        return [step for part in split["pretokenizers"] for step in _steps(part)]
    if kind == "ByteLevel" and not split.get("add_prefix_space", True):
        return ["gpt2"] if split.get("use_regex", True) else []
    if kind == "Digits" and split.get("individual_digits"):
        return ["digits"]
    whole = (split.get("behavior"), bool(split.get("invert"))) in (("Isolated", False), ("Removed", True))
    if kind == "Split" and whole and "Regex" in split.get("pattern", {}):
        return [str(split["pattern"]["Regex"])]
    return [str(dict(split))]
