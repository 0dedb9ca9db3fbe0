"""evaluate.suite: local files in, the harness's own prompts out, and scores over chance."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import datasets
import numpy as np
import pytest
import torch
from lm_eval.tasks import TaskManager
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from radlads.tasks.contracts.recipe.judging.suite import EvalSuite, SuiteTask
from radlads.tasks.contracts.recipe.sections import Evaluate
from radlads.tasks.jobs.judge import evaluate
from radlads.tasks.jobs.judge.batching.budget import RowBudget
from radlads.tasks.jobs.judge.suite.over_chance import over_chance, relative_score
from radlads.tasks.jobs.judge.suite.scores import check_suite
from radlads.tasks.jobs.judge.suite.tasks import BENCHMARKS, LocalTask, _yaml_folder, load_suite
from radlads.tasks.jobs.report.judged.suite_report import suite_row, suite_table, suite_verdicts
from radlads.tasks.jobs.report.report_blocks import render_markdown

Row = dict[str, Any]
FOUR = ["sat.", "was a red ball.", "zq zq.", "xx"]
LABELLED = {"text": FOUR, "label": ["A", "B", "C", "D"]}
# Rows in the harness's columns, and the same items as the copies have them.
OWN: dict[str, Row] = {
    "lambada_openai": {"text": "Tim saw a dog. “Hello,” said Tim"},
    "arc_easy": {"question": "What did Tim do?", "choices": LABELLED, "answerKey": "B"},
    "openbookqa": {"question_stem": "Tim took", "choices": LABELLED, "answerKey": "B"},
    "piqa": {"goal": "How do I play?", "sol1": "Take a ball.", "sol2": "Take zq.", "label": 1},
    "hellaswag": {
        "activity_label": "Playing", "ctx_a": "[header] How to play [title] Take a ball.", "ctx_b": "then you",
        "endings": ["[step] run.", "sit.", "eat.", "zq."], "label": "2",
    },
    "winogrande": {"sentence": "Tim ate the bun but the _ was bad.", "option1": "bun", "option2": "bread",
                   "answer": "2"},
    "boolq": {"passage": "Tim has a dog.\nQuestion: is a word.", "question": "is the dog red", "label": 1},
    "commonsense_qa": {
        "question": "Where is Tim?", "choices": {"text": ["park", "home", "bed", "car", "zoo"],
                                                  "label": ["A", "B", "C", "D", "E"]}, "answerKey": "C",
    },
    "copa": {"premise": "Tim sat.", "choice1": "he ran.", "choice2": "he was sad.", "question": "cause", "label": 1},
    "mmlu": {"question": " What is 1 + 1?", "choices": ["1", "2", "3", "4"], "answer": 1},
    "gsm8k": {"question": "Tim has 1 ball and gets 1. How many?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
}  # fmt: skip
OWN["arc_challenge"] = OWN["arc_easy"]
COPIES: dict[str, Row] = {
    "lambada_openai": {"context": "Tim saw a dog. “Hello,” said", "continuation": "Tim"},
    "arc_easy": {"query": "Question: What did Tim do?", "choices": FOUR, "gold": 1},
    "openbookqa": {"query": "Tim took", "choices": FOUR, "gold": 1},
    "piqa": {"query": "Question: How do I play?\n", "choices": ["Take a ball.", "Take zq."], "gold": 1},
    "winogrande": {
        "context_options": ["Tim ate the bun but the bun", "Tim ate the bun but the bread"],
        "continuation": "was bad.", "gold": 1,
    },
    "boolq": {
        "query": "Passage: Tim has a dog.\nQuestion: is a word.\nQuestion: is the dog red?", "choices": ["no", "yes"],
        "gold": 1,
    },
    "commonsense_qa": {
        "query": "Question: Where is Tim?\nChoices:\nA. park\nB. home\nC. bed\nD. car\nE. zoo\nAnswer:",
        "choices": ["A", "B", "C", "D", "E"], "gold": 2,
    },
    "copa": {"query": "Tim sat, because", "choices": ["he ran.", "he was sad."], "gold": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def subjects() -> list[str]:
    index = TaskManager(include_path=_yaml_folder("mmlu/default"), include_defaults=False)
    names = [name.removeprefix("mmlu_") for name in index.all_subtasks]
    assert len(names) == 57
    return names


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(file name, rows) → the folder."""

    def written(name: str, rows: list[Row] | str) -> Path:
        folder = tmp_path / "evals"
        folder.mkdir(exist_ok=True)
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        packers: dict[str, Any] = {".gz": gzip.compress, ".xz": lzma.compress}
        (folder / name).write_bytes(packers.get(Path(name).suffix, bytes)(text.encode()))
        return folder

    return written


