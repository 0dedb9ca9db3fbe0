"""RULER's tasks as recall text: prompts with answers, and nothing that judging asks."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.judging.ruler import SYNTHETIC_TASKS
from radlads.tasks.contracts.recipe.sections import Dataset, Needle, RecallSource, Ruler
from radlads.tasks.jobs.data.encode import Encoder
from radlads.tasks.jobs.data.ruler.draw import half_of
from radlads.tasks.jobs.data.text.documents import iterate_documents
from radlads.tasks.jobs.judge.ruler.prompts import make_ruler_trials

DRAWN = re.compile(r"\b(\d{7}|[0-9a-f]{8}-[0-9a-f-]{27}|(?<=VAR )[A-Z]{5})\b|(?<= for )([a-z]+-[a-z]+)(?= is:)")


@pytest.fixture(scope="module")
def tokenizer(project_root: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(project_root / "deployments" / "demo" / "tokenizer")


@pytest.fixture
def essays(tmp_path: Path) -> str:
    text = " ".join(f"Sentence {i} tells of a small house near the river." for i in range(400))
    (tmp_path / "essays.txt").write_text(text)
    return str(tmp_path / "essays.txt")


def source(**changes: Any) -> RecallSource:
    given = {"kind": "recall", "documents": 22, "ruler": SYNTHETIC_TASKS, "lengths": (1600, 2048)}
    return RecallSource(**(given | changes))


def test_documents_are_of_every_task_and_length_and_end_with_the_answer(
    tokenizer: PreTrainedTokenizerBase, essays: str
):
    asked = source(haystack=(essays,))
    texts = [document.text or "" for document in iterate_documents(asked, tokenizer=tokenizer)]
    sizes = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert all(0.9 * length < size <= length for size, length in zip(sizes, (1600, 2048) * 11, strict=True))
    assert len(set(texts)) == 22
    assert sum("they are:" in text for text in texts) == 2
    later = list(iterate_documents(asked, tokenizer=tokenizer, skip=20))
    assert [document.text for document in later] == texts[20:]
    for text in texts[:16]:  # needles: the last words repeat what the haystack says
        (asked_key, *_) = re.findall(r"magic \w+ for ([\w-]+)[^.]*mentioned", text)
        assert f"for {asked_key} is: " in text
        answers = [number or word for number, word in DRAWN.findall(text.rsplit("provided text ", 1)[1])]
        assert answers
        assert all(f"is: {answer}." in text for answer in answers)


def test_it_shares_nothing_that_is_drawn_with_what_judging_asks(tokenizer: PreTrainedTokenizerBase, essays: str):
    seed = 7
    trained = list(iterate_documents(source(haystack=(essays,), seed=seed), tokenizer=tokenizer))
    ruler = Ruler(haystack=(essays,), lengths=(2048,), samples=5, seed=seed)
    judged = make_ruler_trials(Needle(ruler=ruler), tokenizer)
    strings = [
        {number or word for text in texts for number, word in DRAWN.findall(text)}
        for texts in ([d.text or "" for d in trained], [tokenizer.decode(trial.prompt.ids) for trial in judged])
    ]
    assert min(map(len, strings)) > 200
    assert not strings[0] & strings[1]
    assert {half_of(text) for text in strings[0]} == {"training"}
    assert {half_of(answer) for trial in judged for answer in trial.answers} == {"judging"}


def test_as_chats_the_answers_alone_are_labels(tokenizer_folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    asked = source(ruler=("niah_single_1", "fwe"), chat=True, documents=4, lengths=(1200,))
    assert Dataset(sources=(asked,)).sources[0].has_chats
    part = Encoder(tokenizer, False, 0.0, with_mask=True, sources=(asked,)).encode(
        list(iterate_documents(asked, tokenizer=tokenizer)), {}
    )
    starts = np.cumsum([0, *part.lengths])
    for start, end in itertools.pairwise(starts):
        ids, mask = part.ids[start:end], part.mask[start:end].astype(bool)
        said = tokenizer.decode(ids[mask])
        assert said.startswith(("The special magic number for ", "Answer: According to the coded text"))
        assert said.endswith(".<eos>")
        assert mask.sum() < 0.3 * len(ids)
        assert tokenizer.decode(ids).startswith("<|user|>")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "niah_single_2 hides needles in essays; give text files"),
        ({"ruler": ("vt",), "lengths": (100,)}, "vt does not fit in 100 tokens"),
        ({"ruler": ("vt",), "chat": True}, "the tokenizer has no chat template"),
    ],
)
def test_what_cannot_be_written_is_told(tokenizer: PreTrainedTokenizerBase, changes: dict[str, Any], words: str):
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=words):
        list(iterate_documents(source(**changes), tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ruler": (), "chat": True}, "chat is for tasks of RULER"),
        ({"facts": 3}, "facts is for documents of facts"),
        ({"ruler": ("qa_1",)}, "ruler.0"),
    ],
)
def test_options_of_recall_text_belong_together(changes: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        source(**changes)
