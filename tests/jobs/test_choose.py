"""choose: a job over an aligned student, by both ways; shared by ranks; planned; the quiz it asks."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from radlads.model.student.load import load_student
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import InputRef
from radlads.tasks.contracts.recipe.choice import AttentionChoice, NeedleProbe, RecallProbe
from radlads.tasks.contracts.specs import ChooseSpec
from radlads.tasks.jobs.choose import choose, recall_choice
from radlads.tasks.jobs.choose.choice_probe import make_quizzes, quiz_batches
from radlads.tasks.jobs.choose.needle_probe import make_needles
from radlads.tasks.jobs.common import Job, execute
from radlads.tasks.jobs.data.ruler.draw import half_of
from radlads.tasks.jobs.data.text.recall import build_quiz, load_filler
from radlads.tasks.jobs.train import train

PROBE = {"lengths": (96, 128), "documents": 4, "heldout_tokens": 128, "context": 64, "micro_batch": 3}
RUN_TOKENS = 400_000


@pytest.fixture(scope="module")
def aligned(training: Any) -> Job:
    job = training.job("align", "choose")
    assert execute(train.main, job) == "done", training.ending(job)
    return job


@pytest.fixture
def choose_job(training: Any, aligned: Job, make_job: Callable[..., Job]) -> Callable[..., Job]:
    def make(
        way: str = "recall", run_tokens: int = RUN_TOKENS, more: dict[str, Any] | None = None, **probe: Any
    ) -> Job:
        recall = RecallProbe(**{**PROBE, **probe}) if way == "recall" else RecallProbe()
        spec = ChooseSpec(
            section=AttentionChoice(count=1, choose=way, recall=recall, **(more or {})),
            teacher=training.reference,
            attention_rope=False,
            run_tokens=run_tokens,
        )
        inputs = {"student": InputRef(uri=aligned.spec.output_uri, digest=aligned.spec.digest)}
        if way == "recall":
            inputs["data"] = InputRef(uri=f"{training.store.uri}/data", digest="data")
        job = make_job("choose", spec, inputs)
        moved = job.spec.model_copy(
            update={"store": training.store, "output_uri": f"{training.store.uri}/{job.spec.digest}"}
        )
        (job.scratch / "job.json").write_text(moved.model_dump_json())
        return Job(spec=moved)

    return make


@pytest.mark.parametrize("way", ["recall", "difficulty"])
def test_the_product_is_the_student_with_the_chosen_layer_restored(
    choose_job: Callable[..., Job], run_main: Any, training: Any, aligned: Job, way: str
):
    job = choose_job(way)
    manifest = run_main(choose.main, job)
    folder = Path(job.spec.output_uri)
    sheet = json.loads((folder / "choose.json").read_text())
    (layer,) = manifest.metrics["attention_layers"]
    assert [row["layer"] for row in sheet["layers"]] == [0, 1]
    assert [row["layer"] for row in sheet["layers"] if row["chosen"]] == [layer]
    assert max(sheet["layers"], key=lambda row: row["score"])["layer"] == layer
    student = load_student(folder / "model")
    before = load_student(Path(aligned.spec.output_uri) / "model")
    teacher = AutoModelForCausalLM.from_pretrained(training.teacher)
    assert student.config.attention_layers == [layer]
    assert not student.config.attention_rope
    theirs = teacher.model.layers[layer].self_attn.state_dict()
    ours = student.model.layers[layer].self_attn.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    other = 1 - layer
    aligned_mixer = before.model.layers[other].self_attn.state_dict()
    assert all(
        torch.equal(tensor, aligned_mixer[name])
        for name, tensor in student.model.layers[other].self_attn.state_dict().items()
    )
    assert (folder / "choose.png").stat().st_size > 1000
    rows = [json.loads(line) for line in (job.scratch / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    assert "choose/score" in rows[0]


def test_the_cost_is_counted_and_kept_to(choose_job: Callable[..., Job], run_main: Any):
    metrics = run_main(choose.main, choose_job()).metrics
    # Three students and the teacher read both kinds but for the last, a token less than their length.
    assert 0.8 * 4 * (448 + 128) < metrics["tokens"] <= 4 * (448 + 128)
    assert metrics["token_share"] == metrics["tokens"] / RUN_TOKENS < 0.05
    assert metrics["recall_before"] < 0
    assert metrics["kl_before"] > 0


def test_a_choice_beyond_its_budget_is_refused(choose_job: Callable[..., Job]):
    job = choose_job(run_tokens=20_000)
    assert execute(choose.main, job) == "config"
    assert "more than 5% of the run's 20000" in json.loads((job.scratch / "exit.json").read_text())["message"]


def test_two_ranks_choose_as_one(choose_job: Callable[..., Job], run_main: Any, run_ranks: Any):
    alone = run_main(choose.main, choose_job())
    job = choose_job(seed=1234, budget=0.04)
    run_ranks("radlads.tasks.jobs.choose.choose", job, 2)
    together = job.store.read_manifest(job.output_prefix)
    assert together is not None
    assert together.metrics["attention_layers"] == alone.metrics["attention_layers"]
    assert together.metrics["tokens"] == alone.metrics["tokens"]
    for key in ("recall_before", "kl_before", "recall_after", "kl_after", "recall_teacher"):
        assert together.metrics[key] == pytest.approx(alone.metrics[key], rel=1e-5)


def test_a_teacher_that_fails_the_probe_ends_the_stage_before_a_layer_is_tried(
    choose_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(recall_choice, "sum_layers", lambda *args, **given: pytest.fail("a layer was tried"))
    job = choose_job(more={"probe": {"tasks": ["niah_single_1"]}}, lengths=(480,))
    assert execute(choose.main, job) == "config"
    message = json.loads((job.scratch / "exit.json").read_text())["message"]
    assert "the teacher answers 0.0% of the probe's needles, less than the 80%" in message
    assert "shorten recall.lengths, set probe.chat: true" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("search", ["one_at_a_time", "greedy"])
def test_a_search_by_needles_is_told_round_by_round(choose_job: Callable[..., Job], run_main: Any, search: str):
    probe = {"tasks": ["niah_single_1", "niah_multikey_2"], "chat": search == "greedy", "least": 0}
    job = choose_job(more={"probe": probe, "search": search}, lengths=(480,), run_tokens=1_000_000)
    metrics = run_main(choose.main, job).metrics
    sheet = json.loads((Path(job.spec.output_uri) / "choose.json").read_text())
    assert (sheet["search"], sheet["probe"]["needles"], sheet["probe"]["answers"]) == (search, probe, 4)
    (told,) = sheet["rounds"]
    assert (told["round"], told["kept"], set(told["candidates"])) == (1, [], {"0", "1"})
    assert told["chosen"] == metrics["attention_layers"] == sheet["attention_layers"]
    assert metrics["tokens"] <= job.typed.section.passes(2) * (4 * 480 + 128)


@pytest.mark.parametrize("chat", [False, True])
def test_needles_mark_their_answers_and_keep_their_length(tokenizer_folder: Path, tmp_path: Path, chat: bool):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    (tmp_path / "book.txt").write_text(" ".join(f"Here is sentence {i}." for i in range(200)), encoding="utf-8")
    section = RecallProbe(**{**PROBE, "documents": 6, "lengths": (640, 720), "haystack": (str(tmp_path / "book.txt"),)})
    probe = NeedleProbe(tasks=("niah_single_2", "niah_multikey_1", "niah_multikey_3"), chat=chat)
    quizzes = make_needles(section, probe, tokenizer, add_bos=True)
    assert {length: len(part) for length, part in quizzes.items()} == {640: 3, 720: 3}
    for length, part in quizzes.items():
        for number, quiz in enumerate(part):
            assert 0.9 * length < len(quiz.ids) == len(quiz.answers) <= length
            assert (quiz.ids[0], quiz.ids.count(tokenizer.bos_token_id)) == (tokenizer.bos_token_id, 1)
            assert set(quiz.answers) == {0, 1}
            answer = tokenizer.decode([i for i, n in zip(quiz.ids, quiz.answers, strict=True) if n]).strip(" .")
            before = tokenizer.decode(quiz.ids[: quiz.answers.index(1)])
            assert f"is: {answer}." in before
            assert ("Here is sentence" in before) == (number < 2)
            assert half_of(answer) == "training"
            assert ("<|assistant|>" in before) == chat
    assert make_needles(section, probe, tokenizer, add_bos=True) == quizzes


def test_without_a_record_difficulty_says_so(choose_job: Callable[..., Job], training: Any):
    job = choose_job("difficulty")
    inputs = {"student": InputRef(uri=f"{training.store.uri}/student", digest="student")}
    job = Job(spec=job.spec.model_copy(update={"inputs": inputs}))
    assert execute(choose.main, job) == "config"
    assert "the align stage recorded" in json.loads((job.scratch / "exit.json").read_text())["message"]


def test_a_quiz_holds_its_facts_and_marks_its_answers(tokenizer_folder: Path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    for seed in range(5):
        quiz = build_quiz(tokenizer, load_filler(()), length=400, rng=random.Random(seed))
        assert len(quiz.ids) == len(quiz.answers) <= 400
        numbers = sorted(set(quiz.answers) - {0})
        assert numbers == list(range(1, len(numbers) + 1))
        for number in numbers:
            first = quiz.answers.index(number)
            tokens = [token for token, answer in zip(quiz.ids, quiz.answers, strict=True) if answer == number]
            value = tokenizer.decode(tokens).strip()
            asked = tokenizer.decode(quiz.ids[:first]).rsplit("? The ", 1)[1].removesuffix(" says")
            assert f"The {asked} says {value}." in quiz.text.split("What does the")[0]


def test_a_quiz_too_short_for_a_fact_is_refused(tokenizer_folder: Path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    with pytest.raises(UserError, match="is too short for its fact and question"):
        build_quiz(tokenizer, load_filler(()), length=10, rng=random.Random(0))


def test_batches_are_padded_within_a_length(tokenizer_folder: Path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    section = RecallProbe(**{**PROBE, "documents": 7})
    quizzes = make_quizzes(section, tokenizer)
    assert {length: len(part) for length, part in quizzes.items()} == {96: 4, 128: 3}
    batches = quiz_batches(quizzes, 3, bos_id=1)
    assert [len(batch.input_ids) for batch in batches] == [3, 1, 3]
    assert all(batch.input_ids.shape[1] <= limit + 1 for batch, limit in zip(batches, (96, 96, 128), strict=True))
    assert all((batch.input_ids[:, 0] == 1).all() and (batch.answers[:, 0] == 0).all() for batch in batches)
    assert make_quizzes(section, tokenizer) == quizzes