def built(folder: Path, name: SuiteTask, **options: Any) -> LocalTask:
    tasks, faults = load_suite(EvalSuite(path=str(folder), tasks=(name,), **options))
    assert faults == []
    return tasks[0]


def requests(tasks: dict[str, Any]) -> list[Any]:
    asked = []
    for name in sorted(tasks):
        if tasks[name].config.num_fewshot is None:
            tasks[name].set_config("num_fewshot", 0)
        tasks[name].set_fewshot_seed(7)
        tasks[name].build_all_requests()
        asked += [instance.args for instance in tasks[name].instances]
    return asked


def several(name: str, row: Row, subjects: list[str], count: int = 7) -> list[Row]:
    """Different items like the row."""
    if name == "mmlu":
        return [row | {"subject": s, "question": f"{row['question']} {s} {n}"} for s in subjects for n in range(count)]
    text = next(key for key in ("text", "query", "context", "sentence", "passage", "premise", *row) if key in row)
    return [row | {text: f"Question: Tim {n}. {row[text]}" if text == "query" else f"Tim {n}. {row[text]}"}
            for n in range(count)]  # fmt: skip


@pytest.mark.parametrize("name", get_args(SuiteTask))
def test_prompts_are_those_of_the_harness(
    name: SuiteTask, write: Any, subjects: list[str], monkeypatch: pytest.MonkeyPatch
):
    """The harness's own YAML and factory, its dataset read from the hub in place of a file."""
    items = several(name, OWN[name], subjects, 1 if name == "mmlu" else 7)
    folder = write(f"{name}.jsonl", items)
    examples = several(name, OWN[name] | {"question": "Other?"}, subjects) if name in ("mmlu", "gsm8k") else items
    options: dict[str, Any] = {}
    if name in ("mmlu", "gsm8k"):
        write(f"{name}_{'dev' if name == 'mmlu' else 'train'}.jsonl", examples)
        options = {"num_fewshot": {"mmlu": 5}} if name == "mmlu" else {}
    ours = built(folder, name, **options)

    def load_dataset(path: str, name: str | None = None, **_: Any) -> Any:
        chosen = [[row for row in rows if row.get("subject", name) == name] for rows in (items, examples)]
        held, more = map(datasets.Dataset.from_list, chosen)
        return datasets.DatasetDict({"test": held, "validation": held, "train": more, "dev": more})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    manager = TaskManager(include_path=_yaml_folder(BENCHMARKS[name].folder), include_defaults=False)
    theirs = manager.load([name])["tasks"]
    for task in theirs.values() if name == "mmlu" else ():
        task.set_config("num_fewshot", 5)
    expected = requests(theirs)
    assert requests(ours.loaded["tasks"]) == expected
    assert len(expected) >= len(items)
    assert ours.notes == ()
    assert ours.num_fewshot == (5 if name in ("mmlu", "gsm8k") else 0)
    if ours.num_fewshot:
        assert expected[0][0].count("Other") == 5


@pytest.mark.parametrize("name", COPIES)
def test_copies_give_the_same_prompts(name: SuiteTask, write: Any):
    theirs = requests(built(write(f"{name}.jsonl", [OWN[name]]), name).loaded["tasks"])
    (folder := write(f"{name}_1.jsonl.gz", [COPIES[name]])).joinpath(f"{name}.jsonl").unlink()
    ours = built(folder, name)
    assert requests(ours.loaded["tasks"]) == theirs
    assert ours.files == (f"{name}_1.jsonl.gz",)


def test_examples_may_have_the_other_form(write: Any):
    folder = write("arc_easy.jsonl", [OWN["arc_easy"]])
    write("arc_easy_train.jsonl.gz", [COPIES["arc_easy"] | {"query": "Question: Why?"}])
    task = built(folder, "arc_easy", num_fewshot={"arc_easy": 1})
    prompt = "Question: Why?\nAnswer: was a red ball.\n\nQuestion: What did Tim do?\nAnswer:"
    assert requests(task.loaded["tasks"])[0] == (prompt, " sat.")
    assert task.files == ("arc_easy.jsonl", "arc_easy_train.jsonl.gz")


