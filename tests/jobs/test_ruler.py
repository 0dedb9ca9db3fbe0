"""RULER's prompts: as long as asked, the same for the same seed, and with the answers that an independent reading of
the prompt finds."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.judging.ruler import SYNTHETIC_TASKS, RulerTask
from radlads.tasks.jobs.data.ruler.draw import Draw, Half, half_of, keys, listed_words
from radlads.tasks.jobs.data.ruler.puzzle import Puzzle, fit
from radlads.tasks.jobs.data.ruler.qa import read_questions
from radlads.tasks.jobs.data.ruler.tasks import TASKS, Material, make_puzzle, make_qa_puzzles, score
from radlads.tasks.jobs.data.text.token_encoder import text_ids

ESSAYS = [f"Sentence {i} tells of a small house near the river." for i in range(900)]
NEEDLE = re.compile(r"One of the special magic (?:numbers|uuids) for ([\w-]+) is: ([\w-]+)\.")
# How many different keys a haystack has, of the tasks whose haystack has a fixed number.
KEYS = {"niah_single_1": 1, "niah_single_2": 1, "niah_single_3": 1, "niah_multikey_1": 4, "niah_multivalue": 1,
        "niah_multiquery": 4}  # fmt: skip
ASKED = {"niah_multivalue": 4, "niah_multiquery": 4}


@pytest.fixture(scope="module")
def tokenizer(project_root: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(project_root / "deployments" / "demo" / "tokenizer")


def make(
    tokenizer: PreTrainedTokenizerBase, task: RulerTask, length: int, *, seed: str = "s", half: Half = "judging"
) -> Puzzle:
    def cost(puzzle: Puzzle) -> int:
        return len(text_ids(tokenizer, [puzzle.text])[0]) + TASKS[task].new_tokens

    puzzle = make_puzzle(task, length=length, cost=cost, seed=seed, half=half, material=Material(ESSAYS)).puzzle
    assert 0.92 * length < cost(puzzle) <= length
    return puzzle


@pytest.mark.parametrize("task", SYNTHETIC_TASKS)
@pytest.mark.parametrize("length", [2048, 8192])
def test_a_prompt_fills_its_length_and_follows_from_its_seed(
    tokenizer: PreTrainedTokenizerBase, task: RulerTask, length: int
):
    puzzle = make(tokenizer, task, length)
    assert puzzle == make(tokenizer, task, length)
    assert puzzle.prompt != make(tokenizer, task, length, seed="t").prompt
    assert score(task, puzzle.reply, puzzle.answers) == 1
    assert score(task, "nothing of it", puzzle.answers) == 0


@pytest.mark.parametrize("task", [task for task in SYNTHETIC_TASKS if task.startswith("niah")])
def test_what_is_asked_for_lies_in_the_haystack(tokenizer: PreTrainedTokenizerBase, task: RulerTask):
    depths = []
    for seed in map(str, range(6)):
        puzzle = make(tokenizer, task, 2048, seed=seed)
        haystack, question = puzzle.prompt.rsplit("\nWhat ", 1)
        needles: dict[str, set[str]] = {}
        for key, value in NEEDLE.findall(haystack):
            needles.setdefault(key, set()).add(value)
        asked = [key for key in needles if key in question]
        assert {value for key in asked for value in needles[key]} == set(puzzle.answers)
        assert len(puzzle.answers) == ASKED.get(task, 1)
        assert len(needles) == KEYS[task] if task in KEYS else len(needles) > 10
        assert asked[0] in puzzle.prefix
        assert ("uuid" in question) == (task in ("niah_single_3", "niah_multikey_3"))
        depths.append(haystack.index(puzzle.answers[0]) / len(haystack))
    assert max(depths) - min(depths) > 0.2, "needles lie at different depths"


def test_variables_are_those_that_a_reader_of_the_assignments_finds(tokenizer: PreTrainedTokenizerBase):
    for seed in map(str, range(5)):
        puzzle = make(tokenizer, "vt", 2048, seed=seed)
        example, body = puzzle.prompt.rsplit("Memorize and track", 1)
        assert example.count("Answer: According to the chain(s)") == 1
        values: dict[str, str] = {}
        for name, value in re.findall(r"VAR ([A-Z]+) = (\d+|VAR [A-Z]+)", body):
            values[name] = values.get(value.removeprefix("VAR "), value)
        wanted = re.search(r"assigned the value (\d+) in", body)
        assert wanted is not None
        assert [name for name, value in values.items() if value == wanted[1]] == list(puzzle.answers)
        assert len(puzzle.answers) == 5
        assert wanted[1] in puzzle.prefix


def test_common_words_are_those_that_counting_finds(tokenizer: PreTrainedTokenizerBase):
    for length, ratio in ((2048, 6), (8192, 10)):
        puzzle = make(tokenizer, "cwe", length)
        body = puzzle.prompt.rsplit("Below is a numbered list", 1)[1]
        counts = Counter(re.findall(r"\d+\. (\w+)", body)).most_common()
        assert {word for word, _ in counts[:10]} == set(puzzle.answers)
        assert counts[9][1] == ratio * counts[10][1]


def test_common_words_repeat_less_where_a_tokenizer_needs_many_tokens():
    """SmolLM2's needs 8.3 tokens for a numbered word: 30 times ten of them are as long as 4,096, and the shortest list
    of lengths below that, with its example, is longer than 1,024."""

    def repeats(tokens: float, length: int) -> tuple[int, bool]:
        found = make_puzzle(
            "cwe",
            length=length,
            cost=lambda one: int(tokens * len(one.text.split()) / 2),
            seed="1",
            half="judging",
            material=Material(),
        )
        body = found.puzzle.prompt.rsplit("Below is a numbered list", 1)[1]
        return Counter(re.findall(r"\d+\. (\w+)", body)).most_common()[0][1], found.is_full

    assert repeats(4.0, 4096) == (30, True)
    assert repeats(8.3, 4096) == (6, True)
    assert repeats(5.0, 1024) == (6, True)
    assert repeats(7.5, 1024) == (4, True)


def test_frequent_words_are_those_that_counting_finds(tokenizer: PreTrainedTokenizerBase):
    for length in (1024, 2048, 8192):
        puzzle = make(tokenizer, "fwe", length)
        body = puzzle.prompt.split("coded words. ", 1)[1].split("\nQuestion", 1)[0]
        counts = Counter(word for word in body.split() if word != "...").most_common()
        assert tuple(word for word, _ in counts[:3]) == puzzle.answers
        assert counts[2][1] > counts[3][1]
        assert body.split().count("...") > counts[0][1]


def test_training_and_judging_share_no_string():
    draws = {half: Draw("one seed", half) for half in ("judging", "training")}
    drawn = {
        half: {
            *draw.distinct("words", 400), *draw.distinct("numbers", 400), *draw.distinct("uuids", 50),
            *draw.listed(400), *draw.letters(400, 3), draw.value(),
        }
        for half, draw in draws.items()
    }  # fmt: skip
    assert {half: {half_of(text) for text in texts} for half, texts in drawn.items()} == {h: {h} for h in draws}
    for pool in (keys, listed_words):
        assert not set(pool("judging")) & set(pool("training"))
        assert min(len(pool("judging")), len(pool("training"))) > 5000


def test_no_listed_word_is_part_of_another():
    words = random.Random(0).sample(listed_words("judging"), 1500)
    text = " ".join(words)
    assert all(text.count(word) == 1 for word in words)


@pytest.mark.parametrize(
    ("task", "reply", "expected"),
    [
        ("niah_single_1", " 4820133.", 1),
        ("niah_multivalue", "It is 1111111 and 3333333", 0.5),
        ("vt", "abcde", 0.5),
        ("qa_1", "the PARIS of old", 1),
        ("qa_2", "Rome", 0),
    ],
)
def test_scores_are_rulers_string_matches(task: RulerTask, reply: str, expected: float):
    answers = {
        "niah_single_1": ["4820133"], "niah_multivalue": ["1111111", "2222222"], "vt": ["ABCDE", "FGHIJ"],
        "qa_1": ["Paris", "Lutetia"], "qa_2": ["Paris"],
    }  # fmt: skip
    assert score(task, reply, answers[task]) == expected


def test_fit_finds_the_most_that_fits_in_few_tries():
    tried = []

    def build(units: int) -> Puzzle:
        tried.append(units)
        return Puzzle("x" * units, "", (), "")

    found = fit(build, lambda puzzle: 100 + 7 * len(puzzle.prompt), 10_000, least=1)
    assert (found.is_full, found.cost <= 10_000, len(tried) <= 5) == (True, True, True)
    assert fit(build, lambda puzzle: 100 + 7 * len(puzzle.prompt), 10_000, least=1, most=9).units == 9
    assert fit(build, lambda puzzle: 7000 * len(puzzle.prompt), 10_000, least=1).units == 1
    assert fit(build, lambda _: 20_000, 10_000, least=3).cost > 10_000


def test_too_short_a_length_and_too_short_a_haystack_are_told(tokenizer: PreTrainedTokenizerBase):
    with pytest.raises(UserError, match=r"cwe does not fit in 500 tokens: its shortest prompt and answer take \d+"):
        make(tokenizer, "cwe", 500)
    with pytest.raises(UserError, match=r"niah_single_2: all 900 sentences of the haystack fill only \d+ of 40000"):
        make(tokenizer, "niah_single_2", 40_000)


SQUAD = {"data": [{"title": "a", "paragraphs": [{"context": "Paris is big.", "qas": [
    {"question": "What is big?", "answers": [{"text": "Paris", "answer_start": 0}], "is_impossible": False},
    {"question": "What is small?", "answers": [], "is_impossible": True}]}]}]}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "documents"),
    [
        (SQUAD, ("Paris is big.",)),
        ({"question": "What is big?", "answers": {"text": ["Paris"]}, "context": "Paris is big."}, ("Paris is big.",)),
        (
            {"question": "What is big?", "answers": "Paris", "context": ["Big Paris.", "No."]},
            ("Big Paris.", "No."),
        ),
        ({"question": "What is big?", "answer": "Paris", "context": [["T", ["One.", " Two."]]]}, ("T\nOne. Two.",)),
    ],
)
def test_questions_are_read_in_every_form(tmp_path: Path, row: Any, documents: tuple[str, ...]):
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    (question,) = read_questions(tmp_path / "q.jsonl").all
    assert (question.text, question.answers, question.documents) == ("What is big?", ("Paris",), documents)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "What?", "text": "Paris"}, "line 1: not a question"),
        ({"question": "What?", "context": "Paris", "answers": []}, "no question with an answer"),
        ({"data": [{"paragraphs": [{}]}]}, "not SQuAD's form"),
    ],
)
def test_a_file_without_questions_is_told(tmp_path: Path, row: Any, words: str):
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=words):
        read_questions(tmp_path / "q.jsonl")


def test_a_questions_own_documents_lie_among_others(tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    rows = [
        {"question": f"Who is number {i}?", "answers": [f"Person {i}x"], "context": f"Number {i} is Person {i}x. " * 3}
        for i in range(120)
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    material = Material(questions={"qa_1": read_questions(path)})

    def make_all(count: int, length: int) -> list[Puzzle]:
        def cost(puzzle: Puzzle) -> int:
            return len(text_ids(tokenizer, [puzzle.text])[0]) + 32

        made = make_qa_puzzles("qa_1", count=count, length=length, cost=cost, seed="s", material=material)
        assert all(0.9 * length < cost(puzzle) <= length for puzzle in made)
        return made

    puzzles = make_all(10, 1500)
    assert puzzles == make_all(10, 1500)
    assert len({puzzle.answers for puzzle in puzzles}) == 10
    for puzzle in puzzles:
        assert puzzle.answers[0] in puzzle.prompt
        assert puzzle.prompt.count("Document ") > 3
    with pytest.raises(UserError, match="qa_1: only 0 of 120 questions fit with their documents in 100 tokens"):
        make_all(5, 100)
    with pytest.raises(UserError, match="all 120 documents of its questions fill only"):
        make_all(5, 100_000)
