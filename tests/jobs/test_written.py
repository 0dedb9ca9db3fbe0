"""evaluate.generation and evaluate.speed: samples that depend on the seed alone, counts and constraints that can be
checked by hand, and what the plan refuses."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from radlads.model.student.load import load_student
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.identity import identity
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.judging.generation import EvalGeneration, EvalInstructions, EvalSpeed
from radlads.tasks.contracts.recipe.sections import Evaluate
from radlads.tasks.jobs.judge import generation
from radlads.tasks.jobs.judge.batching.budget import RowBudget
from radlads.tasks.jobs.judge.speed import check_speed
from radlads.tasks.jobs.judge.written import samples
from radlads.tasks.jobs.judge.written.constraints import CONSTRAINTS, Constraint, draw_constraints, read_constraint
from radlads.tasks.jobs.judge.written.instructions import judge_instructions, read_instructions
from radlads.tasks.jobs.judge.written.repetition import distinct, ends_in_loop, repeated_share
from radlads.tasks.jobs.judge.written.samples import judge_samples, sample_prompts
from radlads.tasks.jobs.judge.written.sampling import GumbelNoise, Sampling
from radlads.tasks.jobs.judge.written.scores import check_generation, flatten_writing, judge_writing
from radlads.tasks.jobs.report.judged.writing_report import writing_verdicts
from radlads.tasks.jobs.sources import load_tokenizer

CPU = JobResources(device="cpu", processes=1, threads=1)
ALONE: Any = SimpleNamespace(
    rank=0, world_size=1, device=torch.device("cpu"), progress=lambda *_: None, barrier=lambda: None
)


@pytest.fixture(scope="module")
def models(training: Any) -> dict[str, Any]:
    teacher = AutoModelForCausalLM.from_pretrained(training.teacher).eval()
    return {"teacher": teacher, "student": load_student(Path(training.root) / "student" / "model").eval()}


@pytest.fixture(scope="module")
def tokenizer(training: Any) -> Any:
    return load_tokenizer(str(training.teacher))


@pytest.fixture
def texts(tmp_path: Path, stories: list[str]) -> str:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in stories[:5]))
    return str(tmp_path / "texts.jsonl")


@pytest.fixture
def chats(tmp_path: Path) -> Callable[..., EvalInstructions]:
    """chats(rows, **section) → a section whose only file has these rows."""

    def make(rows: Sequence[Any], **section: Any) -> EvalInstructions:
        (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return EvalInstructions(paths=(str(tmp_path / "chat.jsonl"),), **section)

    return make


def said(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


def test_repetition_by_hand():
    assert distinct([1, 2, 1, 2, 3], 1) == 3 / 5
    assert distinct([1, 2, 1, 2, 3], 2) == 3 / 4
    assert distinct([1, 2, 3], 4) is None
    assert repeated_share([]) is None
    assert repeated_share([1, 2, 3]) == 0
    assert repeated_share([1, 2, 3, 4, 9, 1, 2, 3, 4, 8]) == 8 / 10
    assert repeated_share([5] * 6) == 1
    text = list(range(100, 130))
    assert not ends_in_loop(text)
    assert not ends_in_loop([*text, 7, 7, 7])  # an ellipsis
    assert ends_in_loop([*text, *[7] * 16])
    assert ends_in_loop([*text, *[1, 2, 3, 4, 5, 6] * 3])
    assert not ends_in_loop([*text, *[1, 2, 3, 4, 5, 6] * 2])
    assert not ends_in_loop([*[1, 2] * 20, *text])
    assert not ends_in_loop([7] * 15)


def test_samples_follow_the_softmax_and_a_row_depends_on_its_own_seed():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0])
    many = GumbelNoise(Sampling(0.7, range(4000)), torch.device("cpu"))
    drawn = many(torch.empty(0), logits.expand(4000, 4)).argmax(-1)
    shares, wanted = drawn.bincount(minlength=4) / 4000, (logits / 0.7).softmax(-1)
    assert (shares - wanted).abs().max() < 4 * 0.5 / math.sqrt(4000)
    alone = GumbelNoise(Sampling(0.7, [17]), torch.device("cpu"))
    assert alone(torch.empty(0), logits[None]).argmax() == drawn[17]


def test_equal_models_write_the_same_and_nats_are_those_of_a_plain_computation(models: Any, tokenizer: Any, texts: str):
    section = EvalGeneration(prompts=(texts,), prompt_tokens=6, samples=8, new_tokens=20)
    prompts = sample_prompts(section, tokenizer, True)
    assert [len(prompt.ids) for prompt in prompts] == [7] * 8
    assert prompts[5].ids == prompts[0].ids != prompts[1].ids
    teacher = models["teacher"]
    same = {"teacher": teacher, "student": teacher}
    sheet = judge_samples(ALONE, same, tokenizer, section, prompts, 1.0, RowBudget(3))
    assert sheet["teacher"] == sheet["student"]
    assert sheet["nats_ratio"] == {"value": 1, "stderr": 0}
    again = judge_samples(ALONE, same, tokenizer, section, prompts, 1.0, RowBudget(3))
    assert again == sheet
    other = section.model_copy(update={"seed": 7})
    assert judge_samples(ALONE, same, tokenizer, other, prompts, 1.0, RowBudget(3))["examples"] != sheet["examples"]

    rows = [[5, 6, 7], [9], [8, 2]]
    own = samples.teacher_nats(ALONE, teacher, prompts[:3], rows, lambda _: 2, lambda _: None)
    for prompt, row, nats in zip(prompts, rows, own, strict=False):
        with torch.no_grad():
            logs = teacher(torch.tensor([[*prompt.ids, *row]])).logits[0].double().log_softmax(-1)
        plain = -sum(logs[len(prompt.ids) - 1 + i, token].item() for i, token in enumerate(row))
        assert nats == pytest.approx(plain, rel=1e-5)


def test_a_worse_student_is_told_and_errors_are_those_of_a_bootstrap(models: Any, tokenizer: Any):
    section = EvalGeneration(samples=32, new_tokens=24, temperatures=(0.7,))
    prompts = sample_prompts(section, tokenizer, None)
    assert [prompt.ids for prompt in prompts] == [[tokenizer.bos_token_id]] * 32
    sheet = judge_samples(ALONE, models, tokenizer, section, prompts, 0.7, RowBudget(16))
    assert sheet["nats_ratio"]["value"] > 1 + 3 * sheet["nats_ratio"]["stderr"]
    ratio = sheet["student"]["nats"]["value"] / sheet["teacher"]["nats"]["value"]
    assert sheet["nats_ratio"]["value"] == pytest.approx(ratio)
    assert 0 < sheet["student"]["distinct_1"]["value"] < sheet["student"]["distinct_4"]["value"] <= 1
    rng = np.random.default_rng(0)
    ours, theirs = (np.stack([rng.gamma(9, size=400) * 3, rng.integers(5, 9, 400)]) for _ in range(2))
    told = samples._ratio_of_ratios(ours, theirs)
    picks = rng.integers(0, 400, (2000, 400))
    drawn = [samples._ratio_of_ratios(ours[:, p], theirs[:, p])["value"] for p in picks]
    assert told["stderr"] == pytest.approx(np.std(drawn), rel=0.1)


def test_ranks_share_the_samples_and_each_gets_all(
    models: Any, tokenizer: Any, texts: str, monkeypatch: pytest.MonkeyPatch
):
    section = EvalGeneration(prompts=(texts,), prompt_tokens=4, samples=7, new_tokens=16)
    prompts = sample_prompts(section, tokenizer, None)
    wanted = judge_samples(ALONE, models, tokenizer, section, prompts, 1.0, RowBudget(2))
    parts: dict[int, Any] = {}

    def gather(own: dict[int, Any], _: int) -> list[dict[int, Any]]:
        parts.update(own)
        return [parts]

    monkeypatch.setattr(generation, "gather", gather)
    for name, model in models.items():
        parts.clear()
        rows: list[Any] = []
        for number in (0, 1):
            rank: Any = SimpleNamespace(rank=number, world_size=2)
            with suppress(KeyError):  # the other rank has not written yet
                run = _writer(model, tokenizer, section, prompts)
                rows = generation.run_batches(rank, model, prompts, lambda _: 2, run, lambda _: None)
        assert len(rows) == 7
        texts_of = tokenizer.batch_decode(rows[:3], skip_special_tokens=True)
        assert texts_of == [example[name] for example in wanted["examples"]]


def _writer(model: Any, tokenizer: Any, section: EvalGeneration, prompts: Any) -> Any:
    def run(chosen: Sequence[int]) -> list[Any]:
        seeds = [samples.sample_seed(section.seed, "1", i) for i in chosen]
        ids = [prompts[i].ids for i in chosen]
        return generation.continuations(model, tokenizer, ids, section.new_tokens, Sampling(1.0, seeds))

    return run


@pytest.mark.parametrize(
    ("kind", "value", "right", "wrong"),
    [
        ("max_words", 3, "One, two-fold three.", "one two three four"),
        ("min_words", 3, "it's one two", "one two — !"),
        ("sentences", 2, "It cost 3.50 dollars. “Is that so?” ", "One. Two! Three?"),
        ("sentences", 1, "no full stop", "One. Two."),
        ("keyword", "river", "The River, of course", "riverside"),
        ("forbidden", "river", "riverside", "a RIVER"),
        ("lower_case", None, "all small, é 1", "Not small"),
        ("json", None, '{"a": [1]}', '"text alone"'),
        ("json", None, '```json\n{"a": 1}\n```', 'Here it is: {"a": 1}'),
        ("json", None, '{"a": 1}', '{"a": NaN}'),
        ("starts_with", "In short,", " In short, yes", "in short, yes"),
        ("bullets", 2, "Two:\n- one\n  * two\n-no", "- one\n- two\n- three"),
        ("bullets", 1, "- one", "intro\n-\n\nend"),
    ],
)
def test_constraints_by_hand(kind: str, value: Any, right: str, wrong: str):
    constraint = Constraint(kind, value)
    assert constraint.holds(right)
    assert not constraint.holds(wrong)
    assert not constraint.holds(" ")
    assert str(value or "") in constraint.text


@pytest.mark.parametrize(
    "raw",
    [{"kind": ["json"]}, {"kind": {}}, {"kind": "keyword", "value": " river "}, {"kind": "starts_with", "value": ""}],
)
def test_a_constraint_that_says_nothing_is_one_line(raw: Any):
    with pytest.raises(
        UserError, match=r"^here: a constraint has no `kind` of|^here: the constraint \w+ needs a `value`"
    ):
        read_constraint(raw, "here")


def test_every_kind_is_drawn_and_two_never_exclude_each_other():
    question = "Explain how elephants remember distant rivers."
    drawn = [draw_constraints(question, i, random.Random(i)) for i in range(300)]
    assert [one[0].kind for one in drawn[:9]] == list(CONSTRAINTS)
    pairs = {frozenset(c.kind for c in one) for one in drawn if len(one) == 2}
    assert len(pairs) > 15
    excluded = [("max_words", "min_words"), ("bullets", "sentences"), ("json", "starts_with"), ("json", "bullets")]
    assert not pairs & {frozenset(pair) for pair in excluded}
    assert all(len(pair) == 2 for pair in pairs)
    words = {c.value for one in drawn for c in one if c.kind == "forbidden"}
    assert words == {"elephants", "remember", "explain"} or words <= set(question.lower().strip(".").split())


def test_a_model_that_obeys_scores_one(chats: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    own = {"prompt": "Say a or b in one word", "constraints": [{"kind": "max_words", "value": 1}]}
    two = [{"kind": "json"}, {"kind": "keyword", "value": "ball"}]
    section = chats([own, own | {"constraints": two}, own], new_tokens=9)
    script = {"teacher": ["a", '{"a": "ball"}', "b"], "student": ["a", '{"a": "doll"}', "two words"]}

    def generate(model: str, _tokenizer: Any, prompts: Sequence[Any], new: int, _: Any) -> list[str]:
        assert (len(prompts), new) == (3, 9)
        return script[model]

    monkeypatch.setattr(generation, "generate", generate)
    monkeypatch.setattr(generation, "in_step", lambda _: nullcontext())
    sheet = judge_instructions(ALONE, {"teacher": "teacher", "student": "student"}, tokenizer, section, lambda _: 8)  # type: ignore[dict-item]
    assert sheet["teacher"]["answers"]["mean"] == 1
    assert sheet["student"]["answers"]["mean"] == pytest.approx(1 / 3)
    assert {kind: cell["mean"] for kind, cell in sheet["student"]["kinds"].items()} == {
        "max_words": 0.5, "keyword": 0, "json": 1,
    }  # fmt: skip
    assert sheet["gap"]["value"] == pytest.approx(-2 / 3)
    assert sheet["examples"][1]["student"] == {"answer": '{"a": "doll"}', "obeys": [True, False]}


def test_questions_of_chats_are_the_same_each_time(chats: Any):
    rows = [said(f"What is {i}?", "No idea.") for i in range(12)] + [said("x" * 50, "y")]
    section = chats(rows, max_characters=40)
    first = read_instructions(section)
    assert first == read_instructions(section)
    assert len(first) == 12
    assert first[3].text.startswith("What is 3?\n\n")
    assert all(constraint.text in one.text for one in first for constraint in one.constraints)
    assert read_instructions(section.model_copy(update={"questions": 4})) == first[:4]
    assert read_instructions(section.model_copy(update={"seed": 1})) != first


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "x"}], r"line 1.*messages"),
        ([said("y" * 2000)], "usable questions in the files: 0; at least two"),
        ([{"prompt": "a", "constraints": [{"kind": "keywrd"}]}], "line 1: .*did you mean 'keyword'"),
        ([{"prompt": "a", "constraints": [{"kind": "max_words", "value": "3"}]}], "max_words needs a `value`, a whole"),
        ([{"prompt": "a", "constraints": [{"kind": "keyword"}]}], "keyword needs a `value`, a text"),
        ([{"prompt": "a", "constraints": [{"kind": "json", "value": 1}]}], "json has no value"),
        ([{"constraints": [{"kind": "json"}]}], "line 1: a row with `constraints` needs a `prompt`"),
        ([{"prompt": "a", "constraints": []}], "a list of {kind, value}"),
    ],
)
def test_files_that_cannot_be_used(chats: Any, rows: Any, words: str):
    with pytest.raises(UserError, match=words) as caught:
        read_instructions(chats(rows))
    assert "\n" not in str(caught.value)


def test_what_the_plan_refuses_and_says(chats: Any, tokenizer: Any, texts: str, monkeypatch: pytest.MonkeyPatch):
    section = chats([said("Who?", "Me."), said("Why?", "So.")], new_tokens=500)
    asked = EvalGeneration(prompts=(texts,), new_tokens=64, samples=2, instructions=section)
    few, beyond = check_generation(asked, tokenizer, None, 512)
    assert "the files have 2 questions" in few
    assert "beyond the 512 positions" in beyond
    with pytest.raises(UserError, match=r"97 tokens with BOS.*80 positions; lower new_tokens"):
        check_generation(asked, tokenizer, None, 80)
    with pytest.raises(UserError, match=r"no file matches '/nowhere.txt'"):
        check_generation(EvalGeneration(prompts=("/nowhere.txt",)), tokenizer, None, None)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="the teacher's tokenizer has none; leave `instructions` out"):
        check_generation(asked, tokenizer, None, None)
    speed = EvalSpeed(lengths=(64, 4096))
    assert check_speed(speed, 8192, CPU) == []
    assert "[4096] are beyond the teacher's 4096 positions" in check_speed(speed, 4096, CPU)[0]
    with pytest.raises(UserError, match="zero_stage: 3 divides them"):
        check_speed(speed, None, CPU.model_copy(update={"processes": 2, "zero_stage": 3}))
    for bad in (
        {"temperatures": (1, 1.0)}, {"temperatures": (0.7, 0.7000000001)}, {"temperatures": (0,)}, {"new_tokens": 3},
        {"samples": 10**9},
    ):  # fmt: skip
        with pytest.raises(ValidationError):
            EvalGeneration(**bad)


def test_digests_of_recipes_without_it_stay():
    plain = identity(Evaluate(), None)
    assert not {"generation", "speed"} & plain.keys()
    assert identity(Evaluate(generation=EvalGeneration()), None) != plain


def test_writing_and_speed_of_both_models(models: Any, tokenizer: Any, chats: Any):
    asked = EvalGeneration(samples=2, new_tokens=16, temperatures=(0.7,))
    asked = asked.model_copy(update={"instructions": chats([said("Who?"), said("Why?")], new_tokens=4)})
    section = Evaluate(generation=asked, speed=EvalSpeed(lengths=(600, 32), new_tokens=3))
    sheet = judge_writing(ALONE, models, tokenizer, section, RowBudget(8))
    json.dumps(sheet)
    short, long = sheet["speed"]["lengths"]
    assert (short["length"], short["not_run"]) == (32, {})
    assert long["not_run"] == {"teacher": "beyond its 512 positions"}
    assert long["teacher"] is None
    assert long["student"]["prompt_seconds"] > 0
    flat = flatten_writing(sheet)
    wanted = {
        "nats_ratio/0.7", "nats_ratio/0.7_stderr", "generation/0.7/student/distinct_2",
        "generation/0.7/teacher/stopped_stderr", "teacher/instructions", "instructions/student/max_words",
        "instructions_gap", "speed/600/student/tokens_per_second", "speed/32/teacher/prompt_seconds",
    }  # fmt: skip
    assert wanted <= flat.keys()
    assert not [key for key in flat if "memory" in key or key.startswith("speed/600/teacher")]


@pytest.mark.parametrize(
    ("ratio", "loops", "gap", "wanted"),
    [
        (1.02, 0.1, -0.01, ["good", "note"]),
        (1.2, 0.1, -0.3, ["warning", "warning"]),
        (0.8, 0.5, 0.1, ["note", "warning", "note"]),
    ],
)
def test_verdicts(ratio: float, loops: float, gap: float, wanted: list[str]):
    def row(share: float) -> dict[str, Any]:
        return {"loops": {"value": share, "stderr": 0.02}}

    answers = {"answers": {"mean": 0.5}}
    temperature = {
        "temperature": 0.7, "nats_ratio": {"value": ratio, "stderr": 0.01}, "teacher": row(0.1), "student": row(loops),
    }  # fmt: skip
    obeyed = {"teacher": answers, "student": answers, "gap": {"value": gap, "stderr": 0.05}}
    told = writing_verdicts({"generation": {"temperatures": [temperature], "instructions": obeyed}})
    assert [one.level for one in told] == wanted
    assert writing_verdicts({}) == []
