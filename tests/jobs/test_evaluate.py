"""evaluate: numbers that can be checked by hand, any number of ranks, and harness tasks without a hub."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from radlads.model.student.load import load_student
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.judging.texts import EvalText
from radlads.tasks.contracts.recipe.sections import Dataset, Evaluate, Student
from radlads.tasks.contracts.specs import EvaluateSpec, TokenizeSpec, TransplantSpec
from radlads.tasks.jobs import transplant
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.data import tokens
from radlads.tasks.jobs.data.loader import open_dataset
from radlads.tasks.jobs.judge import evaluate
from radlads.tasks.jobs.judge import heldout_scores as bits
from radlads.tasks.jobs.judge.texts import check_text
from radlads.tasks.jobs.sources import load_tokenizer, pin_teacher, tokenizer_fingerprint


@pytest.fixture
def data(make_job: Any, run_main: Any, reference: Any, teacher_folder: Path, tmp_path: Path, stories: list[str]) -> Any:
    """InputRef of a small dataset."""
    (tmp_path / "stories.txt").write_text("\n---\n".join(stories), encoding="utf-8")
    source = {"kind": "files", "paths": [str(tmp_path / "stories.txt")], "separator": "\n---\n"}
    dataset = Dataset.model_validate({"sources": [source], "heldout_fraction": 0.1})
    job = make_job(
        "tokenize",
        TokenizeSpec(
            name="train",
            dataset=dataset,
            tokenizer=str(teacher_folder),
            tokenizer_fingerprint=tokenizer_fingerprint(str(teacher_folder)),
            teacher=None,
        ),
    )
    run_main(tokens.main, job)
    return reference(job)


@pytest.fixture
def student(make_job: Any, run_main: Any, reference: Any, teacher_folder: Path) -> Callable[..., Any]:
    """student(**options) → InputRef of a transplanted student."""

    def make(**options: Any) -> Any:
        job = make_job(
            "transplant", TransplantSpec(teacher=pin_teacher(str(teacher_folder)), student=Student(**options))
        )
        run_main(transplant.main, job)
        return reference(job)

    return make


@pytest.fixture
def judge(make_job: Any, run_main: Any, teacher_folder: Path) -> Callable[..., tuple[dict[str, Any], dict[str, float]]]:
    """judge({input: InputRef}, **section) → (evaluate.json, metrics)."""

    def run(inputs: dict[str, Any], **section: Any) -> Any:
        options = {"context": 32, "heldout_tokens": 1024, "batch": 5, **section}
        spec = EvaluateSpec(section=Evaluate(**options), teacher=pin_teacher(str(teacher_folder)))
        job = make_job("evaluate", spec, inputs)
        manifest = run_main(evaluate.main, job)
        return json.loads((Path(job.spec.output_uri) / "evaluate.json").read_text()), manifest.metrics

    return run


def test_the_teacher_itself_scores_as_the_teacher(judge: Any, data: Any, student: Any):
    _, metrics = judge({"student": student(attention_layers=(0, 1), attention_rope=True), "data": data})
    assert metrics["kl"] == 0
    assert metrics["top1_agreement"] == 1
    assert metrics["bits_per_byte_ratio"] == 1
    assert metrics["loss_gap"] == 0
    assert metrics["student/bits_per_byte"] == metrics["teacher/bits_per_byte"]


def test_numbers_are_those_of_a_plain_computation(judge: Any, data: Any, student: Any, teacher_folder: Path):
    inputs = {"student": student(), "data": data}
    sheet, metrics = judge(inputs)
    dataset = open_dataset(Path(data.uri))
    split = dataset.split("heldout")
    flat = torch.from_numpy(split.read(0, sheet["windows"] * 32 + 1).astype(np.int64))
    rows = torch.stack([flat[i * 32 : i * 32 + 33] for i in range(sheet["windows"])])
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
    ours = load_student(Path(inputs["student"].uri) / "model")
    with torch.no_grad():
        p = teacher(rows[:, :-1]).logits.double().log_softmax(-1)
        q = ours(rows[:, :-1]).logits.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean(1).numpy()
    nll = -q.gather(2, rows[:, 1:, None])[..., 0]
    assert metrics["kl"] == pytest.approx(kl.mean(), rel=1e-4)
    assert metrics["kl_stderr"] == pytest.approx(kl.std(ddof=1) / math.sqrt(len(kl)), rel=1e-3)
    assert metrics["student/loss"] == pytest.approx(nll.mean().item(), rel=1e-5)
    assert metrics["top1_agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    # The tokens scored are those of the stream but the first; EOS stands for no byte of text.
    tokenizer = load_tokenizer(str(teacher_folder))
    text = tokenizer.decode(flat[1:], skip_special_tokens=True)
    assert sheet["bytes"] == pytest.approx(len(text.encode()), abs=4)
    bits_of_text = nll[rows[:, 1:] != dataset.eos_id].sum().item() / math.log(2)
    assert metrics["student/bits_per_byte"] == pytest.approx(bits_of_text / sheet["bytes"], rel=1e-5)
    assert {"prompt", "teacher", "student"} == set(sheet["samples"][0])


def test_every_stage_given_is_scored_on_the_same_windows(judge: Any, data: Any, student: Any):
    perfect = student(attention_layers=(0, 1), attention_rope=True)
    sheet, metrics = judge(
        {"student": perfect, "transplant": student(), "align": student(attention_layers=(1,)), "data": data}
    )
    assert list(sheet["models"]) == ["teacher", "student", "transplant", "align"]
    assert metrics["kl"] == 0 < metrics["kl/align"]
    assert metrics["kl/transplant"] > 0
    assert "bits_per_byte_ratio/transplant" in metrics


def test_a_text_is_scored_to_its_last_token(
    judge: Any, student: Any, data: Any, teacher_folder: Path, tmp_path: Path, stories: list[str]
):
    """Against one pass a window by hand: documents in a row, every token of text once, the last window shorter."""
    (tmp_path / "text.txt").write_text("\n---\n".join(stories[:3]), encoding="utf-8")
    text = {"name": "mine", "paths": [str(tmp_path / "text.txt")], "separator": "\n---\n", "context": 48}
    inputs = {"student": student(), "data": data}
    sheet, metrics = judge(inputs, texts=[text])
    found = sheet["texts"]["mine"]
    tokenizer = load_tokenizer(str(teacher_folder))
    eos = tokenizer.eos_token_id
    flat = [eos]
    for number, story in enumerate(stories[:3]):
        flat += [eos] * bool(number) + tokenizer(story, add_special_tokens=False)["input_ids"]
    assert found["tokens"] == len(flat) - 1
    assert found["tokens"] % 48, "the last window is a shorter one"
    assert found["bytes"] == sum(len(story.encode()) for story in stories[:3])
    for name, model in (
        ("teacher", AutoModelForCausalLM.from_pretrained(teacher_folder)),
        ("student", load_student(Path(inputs["student"].uri) / "model")),
    ):
        nats = 0.0
        for start in range(0, len(flat) - 1, 48):
            ids = torch.tensor([flat[start : start + 49]])
            with torch.no_grad():
                log_p = model(ids[:, :-1]).logits.double().log_softmax(-1)
            own = -log_p.gather(2, ids[:, 1:, None])[..., 0]
            nats += own[ids[:, 1:] != eos].sum().item()
        assert metrics[f"text/mine/{name}/bits_per_byte"] == pytest.approx(
            nats / math.log(2) / found["bytes"], rel=1e-5
        )
    assert metrics["text/mine/kl"] > 0
    assert metrics["text/mine/bits_per_byte_ratio_stderr"] > 0
    whole = judge(inputs, texts=[text | {"context": 4096}])[0]["texts"]["mine"]
    assert whole["tokens"] == found["tokens"], "a text shorter than a window is one window"


def test_texts_that_cannot_be_scored_are_refused(tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    text = {"name": "mine", "paths": [str(tmp_path / "empty.jsonl")]}
    with pytest.raises(UserError, match="the file contains no document"):
        check_text(EvalText.model_validate(text))
    with pytest.raises(ValidationError, match="texts has a name twice"):
        Evaluate.model_validate({"texts": [text, text]})


def test_a_long_text_counts_among_the_longest_rows():
    text = {"name": "mine", "paths": ["x.txt"], "context": 4096}
    for batch in (None, 8):
        assert Evaluate.model_validate({"texts": [text], "batch": batch, "context": 512}).longest == 4096


def test_errors_shrink_as_windows_grow():
    rng = np.random.default_rng(0)
    scores = rng.normal(100, 10, (4000, 6))
    sizes = rng.integers(100, 140, 4000)
    few = bits.summarize(scores[:100], sizes[:100], 32)["student"]
    many = bits.summarize(scores, sizes, 32)["student"]
    for key in few:
        assert few[key]["stderr"] / many[key]["stderr"] == pytest.approx(math.sqrt(40), rel=0.3)
    assert many["kl"]["stderr"] == pytest.approx(10 / 32 / math.sqrt(4000), rel=0.05)
    # The delta method against resampling.
    picks = rng.integers(0, 4000, (300, 4000))
    resampled = [scores[p, 5].sum() / math.log(2) / sizes[p].sum() for p in picks]
    assert many["bits_per_byte"]["stderr"] == pytest.approx(np.std(resampled), rel=0.2)


def test_one_window_has_no_error():
    assert bits.mean_of(np.array([2.0])) == {"value": 2.0, "stderr": None}


def test_a_broken_student_is_named():
    broken = {"kl": {"value": math.nan, "stderr": None}}
    with pytest.raises(UserError, match=r"'distill' has non-finite scores \(kl\)"):
        bits.check_finite("distill", broken)


def write_tasks(folder: Path) -> None:
    folder.mkdir()
    rows = [{"q": f"{a} ball and", "good": i % 2} for i, a in enumerate(["red", "blue", "green", "old", "new", "sad"])]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: rows.jsonl\ntest_split: test\n"
    (folder / "choice.yaml").write_text(
        "task: tiny_choice\n" + shared + "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: good\n"
        "doc_to_choice: ['Tim', 'park']\nmetric_list:\n  - metric: acc\n"
    )
    (folder / "write.yaml").write_text(
        "task: tiny_write\n" + shared + "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: 'Tim'\n"
        "generation_kwargs:\n  until: ['.']\n  max_gen_toks: 8\n  do_sample: false\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )


def test_offline_tasks_run_for_teacher_and_student(judge: Any, data: Any, student: Any, tmp_path: Path):
    write_tasks(tmp_path / "mine")
    asked = [{"name": name, "path": str(tmp_path / "mine")} for name in ("tiny_choice", "tiny_write")]
    inputs = {"student": student(attention_layers=(1,)), "data": data}
    sheet, metrics = judge(inputs, tasks=[*asked[:1], asked[1] | {"limit": 3}])
    for name in ("teacher", "student"):
        assert 0 <= metrics[f"{name}/tiny_choice/acc"] <= 1
        assert metrics[f"{name}/tiny_choice/acc_stderr"] > 0
        assert metrics[f"{name}/tiny_write/exact_match"] == 0
    assert sheet["tasks"]["tiny_write"]["limit"] == 3
    again, _ = judge(inputs, tasks=[*asked[:1], asked[1] | {"limit": 3}], seed=1235)
    assert again["tasks"]["tiny_choice"]["student"] == sheet["tasks"]["tiny_choice"]["student"]


def test_a_broken_task_file_is_one_line(tmp_path: Path):
    from radlads.tasks.contracts.recipe.sections import EvalTask
    from radlads.tasks.jobs.judge.lmeval import check_tasks

    write_tasks(tmp_path / "mine")
    (tmp_path / "mine" / "rows.jsonl").unlink()
    faults = check_tasks(
        [EvalTask(name="tiny_choice", path=str(tmp_path / "mine")), EvalTask(name="x", path=str(tmp_path))]
    )
    assert len(faults) == 2
    assert "cannot be built" in faults[0]
    assert "no YAML file" in faults[1]


def write_suite(folder: Path) -> Path:
    """Two benchmarks; on one the teacher is above chance, as short continuations are likelier."""
    folder.mkdir()
    copa = [
        {"query": f"Tim {n} sat, because", "choices": ["he.", "a zq zqx xqz qqz."], "gold": int(n % 4 == 0)}
        for n in range(40)
    ]
    words = [{"context": f"Tim {n} sat and", "continuation": "ran"} for n in range(5)]
    for name, rows in (("copa", copa), ("lambada_openai", words)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


ALL = """
import sys
from pathlib import Path
from radlads.tasks.jobs.common import execute, open_job
from radlads.tasks.jobs.judge import evaluate
for folder in sorted(Path(sys.argv[1]).parent.parent.glob("two-*")):
    assert execute(evaluate.main, open_job(folder / "job.json")) == "done"