def test_what_a_file_lacks_is_said(write: Any):
    four = {"query": "Question: Where?\nChoices:\nA. park\nB. home\nC. bed\nD. car\nAnswer:",
            "choices": ["A", "B", "C", "D"], "gold": 2}  # fmt: skip
    folder = write("commonsense_qa.jsonl.xz", [four])
    activity = {"question": "[header] How to play [title] Take it.", "answer": "B",
                "choices": {"A": "[step] run.", "B": "sit."}}  # fmt: skip
    write("hellaswag_2000.json", json.dumps({"dataset": "x", "dev": [activity], "test": [activity]}, indent=1))
    write("gsm8k_test.jsonl", several("gsm8k", OWN["gsm8k"], []))
    asked = requests(built(folder, "commonsense_qa").loaded["tasks"])
    assert asked[-1] == ("Question: Where?\nA. park\nB. home\nC. bed\nD. car\nAnswer:", " D")
    assert len(asked) == 4
    asked = requests(built(folder, "hellaswag").loaded["tasks"])
    assert asked == 2 * [("How to play. Take it.", "  run."), ("How to play. Take it.", " sit.")]
    asked = requests(built(folder, "gsm8k").loaded["tasks"])
    for number, (prompt, _) in enumerate(asked):  # no item is its own example
        assert prompt.count("Question:") == 6
        assert prompt.count(f"Tim {number}.") == 1
    faults, notes = check_suite(EvalSuite(path=str(folder), tasks=("commonsense_qa", "hellaswag", "gsm8k")))
    assert faults == []
    assert [note.split(": ")[1] for note in notes] == ["commonsense_qa", "hellaswag", "gsm8k"]
    assert "4 choices" in notes[0]


GSM8K = OWN["gsm8k"]


