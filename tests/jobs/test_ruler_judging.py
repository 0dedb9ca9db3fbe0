"""RULER in the needle stage: every model on the same prompts, scores by task, length and group, and what the plan
refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.identity import identity
from radlads.tasks.contracts.recipe.judging.ruler import SYNTHETIC_TASKS
from radlads.tasks.contracts.recipe.sections import Needle, RecallSource, Ruler, Student
from radlads.tasks.contracts.specs import NeedleSpec, TransplantSpec, spec_digest
from radlads.tasks.jobs import transplant
from radlads.tasks.jobs.data.ruler.tasks import TASKS
from radlads.tasks.jobs.judge import generation, needle
from radlads.tasks.jobs.judge.ruler import prompts
from radlads.tasks.jobs.judge.ruler.prompts import check_ruler, make_ruler_trials
from radlads.tasks.jobs.judge.ruler.sheet import flatten_ruler, ruler_sheet
from radlads.tasks.jobs.report.retrieval.blocks import left_out, ruler_rows, ruler_table
from radlads.tasks.jobs.sources import load_tokenizer, pin_teacher

SMALL = Needle(lengths=(160,), depths=(0.5,), trials=5, batch=5, max_new_tokens=2)


@pytest.fixture
def essays(tmp_path: Path, stories: list[str]) -> str:
    (tmp_path / "essays.txt").write_text(" ".join(stories), encoding="utf-8")
    return str(tmp_path / "essays.txt")


@pytest.fixture
def run(make_job: Any, run_main: Any, reference: Any, teacher_folder: Path) -> Callable[[Needle], Any]:
    """run(section) → (needle.json, metrics) of the teacher, and of a student with its weights and attention."""

    def judge(section: Needle) -> Any:
        teacher = pin_teacher(str(teacher_folder))
        identity = Student(attention_layers=(0, 1), attention_rope=True)
        made = make_job("transplant", TransplantSpec(teacher=teacher, student=identity))
        run_main(transplant.main, made)
        spec = NeedleSpec(section=section, teacher=teacher, training_length=200)
        job = make_job("needle", spec, {"student": reference(made)})
        metrics = run_main(needle.main, job).metrics
        return json.loads((Path(job.spec.output_uri) / "needle.json").read_text()), metrics

    return judge


def asked_for(**changes: Any) -> Needle:
    return SMALL.model_copy(update={"ruler": Ruler(**({"lengths": (4096,), "samples": 5} | changes))})


@pytest.mark.parametrize("chat", [False, True])
def test_threads_and_ranks_make_the_prompts_of_one(
    essays: str, chat: bool, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = asked_for(haystack=(essays,), lengths=(3600, 2900), chat=chat)
    tokenizer = load_tokenizer(str(teacher_folder))
    if chat:
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    alone = make_ruler_trials(section, tokenizer)
    assert [trial.length for trial in alone] == sorted(trial.length for trial in alone)
    assert make_ruler_trials(section, tokenizer, threads=4) == alone
    shares: list[Any] = []
    monkeypatch.setattr(prompts, "gather", lambda own, ranks: shares.append(own) or [own] * ranks)
    for rank in range(3):
        with suppress(KeyError):  # the other ranks' share
            make_ruler_trials(section, tokenizer, threads=2, rank=rank, ranks=3)
    assert [len(share) for share in shares] == [8, 7, 7]
    monkeypatch.setattr(prompts, "gather", lambda own, ranks: shares)
    assert make_ruler_trials(section, tokenizer, threads=2, rank=2, ranks=3) == alone


def test_a_model_that_answers_right_scores_one_on_every_task(
    run: Any, essays: str, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = [{"question": f"What is {i}?", "answers": [f"n{i}"], "context": f"{i} is n{i}. " * 9} for i in range(300)]
    (tmp_path / "squad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    section = asked_for(haystack=(essays,), squad=str(tmp_path / "squad.jsonl"), lengths=(3000,))
    trials = make_ruler_trials(section, load_tokenizer(str(teacher_folder)))
    assert len(trials) == 12 * 5
    assert all(len(trial.prompt.ids) + TASKS[trial.task].new_tokens <= trial.length for trial in trials)
    answers = {tuple(trial.prompt.ids): f" {' and '.join(trial.answers)}." for trial in trials}
    tokens = set()

    def oracle(_model: Any, _tokenizer: Any, prompts: Sequence[list[int]], new: int, _: Any) -> list[str]:
        tokens.add(new)
        return [answers.get(tuple(prompt), "") for prompt in prompts]

    monkeypatch.setattr(generation, "generate", oracle)
    sheet, metrics = run(section)
    ruler = sheet["ruler"]
    assert tokens == {2, 128, 120, 50, 30, 32}
    assert ruler["tasks"] == [*SYNTHETIC_TASKS, "qa_1"]
    assert ruler["left_out"] == {"qa_2": "no question file (hotpotqa)"}
    assert {cell["student"]["mean"] for cell in ruler["cells"]} == {1}
    assert set(ruler["models"]["student"]["by_group"]) == {
        "single", "multikey", "multi", "tracing", "aggregation", "qa"
    }  # fmt: skip
    wanted = {"student/ruler", "student/ruler/3000", "student/ruler/vt/3000", "teacher/ruler/multikey", "ruler_ratio"}
    assert {metrics[name] for name in wanted} == {1}
    assert metrics["student/needle"] == 0
    assert [one["expected"] for one in ruler["examples"]][-1][0].startswith("n")


def test_both_models_are_generated_from(run: Any):
    sheet, metrics = run(asked_for(tasks=("fwe",), lengths=(1024,)))
    (example,) = sheet["ruler"]["examples"]
    assert example["teacher"] == example["student"] != ""
    assert 900 < example["prompt_tokens"] <= 1024 - 50
    assert metrics["student/ruler"] == metrics["teacher/ruler"]


def test_a_length_that_was_not_run_counts_nowhere(teacher_folder: Path):
    section = asked_for(tasks=("niah_single_1", "fwe"), lengths=(2048, 1024))
    assert section.ruler is not None
    trials = make_ruler_trials(section, load_tokenizer(str(teacher_folder)))
    right = [" ".join(trial.answers) for trial in trials]
    missing = [(trial.task, trial.length) == ("fwe", 2048) for trial in trials]
    short = [None if absent else text for absent, text in zip(missing, right, strict=True)]
    wrong = ["" if trial.task == "fwe" else text for trial, text in zip(trials, right, strict=True)]
    sheet = ruler_sheet(section.ruler, trials, {"teacher": right, "student": short, "distill": wrong})
    models = sheet["models"]
    assert (models["student"]["mean"], models["student"]["not_run"]) == (1, [2048])
    assert models["student"]["by_group"]["aggregation"]["trials"] == 5
    assert models["distill"]["mean"] == 0.5
    assert models["distill"]["by_group"]["single"]["mean"] == 1
    none = models["distill"]["by_group"]["aggregation"]
    assert none == {"mean": 0, "stderr": pytest.approx(0.0935, rel=1e-2), "trials": 10}
    flat = flatten_ruler(sheet)
    assert "student/ruler/2048" not in flat
    assert flat["student/ruler/fwe/1024"] == flat["ruler_ratio"] == 1
    rows = {row[0]: row[1:4] for row in ruler_rows(sheet, "x")}
    assert rows["RULER, mean of 2 tasks"][0] == "100 % ± 6"
    assert list(rows)[1:] == ["… single needles", "… common and frequent words"]
    assert left_out(sheet).startswith("2 of 13 tasks (not among needle.ruler.tasks: niah_single_2, ")

    judged: Any = SimpleNamespace(needle={"ruler": sheet}, of_stage=lambda _: SimpleNamespace(short="abc"))
    table = ruler_table(judged)
    assert table is not None
    assert table.header == ("task", "1024 tokens", "2048 tokens", "source")
    assert list(table.rows[1]) == ["fwe", "100 / 100 / 0 ± 14", "100 / not run / 0 ± 14", "abc"]


def test_ranks_share_the_prompts_and_each_gets_all_answers(monkeypatch: pytest.MonkeyPatch):
    kinds = [(8, 2), (8, 4), (16, 4)] * 4
    prompts = [generation.Prompt([i], length, new) for i, (length, new) in enumerate(kinds)]
    parts: dict[int, Any] = {}

    def generate(_model: Any, _tokenizer: Any, ids: Sequence[list[int]], new: int, _: Any) -> list[str]:
        return [f"{one} of {new}" for (one,) in ids]

    def answers(rank: int, ranks: int) -> Any:
        def gather(own: Any, _: int) -> list[Any]:
            parts[rank] = own
            return list(parts.values())

        monkeypatch.setattr(generation, "gather", gather)
        job: Any = SimpleNamespace(rank=rank, world_size=ranks)
        return generation.answer_prompts(job, None, None, prompts, lambda _: 3, lambda _: None)  # type: ignore[arg-type]

    monkeypatch.setattr(generation, "generate", generate)
    monkeypatch.setattr(generation, "in_step", lambda _: nullcontext())
    alone = answers(0, 1)
    assert alone == [f"{i} of {new}" for i, (_, new) in enumerate(kinds)]
    with suppress(KeyError):  # the other rank has not answered yet
        answers(0, 2)
    assert answers(1, 2) == alone
    assert sorted(map(len, parts.values())) == [6, 6]  # four prompts of a kind: two for each rank


def test_chat_puts_the_answers_beginning_into_the_reply(teacher_folder: Path):
    tokenizer = load_tokenizer(str(teacher_folder))
    (first, *_) = make_ruler_trials(asked_for(tasks=("vt",), lengths=(2048,), chat=True), tokenizer)
    text = tokenizer.decode(first.prompt.ids)
    assert text.startswith("<|user|>Memorize and track")
    assert "in the text above.<|assistant|>Answer: According to" in text
    assert text.endswith("they are:")
    assert len(first.prompt.ids) + 30 <= 2048
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="chat is on, but the tokenizer has no chat template"):
        check_ruler(asked_for(tasks=("vt",), chat=True), tokenizer, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "niah_single_2, niah_single_3, .* hide needles in essays, and there are none; name text files"),
        ({"tasks": ("cwe",), "lengths": (256,)}, "cwe does not fit in 256 tokens"),
        ({"tasks": ("niah_single_2",), "lengths": (400_000,), "haystack": "essays"}, "sentences of the haystack fill"),
        ({"tasks": ("niah_single_2",), "haystack": "nowhere.txt"}, r"no file matches 'nowhere\.txt'"),
        ({"tasks": ("qa_1",), "squad": "nowhere.json"}, r"no file matches 'nowhere\.json'"),
    ],
)
def test_the_plan_refuses_what_the_job_could_not_do(
    changes: dict[str, Any], words: str, essays: str, teacher_folder: Path
):
    if "haystack" in changes:
        changes = changes | {"haystack": (essays if changes["haystack"] == "essays" else changes["haystack"],)}
    with pytest.raises(UserError, match=words) as refused:
        check_ruler(asked_for(**changes), load_tokenizer(str(teacher_folder)), 512)
    assert "\n" not in str(refused.value)


def test_the_plan_warns_of_tasks_left_out_and_of_positions(essays: str, teacher_folder: Path):
    tokenizer = load_tokenizer(str(teacher_folder))
    warnings = check_ruler(asked_for(haystack=(essays,), lengths=(3000,)), tokenizer, 512)
    missing = "qa_1: no question file (squad); qa_2: no question file (hotpotqa)"
    assert warnings[0] == f"needle.ruler judges 11 of 13 tasks ({missing})"
    assert "needle.ruler.lengths [3000] are beyond the 512 positions" in warnings[1]
    assert check_ruler(SMALL, tokenizer, 512) == check_ruler(asked_for(tasks=("fwe",)), tokenizer, 9000) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": ["qa_1"]}, "qa_1 needs a file with questions; give it as squad"),
        ({"tasks": ["vt"], "hotpotqa": "q.jsonl"}, "hotpotqa is the file of qa_2, which is not among the tasks"),
        ({"tasks": ["vt", "vt"]}, "a task twice"),
        ({"tasks": ["vtt"]}, "tasks.0"),
    ],
)
def test_a_recipe_names_tasks_that_can_be_judged(changes: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        Ruler(**changes)


def test_a_recipe_without_ruler_keeps_its_digests():
    plain = NeedleSpec(section=SMALL, teacher={"path": "t", "fingerprint": "f"}, training_length=9)  # type: ignore[arg-type]
    judged = plain.model_copy(update={"section": asked_for(tasks=("vt",))})
    recall = RecallSource(kind="recall", documents=1)
    for one, added in ((plain.section, {"ruler"}), (recall, {"ruler", "chat"})):
        assert not added & identity(one, {}).keys()
    assert spec_digest("needle", plain, {}) != spec_digest("needle", judged, {})
    assert (plain.section.longest, judged.section.longest) == (160, 4096)
