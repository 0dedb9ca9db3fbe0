"""Recall text: prompts hold their fact at the depth asked for, fit their length, and are the same for the same seed."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.jobs.data.text.recall import build_case, build_document, build_quiz, draw_facts, load_filler
from radlads.tasks.jobs.data.text.token_encoder import prompt_frame

FILLER = [f"This is filler sentence number {word}." for word in "one two three four five six seven eight".split()]


@pytest.fixture(scope="module")
def tokenizer(project_root: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(project_root / "deployments" / "demo" / "tokenizer")


@pytest.mark.parametrize("length", [96, 256, 700])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_prompt_fits_its_length_and_holds_the_fact_at_its_depth(
    tokenizer: PreTrainedTokenizerBase, length: int, depth: float
) -> None:
    case = build_case(tokenizer, FILLER, length=length, depth=depth, rng=random.Random(7))
    assert length - 24 < len(case.prompt_ids) <= length
    assert case.prompt_ids == tokenizer(case.prompt, add_special_tokens=False)["input_ids"]
    haystack, question = case.prompt.rsplit("What does", 1)
    assert case.answer in haystack
    assert case.answer not in question
    assert haystack.index(" says ") / len(haystack) == pytest.approx(depth, abs=0.25)


def test_a_prompts_bos_counts_in_its_length(tokenizer: PreTrainedTokenizerBase) -> None:
    frame = prompt_frame(tokenizer, True)
    case = build_case(tokenizer, FILLER, length=128, depth=0.5, rng=random.Random(7), frame=frame)
    assert case.prompt_ids == [tokenizer.bos_token_id, *tokenizer(case.prompt, add_special_tokens=False)["input_ids"]]
    assert 104 < len(case.prompt_ids) <= 128
    assert prompt_frame(tokenizer) == prompt_frame(tokenizer, False)  # this tokenizer puts none by itself


def test_a_control_token_in_a_haystack_is_text(tokenizer: PreTrainedTokenizerBase) -> None:
    filler = [f"{sentence} <|endoftext|>" for sentence in FILLER]
    case = build_case(tokenizer, filler, length=400, depth=0.5, rng=random.Random(7))
    quiz = build_quiz(tokenizer, filler, length=400, rng=random.Random(7))
    for text, ids in ((case.prompt, case.prompt_ids), (quiz.text, quiz.ids)):
        assert "<|endoftext|>" in text
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_distractors_have_other_keys_and_are_not_the_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    case = build_case(tokenizer, FILLER, length=400, depth=0.5, rng=random.Random(1), num_facts=5)
    assert case.prompt.count(" says ") == 5
    assert case.prompt.count(case.answer) == 1


def test_same_seed_same_text_and_other_seed_other_text(tokenizer: PreTrainedTokenizerBase) -> None:
    def text(seed: int) -> str:
        return build_document(tokenizer, FILLER, length=200, rng=random.Random(seed))

    assert text(3) == text(3)
    assert len({text(seed) for seed in range(20)}) == 20


def test_documents_stay_near_their_length_and_ask_only_what_they_told(tokenizer: PreTrainedTokenizerBase) -> None:
    for seed in range(60):
        text = build_document(tokenizer, FILLER, length=256, rng=random.Random(seed))
        assert len(tokenizer(text)["input_ids"]) <= 256 + 160
        for piece in text.split("What does the ")[1:]:
            key, answer = piece.split(" say?")[0], piece.split(" says ")[1].split(".")[0]
            assert f"The {key} says {answer}." in text.split("What does")[0]


def test_a_long_document_holds_as_many_facts_as_are_asked_for(tokenizer: PreTrainedTokenizerBase) -> None:
    def counts(most: int | None) -> list[int]:
        rng = [random.Random(seed) for seed in range(40)]
        return [build_document(tokenizer, FILLER, length=2048, rng=r, most_facts=most).count(" say? ") for r in rng]

    assert max(counts(None)) <= 10
    assert 20 < max(counts(40)) <= 40
    assert max(counts(1)) == 1
    unchanged = build_document(tokenizer, FILLER, length=256, rng=random.Random(2), most_facts=None)
    assert unchanged == build_document(tokenizer, FILLER, length=256, rng=random.Random(2))


def test_too_short_a_prompt_and_too_many_facts_are_told(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="is too short for its fact and question"):
        build_case(tokenizer, FILLER, length=8, depth=0.5, rng=random.Random(0))
    with pytest.raises(UserError, match="distinct keys"):
        draw_facts(random.Random(0), 100_000)


def test_filler_files_are_split_at_the_separator(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("One cat. Two dogs!<end>Three birds?", encoding="utf-8")
    assert load_filler([path], "<end>") == ["One cat.", "Two dogs!", "Three birds?"]
    (tmp_path / "empty.txt").write_text(" ", encoding="utf-8")
    with pytest.raises(UserError, match="no sentences"):
        load_filler([tmp_path / "empty.txt"])


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("One cat. Two dogs!", encoding="utf-8")
    assert load_filler([path]) == load_filler([path]) == ["One cat.", "Two dogs!"]
    path.write_text("Three birds. Four.", encoding="utf-8")
    os.utime(path, ns=(0, 0))
    assert load_filler([path]) == ["Three birds.", "Four."]
    with pytest.raises(UserError, match=r"gone\.txt: cannot be read: No such file"):
        load_filler([tmp_path / "gone.txt"])