@pytest.mark.parametrize(
    ("name", "files", "words"),
    [
        ("piqa", {}, "has no piqa.jsonl"),
        ("piqa", {"piqa.jsonl": [OWN["piqa"]], "piqa.json.gz": [OWN["piqa"]]}, "could both hold the items"),
        ("piqa", {"piqa.jsonl": [OWN["piqa"], OWN["copa"]]}, "item 2: has the columns premise, choice1"),
        ("piqa", {"piqa.jsonl": [{"goal": "x"}]}, "needed are goal, sol1, sol2, label or query, choices, gold"),
        ("piqa", {"piqa.jsonl": [COPIES["piqa"] | {"gold": 2}]}, "item 1: gold is 2, but there are 2 choices"),
        ("piqa", {"piqa.jsonl": [OWN["piqa"] | {"label": "1"}]}, "item 1: label: "),
        ("piqa", {"piqa.jsonl": [OWN["piqa"] | {"goal": "\ud800"}]}, "item 1: goal: "),
        ("piqa", {"piqa.jsonl": ""}, "has no items"),
        ("piqa", {"piqa.jsonl": '{\n"test": [], "train": []}'}, "are judged, and train is for training"),
        ("piqa", {"piqa.jsonl": "{"}, "not valid JSON"),
        ("arc_easy", {"arc_easy.jsonl": [OWN["arc_easy"] | {"answerKey": "E"}]}, "answerKey must be one of them"),
        ("copa", {"copa.jsonl": [COPIES["copa"] | {"query": "Tim sat"}]}, "must end with ', because'"),
        ("lambada_openai", {"lambada_openai.jsonl": [{"text": "Tim"}]}, "must end with a space and the word"),
        ("mmlu", {"mmlu_test.jsonl": [OWN["mmlu"] | {"subject": "anatomy"}]}, "no items of the subject"),
        ("gsm8k", {"gsm8k.jsonl": [GSM8K]}, "5 examples are needed for a prompt, and there are 0"),
        ("gsm8k", {"gsm8k.jsonl": [GSM8K], "gsm8k_train.jsonl": [GSM8K]}, "and there are 1"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_serve_is_one_line(name: SuiteTask, files: dict[str, Any], words: str, write: Any):
    folder = write("readme.txt", "")
    for file, rows in files.items():
        write(file, rows)
    tasks, faults = load_suite(EvalSuite(path=str(folder), tasks=(name,)))
    assert tasks == []
    (fault,) = faults
    assert fault.startswith(f"evaluate.suite: {name}: ")
    assert words in fault
    assert "\n" not in fault


def test_an_unknown_subject_is_named(write: Any, subjects: list[str]):
    folder = write("mmlu.jsonl", several("mmlu", OWN["mmlu"], [*subjects, "sorcery"], 1))
    assert "no subject 'sorcery'" in load_suite(EvalSuite(path=str(folder), tasks=("mmlu",)))[1][0]


def test_sections_that_contradict_themselves_are_refused():
    for given in (
        {"tasks": ["piqa", "piqa"]},
        {"tasks": ["piqa"], "num_fewshot": {"copa": 1}},
        {"num_fewshot": {"copa": -1}},
    ):
        with pytest.raises(ValidationError, match=r"twice|num_fewshot"):
            EvalSuite.model_validate({"path": "x", **given})
    with pytest.raises(ValidationError, match="piqa: in `tasks` and in `suite`"):
        Evaluate.model_validate({"tasks": [{"name": "piqa"}], "suite": {"path": "x"}})
    assert set(BENCHMARKS) == set(get_args(SuiteTask))


def test_scores_over_chance():
    rng = np.random.default_rng(0)
    skill = rng.random(4000)
    teacher, student = (skill < 0.6).astype(float), (skill + rng.normal(0, 0.1, 4000) < 0.55).astype(float)
    chance = np.full(4000, 0.25)
    found = over_chance(teacher, student, chance)
    assert found["relative"]["value"] == pytest.approx((student.mean() - 0.25) / (teacher.mean() - 0.25))
    picks = rng.integers(0, 4000, (500, 4000))
    resampled = (student[picks].mean(1) - 0.25) / (teacher[picks].mean(1) - 0.25)
    assert found["relative"]["stderr"] == pytest.approx(resampled.std(), rel=0.15)
    assert over_chance(teacher, teacher, chance)["relative"] == {"value": 1.0, "stderr": 0.0}
    # Pairing matters: scores in another order have a larger error.
    assert over_chance(teacher, rng.permutation(student), chance)["relative"]["stderr"] > found["relative"]["stderr"]
    guesses = (rng.random(4000) < 0.25).astype(float)
    assert over_chance(guesses, teacher, chance)["relative"] is None
    assert over_chance(np.eye(1, 40)[0], np.zeros(40), np.zeros(40))["relative"] is None
    scores = {"a": {"value": 0.8, "stderr": 0.03}, "b": {"value": 1.0, "stderr": 0.04}, "c": None}
    mean = relative_score({name: {"suite": {"relative": score}} for name, score in scores.items()} | {"d": {}})
    assert mean == {"value": 0.9, "stderr": pytest.approx(0.025), "tasks": ["a", "b"], "left_out": ["c"]}
    assert relative_score({"d": {}}) is None


def test_teacher_and_student_are_judged_and_reported(write: Any, teacher_folder: Path, subjects: list[str]):
    torch.manual_seed(0)
    teacher, other = (AutoModelForCausalLM.from_pretrained(teacher_folder).eval() for _ in range(2))
    for parameter in other.parameters():
        parameter.data.normal_(0, 0.3)
    # A model finds the shorter continuation likelier; two in three items have it as their answer.
    rows = [{"query": f"Tim {n} sat, because", "choices": ["he.", "a zq zqx xqz qqz zxz."], "gold": int(n % 3 == 0)}
            for n in range(36)]  # fmt: skip
    folder = write("copa.jsonl", rows)
    write("lambada_openai.jsonl", several("lambada_openai", OWN["lambada_openai"], []))
    suite = {"path": str(folder), "tasks": ["copa", "lambada_openai"]}
    section = Evaluate(suite=suite, batch=4)
    pin = SimpleNamespace(files=[SimpleNamespace(path=name, sha256=f"sha-{name}") for name in
                                 ("copa.jsonl", "lambada_openai.jsonl")])  # fmt: skip
    typed = SimpleNamespace(section=section, pins={"section.suite.path": pin})
    job: Any = SimpleNamespace(rank=0, world_size=1, typed=typed)
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    sheet = evaluate.run_tasks(job, {"teacher": teacher, "student": teacher}, tokenizer, section, RowBudget(4))
    scored = sheet["copa"]["suite"]
    assert (
        sheet["copa"]["teacher"]
        == sheet["copa"]["student"]
        == {"acc": {"value": 2 / 3, "stderr": pytest.approx(0.08, rel=0.01)}}
    )
    assert scored["relative"] == {"value": 1.0, "stderr": 0.0}
    assert (scored["chance"], scored["items"], scored["metric"]) == (0.5, 36, "acc")
    assert scored["files"] == {"copa.jsonl": "sha-copa.jsonl"}
    assert sheet["lambada_openai"]["suite"]["chance"] == 0
    assert sheet["lambada_openai"]["suite"]["relative"] is None
    sheet = evaluate.run_tasks(job, {"teacher": teacher, "student": other}, tokenizer, section, RowBudget(4))
    mean = relative_score(sheet)
    assert mean is not None
    assert (mean["tasks"], mean["left_out"]) == (["copa"], ["lambada_openai"])
    ours, theirs = (sheet["copa"][name]["acc"]["value"] for name in ("student", "teacher"))
    assert mean["value"] == pytest.approx((ours - 0.5) / (theirs - 0.5))
    flat = evaluate.flatten({}, sheet, mean)
    assert flat["relative_score"] == flat["relative_score/copa"] == mean["value"]
    assert flat["teacher/copa/acc"] == theirs
    assert "relative_score/lambada_openai" not in flat
    products: Any = SimpleNamespace(
        evaluation={"tasks": sheet, "relative_score": mean}, of_stage=lambda _: SimpleNamespace(short="abc")
    )
    table = suite_table(products)
    assert table is not None
    page = render_markdown("t", [table, *suite_verdicts(products.evaluation)])
    assert f"| copa, acc | {theirs:.4f} ± " in page
    assert f"| mean of 1 |  |  |  | × {mean['value']:.4f} ± " in page
    assert page.count("not above chance by two standard errors: lambada_openai") == 2
    assert "Prompts begin without BOS, the tokenizer's default." in page
    assert suite_row(products.evaluation, "abc")[0][0] == "1 benchmarks, over chance"
    products.evaluation["relative_score"] = relative_score({"lambada_openai": sheet["lambada_openai"]})
    assert suite_row(products.evaluation, "abc") == []
    assert [verdict.text[:15] for verdict in suite_verdicts(products.evaluation)] == ["Not in the mean"]
    none = suite_table(products)
    assert none is not None
    assert "mean of" not in render_markdown("t", [none])


COUNTS = {"lambada_openai": 5153, "arc_easy": 2376, "arc_challenge": 1172, "piqa": 1838, "hellaswag": 2000,
          "winogrande": 1267, "boolq": 3270, "openbookqa": 500, "commonsense_qa": 1221, "copa": 100, "mmlu": 14042,
          "gsm8k": 1319}  # fmt: skip
FIRST = {
    "lambada_openai": ("I don't care about", " signs"),
    "arc_easy": ("Question: Which statement best explains why photosynthesis is the foundation of most food webs?\n"
                 "Answer:", " Sunlight is the source of energy for nearly all ecosystems."),
    "winogrande": ("Sarah was a much better surgeon than Maria so Sarah", " always got the easier cases."),
    "copa": ("The man turned on the faucet therefore", "  the toilet filled with water."),
    "mmlu": ("over Q.\nA. 0\nB. 4\nC. 2\nD. 6\nAnswer:", " A"),
}  # fmt: skip


def test_real_files(shared_data: Path):
    tasks, faults = load_suite(EvalSuite(path=str(shared_data / "evals")))
    assert faults == []
    assert {t.name: sum(len(one.eval_docs) for one in t.loaded["tasks"].values()) for t in tasks} == COUNTS
    for task in tasks:
        one = min(task.loaded["tasks"].items())[1]
        one.set_fewshot_seed(1)
        one.build_all_requests(limit=1)
        ending, continuation = FIRST.get(task.name, ("", ""))
        prompt, asked = one.instances[0].args[:2]
        assert prompt.endswith(ending or ":") or task.name in ("hellaswag", "openbookqa")
        assert asked == continuation or task.name not in FIRST
    assert [task.name for task in tasks if task.notes] == ["hellaswag", "commonsense_qa", "gsm8k"]
