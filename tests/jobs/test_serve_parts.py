"""Parts of the server that need no client: text while it comes, stop texts, rows whose states are batched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from radlads.model.student.cache import RadladsCache
from radlads.tasks.contracts.requests.talk import Drawing
from radlads.tasks.jobs.serve.drawing import TokenDraw, choose_tokens
from radlads.tasks.jobs.serve.states import RowStates
from radlads.tasks.jobs.serve.writer import Writer
from radlads.tasks.jobs.sources import load_tokenizer

GREEDY = Drawing(temperature=0)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Any:
    return load_tokenizer(str(tokenizer_folder))


def written(tokenizer: Any, ids: list[int], *stops: str) -> list[str]:
    """The parts of an answer, to its end or a stop text."""
    writer, parts = Writer(tokenizer, stops), []
    for token in ids:
        parts.append(writer.add(token))
        if writer.stopped:
            return parts
    return [*parts, writer.end()]


@pytest.mark.parametrize("text", ["«voilà!» she said — 你好 😀😀 done", "  two  spaces\n\n", "😀", "", " "])
def test_parts_are_the_text_and_no_broken_characters(tokenizer: Any, text: str) -> None:
    parts = written(tokenizer, tokenizer(text).input_ids)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


def test_bytes_that_are_no_text_do_not_wait_for_ever(tokenizer: Any) -> None:
    broken = tokenizer("😀").input_ids[:1]
    parts = written(tokenizer, [*broken * 40, *tokenizer("x").input_ids])
    assert sum(map(bool, parts)) > 2
    assert "".join(parts).endswith("x")


def test_special_tokens_are_no_text(tokenizer: Any) -> None:
    ids = tokenizer("a dog").input_ids
    assert "".join(written(tokenizer, [1, *ids, 2, *ids, 0])) == "a doga dog"


@pytest.mark.parametrize(
    ("stops", "rest"),
    [
        (("ball",), "the red "),
        (("red ball",), "the "),
        (("a", "the"), ""),
        (("lost", "ball rolls"), None),
        (("d b",), "the re"),
    ],
)
def test_the_first_stop_text_ends_the_answer(tokenizer: Any, stops: tuple[str, ...], rest: str | None) -> None:
    text = "the red ball rolled"
    parts = written(tokenizer, tokenizer(text).input_ids, *stops)
    assert "".join(parts) == (text if rest is None else rest)


def test_what_may_begin_a_stop_text_is_held_back(tokenizer: Any) -> None:
    writer, ids = Writer(tokenizer, ["xyz"]), tokenizer("xyxyz").input_ids
    assert "".join(writer.add(token) for token in ids) == "xy"
    assert writer.stopped
    assert writer.end() == ""


def test_a_text_goes_on_after_its_prompt_with_its_space() -> None:
    """Tokenizers that mark spaces drop the first one of what they decode."""
    core = Tokenizer(models.BPE({"▁Tim": 0, "▁ran": 1, "<0xF0>": 2, "<0x9F>": 3, "</s>": 4}, []))
    core.decoder = decoders.Metaspace()
    spaced = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    for prompt, text in (([0, 1], " Tim ran"), ([0] * 30, " Tim ran"), ([4], "Tim ran"), ([], "Tim ran")):
        writer = Writer(spaced, prompt=prompt)
        assert writer.end() == ""
        assert "".join(map(writer.add, [0, 1])) + writer.end() == text
    assert "".join(map(Writer(spaced, [" r"], prompt=[0]).add, [0, 1])) == " Tim"


def test_a_prompt_that_ends_amid_a_character_is_no_part_of_the_answer(tokenizer: Any) -> None:
    ids = tokenizer("😀").input_ids
    assert len(ids) > 1
    writer = Writer(tokenizer, prompt=ids[:-1])
    text = "".join(map(writer.add, [*ids[-1:], *tokenizer("x").input_ids])) + writer.end()
    assert text == "\ufffdx"


# Rows


@pytest.fixture(
    scope="module",
    params=[("rad_rwkv7", ()), ("hxa079", (1,)), ("rad_rwkv6", (0,)), ("gated_deltanet", ()), ("sliding_window", ())],
    ids=str,
)
def student(request: pytest.FixtureRequest, lively_student: Any) -> Any:
    return lively_student(*request.param)


class Rows:
    """A batch as the worker has it, without threads and text."""

    def __init__(self, student: Any) -> None:
        self.student, self.states, self.made = student, RowStates(student), dict[str, list[int]]()
        self.names: list[str] = []
        self.draws: dict[str, TokenDraw] = {}

    def add(self, **prompts: tuple[list[int], Drawing]) -> None:
        caches = []
        for name, (ids, drawing) in prompts.items():
            cache = RadladsCache(self.student.config)
            for begin in range(0, len(ids), 7):
                logits = self.states.read(cache, ids[begin : begin + 7])
            self.draws[name] = TokenDraw(drawing, torch.device("cpu"))
            self.made[name] = [token for token in choose_tokens(logits, [self.draws[name]]) if token is not None]
            caches.append(cache)
        self.states.add(caches, [len(ids) for ids, _ in prompts.values()])
        self.names += prompts

    def drop(self, *names: str) -> None:
        self.states.keep([i for i, name in enumerate(self.names) if name not in names])
        self.names = [name for name in self.names if name not in names]

    def step(self, times: int) -> None:
        for _ in range(times):
            logits = self.states.advance([self.made[name][-1] for name in self.names])
            for name, token in zip(self.names, choose_tokens(logits, [self.draws[n] for n in self.names]), strict=True):
                assert token is not None
                self.made[name].append(token)


def generated(student: Any, ids: list[int], tokens: int) -> list[int]:
    prompt = torch.tensor([ids])
    made = student.generate(prompt, do_sample=False, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0)
    return made[0, len(ids) :].tolist()


PROMPTS = {name: torch.randint(5, 390, (n,), generator=torch.Generator().manual_seed(n)).tolist() for name, n in
           (("long", 40), ("short", 3), ("middle", 19), ("late", 26))}  # fmt: skip


@torch.no_grad()
def test_rows_that_come_and_go_are_as_alone(student: Any) -> None:
    rows = Rows(student)
    rows.add(long=(PROMPTS["long"], GREEDY), short=(PROMPTS["short"], GREEDY))
    rows.step(5)
    rows.add(middle=(PROMPTS["middle"], GREEDY))
    rows.step(4)
    rows.drop("long")
    rows.step(3)
    rows.add(late=(PROMPTS["late"], GREEDY))
    rows.drop("middle")
    rows.step(6)
    assert rows.names == ["short", "late"]
    assert len({token for made in rows.made.values() for token in made}) > 5, "texts that tell rows apart"
    for name, made in rows.made.items():
        assert made == generated(student, PROMPTS[name], len(made)), name
    rows.drop("short", "late")
    rows.add(long=(PROMPTS["long"], GREEDY))
    rows.step(4)
    assert rows.made["long"] == generated(student, PROMPTS["long"], 5)


@torch.no_grad()
def test_draws_do_not_depend_on_who_shares_the_batch(student: Any) -> None:
    drawn = Drawing(temperature=1.3, top_p=0.9, seed=11)
    alone, shared = Rows(student), Rows(student)
    alone.add(short=(PROMPTS["short"], drawn))
    shared.add(long=(PROMPTS["long"], Drawing(temperature=1, seed=3)), short=(PROMPTS["short"], drawn))
    for rows in (alone, shared):
        rows.step(12)
    assert shared.made["short"] == alone.made["short"]
    again = Rows(student)
    again.add(short=(PROMPTS["short"], drawn.model_copy(update={"seed": 12})))
    again.step(12)
    assert again.made["short"] != alone.made["short"]


def test_rows_without_scores_have_no_token() -> None:
    logits = torch.zeros(3, 8)
    logits[1, 4], logits[0, 2], logits[2, 5] = float("nan"), 1, 1
    sampled = TokenDraw(Drawing(temperature=1, seed=0), torch.device("cpu"))
    greedy = TokenDraw(GREEDY, torch.device("cpu"))
    assert choose_tokens(logits, [greedy] * 3) == [2, None, 5]
    assert choose_tokens(logits, [greedy, sampled, greedy]) == [2, None, 5]


def test_which_models_are_batched(lively_student: Any) -> None:
    assert RowStates(lively_student("rad_rwkv7")).joins
    assert RowStates(lively_student("hxa079", (1,))).joins
    assert not RowStates(lively_student("sliding_window")).joins
