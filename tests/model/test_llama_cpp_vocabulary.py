"""Tokenizers as GGUF files have them: names of ways to split text, kinds of tokens, scores, what is refused."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from radlads.model.llama_cpp.vocabulary import Kind, Vocabulary, read_vocabulary
from radlads.tasks.contracts.errors import UserError

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT_4O = TEKKEN.replace("]+|[^\\r\\n\\p{L}", "]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\\r\\n\\p{L}").replace(
    "]*|\\p{N}|", "]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\\p{N}{1,3}|"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def of_bytes(split: Any, *, whole_words: bool = False, **changes: Any) -> PreTrainedTokenizerBase:
    letters = {text: i for i, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(letters | {"ab": 256}, [("a", "b")], ignore_merges=whole_words))
    core.pre_tokenizer = split
    core.add_special_tokens(["<s>", "</s>"])
    core.add_tokens(["<tool>"])
    for name, value in changes.items():
        setattr(core, name, value)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def by(expression: str, **changes: Any) -> pre_tokenizers.PreTokenizer:
    how = {"behavior": "isolated", **changes}
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), **how), BYTES])


GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
NAMES = {
    "gpt-2": of_bytes(GPT_2),
    "smollm": of_bytes(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT_2])),
    "llama-bpe": of_bytes(by(LLAMA_3), whole_words=True),
    "dbrx": of_bytes(by(LLAMA_3, behavior="removed", invert=True)),
    "qwen2": of_bytes(by(QWEN_2), normalizer=normalizers.NFC()),
    "tekken": of_bytes(by(TEKKEN), whole_words=True),
    "gpt-4o": of_bytes(by(GPT_4O)),
}


@pytest.mark.parametrize("name", NAMES)
def test_how_text_is_split_has_llama_cpps_name(name: str) -> None:
    found = read_vocabulary(NAMES[name], 300)
    assert (found.model, found.pre, found.merges, found.scores) == ("gpt2", name, ["a b"], None)
    assert (found.tokens[256], found.kinds[256]) == ("ab", Kind.NORMAL)
    assert [(t, found.kinds[i]) for i, t in enumerate(found.tokens) if t in ("<s>", "<tool>", "[PAD299]")] == [
        ("<s>", Kind.CONTROL),
        ("<tool>", Kind.USER_DEFINED),
        ("[PAD299]", Kind.UNUSED),
    ]
    assert (found.add_bos, found.add_eos, found.add_space_prefix) == (False, False, False)
    assert found.ids == {"bos": 257, "eos": 258}


def around(single: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=single, special_tokens=[("<s>", 257), ("</s>", 258), ("<tool>", 259)])


def test_what_is_added_to_a_text() -> None:
    both = read_vocabulary(of_bytes(GPT_2, post_processor=around("<s> $A </s>")), 260)
    assert (both.add_bos, both.add_eos) == (True, True)
    begin = read_vocabulary(of_bytes(GPT_2, post_processor=around("<s> $A")), 260)
    assert (begin.add_bos, begin.add_eos) == (True, False)


def test_a_chat_template_goes_along() -> None:
    tokenizer = of_bytes(GPT_2)
    assert read_vocabulary(tokenizer, 260).chat_template is None
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "other"}
    assert read_vocabulary(tokenizer, 260).chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (of_bytes(by(QWEN_2), whole_words=True), "no name for how it splits text .*, whole words first"),
        (of_bytes(by(r"\w+")), r"no name for how it splits text \(\\w\+\)"),
        (of_bytes(by(QWEN_2, behavior="merged_with_next")), "no name for how it splits text"),
        (of_bytes(pre_tokenizers.ByteLevel(add_prefix_space=True)), "no name for how it splits text"),
        (of_bytes(BYTES), r"splits text \(nothing\)"),
        (of_bytes(GPT_2, normalizer=normalizers.Lowercase()), "does not normalise text by Lowercase"),
        (of_bytes(GPT_2, post_processor=around("<tool> $A")), "adds other tokens to a text"),
        (
            PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))),
            "and this is WordLevel",
        ),
    ],
)
def test_what_llama_cpp_does_not_have_is_one_line(tokenizer: PreTrainedTokenizerBase, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read_vocabulary(tokenizer, 300)
    assert "\n" not in str(caught.value)


def test_ids_beyond_the_embeddings_are_refused() -> None:
    with pytest.raises(UserError, match="it has the id 259, and the model's embeddings have 259 rows"):
        read_vocabulary(of_bytes(GPT_2), 259)


def test_tokens_that_take_spaces_along_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = of_bytes(GPT_2)
    tokenizer.add_tokens(AddedToken("<think>", rstrip=True, special=True))
    with caplog.at_level(logging.WARNING, "radlads"):
        read_vocabulary(tokenizer, 300)
    assert "spaces beside <think>" in caplog.text


def sentencepiece(merges: list[tuple[str, str]], *extra: str, **changes: Any) -> PreTrainedTokenizerBase:
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "c"]
    texts += list(dict.fromkeys(left + right for left, right in merges)) + list(extra)
    core = Tokenizer(
        models.BPE({t: i for i, t in enumerate(texts)}, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.add_tokens(["▁x"])
    for name, value in changes.items():
        setattr(core, name, value)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


METASPACE = pre_tokenizers.Metaspace()
PAIRS = [("a", "b"), ("▁", "a"), ("▁a", "b"), ("▁", "ab"), ("b", "c")]


def spm(vocabulary: Vocabulary, text: str) -> list[int]:
    """llama.cpp's SentencePiece: the neighbours whose union has the highest score are joined, leftmost first."""
    assert vocabulary.scores is not None
    ids = {t: i for i, t in enumerate(vocabulary.tokens)}
    parts = list((" " * vocabulary.add_space_prefix + text).replace(" ", "▁"))
    while True:
        unions = [a + b for a, b in pairwise(parts)]
        joined = [(vocabulary.scores[ids[union]], -i) for i, union in enumerate(unions) if union in ids]
        if not joined:
            break
        at = -max(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    out: list[int] = []
    for part in parts:
        out += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return out


def test_sentencepiece_has_scores_in_the_order_of_its_pairs() -> None:
    tokenizer = sentencepiece(PAIRS)
    found = read_vocabulary(tokenizer, 272)
    assert (found.model, found.pre, found.merges, found.add_space_prefix) == ("llama", "default", None, True)
    assert found.ids == {"bos": 1, "eos": 2, "unk": 0}
    assert found.kinds[:4] == [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL, Kind.BYTE]
    assert (found.tokens[-5:], found.kinds[-5:-3]) == ([" x", *(f"[PAD{i}]" for i in range(268, 272))], [4, 5])
    for text in ("abc", "ab abc cab", "aé bc"):
        assert spm(found, text) == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("scheme", "prefix", "warned"), [("always", True, False), ("first", True, True), ("never", False, False)]
)
def test_newer_sentencepiece_says_where_it_puts_spaces(
    scheme: str, prefix: bool, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    split = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    with caplog.at_level(logging.WARNING, "radlads"):
        found = read_vocabulary(sentencepiece(PAIRS, normalizer=None, pre_tokenizer=split), 270)
    assert found.add_space_prefix == prefix
    assert bool(caplog.text) == warned


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (sentencepiece([("a", "b"), ("b", "c"), ("a", "bc"), ("▁", "a"), ("ab", "c")]), "pairs of 'abc' are not"),
        (sentencepiece(PAIRS, "cab"), "its token 'cab' is made by no pair"),
        (sentencepiece(PAIRS, normalizer=normalizers.NFKC()), "does not normalise text by NFKC"),
        (sentencepiece(PAIRS, normalizer=None, pre_tokenizer=METASPACE), "splits no text by Metaspace"),
        (sentencepiece(PAIRS, normalizer=None), "splits no text by nothing"),
    ],
)
def test_other_sentencepiece_is_refused(tokenizer: PreTrainedTokenizerBase, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_vocabulary(tokenizer, 300)


@pytest.mark.parametrize("name", ["stories260K", "babyllama_tok361"])
def test_real_sentencepiece(name: str, shared_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "teachers" / name)
    found = read_vocabulary(tokenizer, len(tokenizer))
    assert (found.model, found.add_bos, found.add_eos) == ("llama", True, False)
    for text in ("Once upon a time, there was a little girl named Lily.", "She said: “Oh, näive!”\n\n  12345"):
        assert spm(found, text) == tokenizer(text, add_special_tokens=False).input_ids


def test_real_qwen2(shared_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "qwen2")
    found = read_vocabulary(tokenizer, 151_936)
    assert (found.pre, len(found.tokens), found.tokens[151_644]) == ("qwen2", 151_936, "<|im_start|>")
    assert found.chat_template == tokenizer.chat_template