"""


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(
    judge: Any, data: Any, student: Any, make_job: Any, run_ranks: Any, teacher_folder: Path, tmp_path: Path
):
    write_tasks(tmp_path / "mine")
    inputs = {"student": student(), "data": data}
    tasks = [{"name": n, "path": str(tmp_path / "mine")} for n in ("tiny_choice", "tiny_write")]
    suite = {"path": str(write_suite(tmp_path / "suite")), "tasks": ["copa", "lambada_openai"]}
    question = json.dumps({"messages": [{"role": "user", "content": "Who?"}]}) + "\n"
    (tmp_path / "chat.jsonl").write_text(3 * question)
    chat = {"paths": [str(tmp_path / "chat.jsonl")], "new_tokens": 4}
    generation = {"samples": 7, "new_tokens": 16, "temperatures": [0.7], "instructions": chat}
    one, metrics = judge(inputs, tasks=tasks, suite=suite, generation=generation)
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "suite").iterdir()}
    for name in ("copa", "lambada_openai"):
        assert one["tasks"][name]["suite"]["files"] == {f"{name}.jsonl": sums[f"{name}.jsonl"]}
    assert one["relative_score"]["tasks"] == ["copa"]
    assert one["relative_score"]["value"] == metrics["relative_score"] == metrics["relative_score/copa"]
    section = Evaluate(context=32, heldout_tokens=1024, batch=5, tasks=tasks, suite=suite, generation=generation)
    spec = EvaluateSpec(section=section, teacher=pin_teacher(str(teacher_folder)))
    jobs: list[Job] = []
    for zero_stage in (1, 3):
        resources = {"processes": 2, "zero_stage": zero_stage}
        made: Job = make_job("evaluate", spec, inputs, scratch=f"two-{zero_stage}", resources=resources)
        job = Job(spec=made.spec.model_copy(update={"output_uri": f"{made.spec.output_uri}-{zero_stage}"}))
        (job.scratch / "job.json").write_text(job.spec.model_dump_json(), encoding="utf-8")
        jobs.append(job)
    run_ranks(ALL, jobs[0], 2)
    for job in jobs:
        two = json.loads((Path(job.spec.output_uri) / "evaluate.json").read_text())
        assert two["processes"] == 2
        assert two["tasks"] == one["tasks"]
        assert two["relative_score"] == one["relative_score"]
        assert two["samples"] == one["samples"]
        assert two["generation"]["instructions"] == one["generation"]["instructions"]
        assert two["generation"]["temperatures"][0]["examples"] == one["generation"]["temperatures"][0]["examples"]
        told, same = (sheet["generation"]["temperatures"][0]["student"] for sheet in (one, two))
        for key, estimate in told.items():
            assert same[key]["value"] == pytest.approx(estimate["value"], rel=1e-5)
        for name, numbers in one["models"].items():
            for key, estimate in numbers.items():
                assert two["models"][name][key]["value"] == pytest.approx(estimate["value"], rel=1e-5)
