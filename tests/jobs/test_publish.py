"""publish: a report that can be checked, a card that does not flatter, a model that loads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from radlads.model.student.load import load_student
from radlads.tasks.contracts.events import Event
from radlads.tasks.contracts.job import InputRef
from radlads.tasks.contracts.recipe.recipe import Recipe, load_recipe, parse_recipe
from radlads.tasks.contracts.specs import (
    EvaluateSpec,
    NeedleSpec,
    PlanReport,
    PlanSpec,
    PublishSpec,
    TrainSpec,
    TransplantSpec,
)
from radlads.tasks.jobs import transplant
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.data import tokens
from radlads.tasks.jobs.judge import evaluate, needle
from radlads.tasks.jobs.plan import plan
from radlads.tasks.jobs.report import publish
from radlads.tasks.jobs.report.html_page import render_html
from radlads.tasks.jobs.report.judged.speed_picture import draw_speed
from radlads.tasks.jobs.report.report_blocks import Code, Heading, Table, Text, Verdict, render_markdown
from radlads.tasks.jobs.report.verdicts import judge
from radlads.tasks.stage_specs import tokenize_spec


@pytest.fixture
def recipe(teacher_folder: Path, tmp_path: Path, stories: list[str]) -> Recipe:
    (tmp_path / "stories.txt").write_text("\n---\n".join(stories), encoding="utf-8")
    source = {"kind": "files", "paths": [str(tmp_path / "stories.txt")], "separator": "\n---\n"}
    training = {"tokens": 2048, "context": 64, "batch": 4}
    chat = json.dumps({"messages": [{"role": "user", "content": "Who has a ball?"}]}) + "\n"
    (tmp_path / "chat.jsonl").write_text(chat * 2, encoding="utf-8")
    writing = {
        "samples": 2,
        "temperatures": [0.7],
        "new_tokens": 16,
        "instructions": {"paths": [str(tmp_path / "chat.jsonl")], "new_tokens": 2},
    }
    return parse_recipe(
        {
            "name": "tiny",
            "description": "A tiny random teacher.",
            "teacher": {"path": str(teacher_folder)},
            "student": {"attention_layers": [1]},
            "data": {"train": {"sources": [source], "heldout_fraction": 0.1}},
            "align": training,
            "distill": training,
            "evaluate": {
                "context": 32,
                "heldout_tokens": 512,
                "generation": writing,
                "speed": {"lengths": [16, 32], "new_tokens": 2},
            },
            "needle": {"lengths": [160], "depths": [0.0, 1.0], "max_new_tokens": 4},
            "publish": {"license": "mit"},
        }
    )


EVENTS = [
    Event(kind="loss_spike", step=4, first=4, action="rollback", to=2, number="loss", value=9.5, threshold=3,
          median=2, spread=0.125).model_dump(mode="json"),
    Event(kind="nonfinite", step=6, first=6, action="rollback", to=2, number="loss").model_dump(mode="json"),
    Event(kind="throughput", step=7, first=7, action="report", number="tokens_per_second", value=40, threshold=50,
          median=100).model_dump(mode="json"),
]  # fmt: skip


def train_like(job: Job) -> dict[str, Any]:
    """What a training job leaves behind, without the training."""
    shutil.copytree(job.input("student") / "model", job.output / "model")
    losses = [[step, 2.0 / step] for step in range(1, 9)]
    sheet = {"losses": losses, "heldout_losses": [[8, 0.3]], "objective": job.typed.objective, "events": EVENTS}
    sheet |= {"device": "cpu", "processes": 1}
    (job.output / "train.json").write_text(json.dumps(sheet))
    rows = [{"step": s, "loss": value, "layer_00": value, "layer_01": value / 2} for s, value in losses]
    (job.output / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    numbers = {"seconds": 12.5, "tokens": 2048, "memory_bytes": 1 << 28, "gpu_hours": 0.0}
    return numbers | ({"events": EVENTS} if job.spec.stage == "distill" else {})


@pytest.fixture
def run_all(
    make_job: Any, run_main: Any, reference: Any, recipe: Recipe
) -> Callable[..., tuple[Path, Any, dict[str, Any]]]:
    """Every stage of the recipe but real training; returns (report folder, its manifest, inputs)."""

    def run(**publish_options: Any) -> tuple[Path, Any, dict[str, InputRef]]:
        inputs: dict[str, InputRef] = {}

        def stage(name: str, main: Any, spec: Any, given: dict[str, InputRef], key: str | None = None) -> Job:
            job: Job = make_job(name, spec, given)
            run_main(main, job)
            inputs[key or name] = reference(job)
            return job

        job = stage("plan", plan.main, PlanSpec(recipe=recipe), {})
        planned = PlanReport.model_validate_json((Path(job.spec.output_uri) / "plan.json").read_text())
        teacher = planned.teacher
        assert teacher is not None
        stage(
            "tokenize",
            tokens.main,
            tokenize_spec(recipe, planned, "train"),
            {},
            "data-train",
        )
        stage("transplant", transplant.main, TransplantSpec(teacher=teacher, student=recipe.student), {})
        data = inputs["data-train"]
        for name, before in (("align", "transplant"), ("distill", "align")):
            spec = TrainSpec(objective=name, section=getattr(recipe, name), teacher=teacher)
            stage(name, train_like, spec, {"student": inputs[before], "data": data})
        given = {"student": inputs["distill"], "transplant": inputs["transplant"], "align": inputs["align"]}
        stage("evaluate", evaluate.main, EvaluateSpec(section=recipe.evaluate, teacher=teacher), given | {"data": data})
        spec = NeedleSpec(section=recipe.needle, teacher=teacher, training_length=200)
        stage("needle", needle.main, spec, {"student": inputs["distill"]})
        section = recipe.publish.model_copy(update=publish_options)
        # As the flow does: no dataset among the inputs, and the finished model once more under its own name.
        handed = {name: ref for name, ref in inputs.items() if name != "data-train"} | {"student": inputs["distill"]}
        made = make_job("publish", PublishSpec(section=section, recipe=recipe), handed)
        return Path(made.spec.output_uri), run_main(publish.main, made), inputs

    return run


def test_the_report_can_be_traced_and_stands_alone(run_all: Any, recipe: Recipe, tmp_path: Path):
    folder, manifest, inputs = run_all()
    markdown, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    made = inputs["distill"].digest[:12]
    for reference in inputs.values():
        assert reference.digest in markdown
        assert reference.digest in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert page.count("<img") == 4
    assert page.count("<h2") == len(re.findall(r'<a href="#', page)) >= 7
    judged = json.loads((Path(inputs["evaluate"].uri) / "evaluate.json").read_text())
    for text in (markdown, page):
        assert f"{judged['models']['student']['kl']['value']:.4f}" in text
        assert f"{judged['models']['align']['kl']['value']:.4f}" in text
        assert "12 s" in text
        assert "In distill the training was rolled back 2 times; see Watch." in text
    row = f"| distill | 4 | loss spike | loss | 9.5000 | 3.0000 | 2.0000 | 0.1250 | rolled back to step 2 | {made} |"
    assert row in markdown
    assert "| nonfinite | loss | not finite | – | – | – | rolled back to step 2 |" in markdown
    assert "| throughput | tokens_per_second | 40.0000 | 50.0000 | 100.0000 | – | reported |" in markdown
    nats = judged["generation"]["temperatures"][0]["student"]["nats"]["value"]
    assert "| 0.7: teacher's nats per token | " in markdown
    assert f"| {nats:.4f} ± " in markdown
    assert "| all constraints of an answer | " in markdown
    assert "| 16 tokens: reading the prompt, ms | " in markdown
    assert "Memory is measured on GPUs alone." in page
    ratio = judged["models"]["student"]["bits_per_byte_ratio"]["value"]
    assert f"| quality | bits per byte × {ratio:.4f} ± " in markdown
    assert markdown.index("| quality | ") < markdown.index("| bits per byte | ")
    assert "at 32 tokens on CPU | " in markdown
    assert "| conversion took | " in markdown
    assert "; on 1 × CPU | " in markdown
    said = json.loads((folder / "verdicts.json").read_text())
    assert said
    assert all(verdict["text"] in markdown for verdict in said)
    assert "student obeys all constraints in " in page
    assert {"losses.png", "layers.png", "speed.png", "needle.png", "recipe.yaml"} <= {p.name for p in folder.iterdir()}
    assert manifest.metrics["kl"] == judged["models"]["student"]["kl"]["value"]
    assert load_recipe(str(folder / "recipe.yaml")) == recipe


def test_a_random_student_is_not_celebrated(run_all: Any):
    folder, manifest, _ = run_all()
    markdown = (folder / "report.md").read_text()
    assert "The teacher itself finds 0 % of the needles" in markdown
    assert "No harness task was run" in markdown
    ratio = manifest.metrics["bits_per_byte_ratio"]
    assert ("predicts text worse" in markdown) == (ratio > 1.03)


def test_the_model_is_the_last_stages_with_a_card(run_all: Any, teacher_folder: Path):
    folder, _, inputs = run_all()
    model = folder / "model"
    assert (model / "model.safetensors").read_bytes() == (
        Path(inputs["distill"].uri) / "model" / "model.safetensors"
    ).read_bytes()
    card = (model / "README.md").read_text()
    _, metadata, body = card.split("---\n", 2)
    values = yaml.safe_load(metadata)
    assert values["license"] == "mit"
    assert values["pipeline_tag"] == "text-generation"
    assert "base_model" not in values
    for word in ("samples that end in a loop", "tokens written per second", "constraint obeyed"):
        assert word in body
    for word in ("trust_remote_code=True", "arXiv 2505.03005", inputs["evaluate"].digest[:12], "Limits", "```yaml"):
        assert word in body
    # The recipe is the user's own and holds their paths; the rest of the card must not.
    assert str(teacher_folder) not in body.split("## Recipe")[0]
    assert AutoTokenizer.from_pretrained(model).eos_token_id == 2


def test_large_shards_are_cut_anew(run_all: Any):
    folder, _, _ = run_all(max_shard_bytes=40_000)
    shards = list((folder / "model").glob("*.safetensors"))
    assert len(shards) > 1
    # No tensor is cut, so a shard is at most as large as the largest tensor or the limit.
    assert max(shard.stat().st_size for shard in shards) < 60_000
    assert load_student(folder / "model").config.attention_layers in ((1,), [1])
    assert (folder / "model" / "README.md").is_file()


def estimate(value: float, stderr: float = 0.001) -> dict[str, float]:
    return {"value": value, "stderr": stderr}


def evaluation(ratio: float = 1.01, tasks: dict[str, Any] | None = None, **kl: float) -> dict[str, Any]:
    models = {name: {"kl": estimate(value), "bits_per_byte_ratio": estimate(ratio)} for name, value in kl.items()}
    return {"models": {"teacher": {}} | models, "tasks": tasks or {}}


def found(mean: float, stderr: float = 0.02, not_run: tuple[int, ...] = ()) -> dict[str, Any]:
    cell = {"length": 1024, "mean": mean, "stderr": stderr}
    lengths = {"1024": cell} | {str(length): None for length in not_run}
    return {
        "mean": mean, "stderr": stderr, "not_run": list(not_run), "at_training_length": cell, "by_length": lengths
    }  # fmt: skip


def say(evaluated: Any, needles: Any = None, stage: str = "distill", **metrics: float) -> dict[str, str]:
    """Text → level."""
    return {v.text: v.level for v in judge(evaluated, needles, needle_metrics=metrics, final_stage=stage)}


@pytest.mark.parametrize(
    ("evaluated", "level", "words"),
    [
        (None, "warning", "was not evaluated"),
        (evaluation(1.02, student=0.1), "good", "2.0 % above the teacher's"),
        (evaluation(0.99, student=0.1), "good", "1.0 % below the teacher's"),
        (evaluation(1.08, student=0.1), "warning", "8.0 % above the teacher's"),
        (evaluation(1.01, transplant=3.0, align=4.0, student=0.1), "warning", "align increased the KL to the teacher"),
        (evaluation(1.01, align=0.2, student=0.3), "warning", "distill increased the KL to the teacher"),
    ],
)
def test_text_verdicts(evaluated: Any, level: str, words: str):
    said = say(evaluated)
    assert [found for text, found in said.items() if words in text] == [level], said


def test_leaving_the_teacher_in_finetune_is_a_note():
    said = say(evaluation(1.0, align=0.5, distill=0.1, student=0.2), stage="finetune")
    assert any("follows the data, not the teacher" in text and level == "note" for text, level in said.items())


def test_a_task_that_dropped_is_told():
    task = {"teacher": {"acc": estimate(0.8, 0.01)}, "student": {"acc": estimate(0.6, 0.01)}}
    said = say(evaluation(1.0, {"lambada": task}, student=0.1))
    assert any("On lambada (acc) the student is 20.0 % behind" in text for text in said)
    close = {"teacher": {"acc": estimate(0.8, 0.02)}, "student": {"acc": estimate(0.77, 0.02)}}
    assert not any("behind" in text for text in say(evaluation(1.0, {"lambada": close}, student=0.1)))


def test_needle_verdicts():
    good = say(None, {"models": {"teacher": found(1.0), "student": found(0.95)}}, needle_at_training_length_ratio=0.95)
    assert any("95 % of its teacher's needles" in text and level == "good" for text, level in good.items())
    bad = say(None, {"models": {"teacher": found(1.0), "student": found(0.2)}}, needle_at_training_length_ratio=0.2)
    assert any("retrieves too little" in text and level == "warning" for text, level in bad.items())
    blind = say(None, {"models": {"teacher": found(0.1), "student": found(0.1)}}, needle_at_training_length_ratio=1.0)
    assert any("too few to compare the retrieval" in text and level == "note" for text, level in blind.items())
    beyond = {name: found(0.4) | {"at_training_length": None} for name in ("teacher", "student")}
    said = say(None, {"models": beyond})
    assert said["No needle was asked for within the training length."] == "note"
    assert not any("itself finds" in text for text in said)
    partly = {"teacher": found(1.0), "student": found(1.0, not_run=(4096,))}
    said = say(None, {"models": partly}, needle_at_training_length_ratio=1.0)
    assert any("was not run at 4096 tokens" in text for text in said)


def test_both_renderings_escape_what_they_must(tmp_path: Path):
    blocks = [
        Heading("A & B"),
        Text("x < y and `code <b>`"),
        Verdict("warning", "<script>"),
        Table(("", "a|b"), [("one", "2|3")], "cap"),
        Code("<tag>", folded="open"),
    ]
    page = render_html("T <1>", blocks, tmp_path)
    assert "<script>" not in page
    assert "<code>code &lt;b&gt;</code>" in page
    assert '<h2 id="a-b">A &amp; B</h2>' in page
    assert "2\\|3" in render_markdown("T", blocks)


def ruler_of(**means: float) -> dict[str, Any]:
    return {"models": {name: found(mean) for name, mean in means.items()}, "tasks": ["vt"], "left_out": {}}


@pytest.mark.parametrize(
    ("needles", "ruler", "words"),
    [
        ({"teacher": 1.0, "student": 0.98}, {"teacher": 0.5, "student": 0.49}, None),
        ({"teacher": 1.0, "student": 0.9}, None, "needles 90.0 %, not 100.0 % (−10.0 ± 2.8 points; teacher)"),
        ({"teacher": 1.0, "student": 0.97}, None, "(−3.0 ± 2.8 points, within two standard errors; teacher)"),
        ({"teacher": 1.0, "student": 1.0}, {"teacher": 0.6, "student": 0.4}, "RULER 40.0 %, not 60.0 % (−20.0"),
        ({"teacher": 0.5, "student": 0.9, "distill": 1.0}, None, "after distill, so what followed it caused this"),
    ],
)
def test_recall_that_was_lost_is_said_first(needles: Any, ruler: Any, words: str | None):
    sheet = {"models": {name: found(mean) for name, mean in needles.items()}}
    if ruler:
        sheet["ruler"] = ruler_of(**ruler)
    said = say(evaluation(1.5, student=0.1), sheet, needle_at_training_length_ratio=1.0)
    first = next(iter(said))
    assert first.startswith("Recall gate: the student lost more than 2 points of recall") == (words is not None)
    if words:
        assert words in first
        assert "`kind: recall`" in first
        assert said[first] == "warning"


def test_the_gate_compares_at_lengths_that_both_ran():
    teacher, student = found(0.5), found(0.5)
    teacher["by_length"] |= {"4096": None}
    student["by_length"] |= {"4096": {"mean": 0.0, "stderr": 0.1}}
    assert not any("gate" in text for text in say(None, {"models": {"teacher": teacher, "student": student}}))


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: chromium)")
@pytest.mark.parametrize(("width", "media"), [(360, "screen"), (700, "print")])
def test_no_table_is_cut_off_on_a_phone_or_on_paper(tmp_path: Path, width: int, media: str):
    from playwright.sync_api import sync_playwright

    header = ("stage", "digest", "committed", "MLflow run", "planned / actual", "source")
    row = (
        "distill",
        f"`{'0123456789abcdef' * 4}`",
        "2026-11-28 12:00 UTC",
        f"`{'f' * 32}`",
        "12.5 min / 13.1 min",
        "a" * 12,
    )
    blocks = [Heading("Provenance"), Table(header, [row] * 3, "A caption.", words=header), Text("`" + "x" * 90 + "`")]
    page_file = tmp_path / "report.html"
    page_file.write_text(render_html("A report", blocks, tmp_path), encoding="utf-8")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.emulate_media(media=media)
        page.goto(page_file.as_uri())
        wide = "[...document.querySelectorAll('.wide, body')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
        assert page.evaluate(wide) == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.get_by_text("0123456789abcdef" * 4).first.is_visible()
        browser.close()


def test_the_picture_of_speed(tmp_path: Path):
    row = {"tokens_per_second": 20.0, "prompt_seconds": 0.5, "memory_bytes": None}
    lengths = [
        {"length": 16, "teacher": row, "student": row | {"memory_bytes": 2**30}, "not_run": {}},
        {"length": 64, "teacher": None, "student": row, "not_run": {"teacher": "it does not fit"}},
    ]
    assert draw_speed({"lengths": lengths}, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 5000
    for few in (lengths[:1], [], [one | {"teacher": None, "student": None} for one in lengths]):
        assert not draw_speed({"lengths": few}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
