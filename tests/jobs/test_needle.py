"""needle: the grid, the match, what was not run, and the picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.sections import Needle, Student
from radlads.tasks.contracts.specs import NeedleSpec, TransplantSpec
from radlads.tasks.jobs import transplant
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.judge import generation, needle
from radlads.tasks.jobs.judge.heatmap import draw_heatmap
from radlads.tasks.jobs.judge.needle_grid import flatten, make_cells, summarize
from radlads.tasks.jobs.sources import load_tokenizer, pin_teacher

SECTION = Needle(lengths=(256, 160), depths=(0.0, 0.5, 1.0), trials=5, batch=4, max_new_tokens=8)


@pytest.fixture
def judge(make_job: Any, run_main: Any, reference: Any, teacher_folder: Path) -> Callable[..., Any]:
    """judge({name: student options}, section) → (product folder, metrics)."""

    def run(students: dict[str, dict[str, Any]], section: Needle = SECTION) -> Any:
        inputs = {}
        for name, options in students.items():
            spec = TransplantSpec(teacher=pin_teacher(str(teacher_folder)), student=Student(**options))
            job: Job = make_job("transplant", spec)
            run_main(transplant.main, job)
            inputs[name] = reference(job)
        spec = NeedleSpec(section=section, teacher=pin_teacher(str(teacher_folder)), training_length=200)
        job = make_job("needle", spec, inputs)
        manifest = run_main(needle.main, job)
        return Path(job.spec.output_uri), manifest.metrics

    return run


def placed(*cells: tuple[int, float], trials: int = 5) -> list[Any]:
    return [SimpleNamespace(length=length, depth=depth) for length, depth in cells for _ in range(trials)]


def test_the_grid_is_complete_and_seeded(teacher_folder: Path):
    tokenizer = load_tokenizer(str(teacher_folder))
    trials = needle.make_trials(SECTION, tokenizer)
    assert len(trials) == 2 * 3 * 5
    assert trials == needle.make_trials(SECTION, tokenizer)
    assert len({trial.case.prompt for trial in trials}) == len(trials)
    for trial in trials:
        assert trial.length - 40 < len(trial.case.prompt_ids) <= trial.length
        assert trial.case.answer in trial.case.prompt
        place = trial.case.prompt.index(trial.case.answer) / len(trial.case.prompt)
        assert abs(place - trial.depth) < 0.45


def test_a_chat_template_goes_around_the_prompt(teacher_folder: Path):
    tokenizer = load_tokenizer(str(teacher_folder))
    trials = needle.make_trials(SECTION.model_copy(update={"chat_template": True}), tokenizer)
    prompt = trials[0].case.prompt
    assert prompt.startswith("<|user|>")
    assert prompt.endswith("<|assistant|>")
    assert tokenizer.decode(trials[0].case.prompt_ids) == prompt


@pytest.mark.parametrize("habit", [False, True])
@pytest.mark.parametrize("chat", ["no", "without BOS", "with BOS"])
@pytest.mark.parametrize("add_bos", [None, False, True])
def test_a_prompt_has_one_bos_where_the_tokenizer_or_the_recipe_wants_it(
    tokenizer_folder: Path, habit: bool, chat: str, add_bos: bool | None
):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    if habit:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.bos_token_id)]
        )
    if chat == "with BOS":
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    section = SECTION.model_copy(update={"chat_template": chat != "no", "add_bos": add_bos, "lengths": (160,)})
    trials = needle.make_trials(section, tokenizer)
    wanted = chat == "with BOS" or (add_bos if add_bos is not None else habit and chat == "no")
    for trial in trials:
        ids = trial.case.prompt_ids
        assert ids.count(tokenizer.bos_token_id) == wanted
        assert (ids[0] == tokenizer.bos_token_id) is wanted
        assert chat != "no" or len(ids) <= 160


def test_prompts_too_short_are_refused(teacher_folder: Path):
    with pytest.raises(UserError, match="is too short"):
        needle.make_trials(Needle(lengths=(8,)), load_tokenizer(str(teacher_folder)))


@pytest.mark.parametrize(
    ("text", "hit"),
    [
        (" 48213. The", True),
        ("It is 48213", True),
        (" 482135", False),
        (" 148213", False),
        (" 4821 3", False),
        ("", False),
    ],
)
def test_a_hit_is_the_whole_answer(text: str, hit: bool):
    assert needle.is_hit(text, "48213") == hit


def test_lengths_that_were_not_run_count_nowhere():
    trials = placed((256, 0.0), (256, 1.0), (512, 0.0), (512, 1.0))
    hits: dict[str, list[bool | None]] = {
        "teacher": [True] * 20,
        "student": [True] * 5 + [False] * 5 + [True] * 5 + [None] * 5,
    }
    models = summarize(trials, hits, 512)
    assert models["teacher"]["mean"] == 1
    assert models["student"]["mean"] == 0.5
    assert models["student"]["trials"] == 10
    assert models["student"]["not_run"] == [512]
    assert models["student"]["by_length"]["512"] is None
    assert models["student"]["at_training_length"]["length"] == 256
    assert models["teacher"]["at_training_length"]["length"] == 512
    cells = make_cells(trials, hits)
    assert [cell["student"] and cell["student"]["mean"] for cell in cells] == [1, 0, 1, None]
    flat = flatten({"models": models, "training_length": 512})
    assert "student/needle/512" not in flat
    assert flat["needle_ratio"] == 0.5
    assert flat["teacher/needle_stderr"] > 0


def test_nothing_run_is_no_zero():
    models = summarize(placed((256, 0.0)), {"teacher": [None] * 5}, 512)
    assert models["teacher"]["mean"] is None
    assert flatten({"models": models, "training_length": 512}) == {}


def test_batched_generation_is_that_of_each_prompt_alone(teacher_folder: Path):
    tokenizer = load_tokenizer(str(teacher_folder))
    model = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    prompts = [list(range(10, 10 + n)) for n in (7, 12, 3)]
    alone = [generation.generate(model, tokenizer, [prompt], 6)[0] for prompt in prompts]
    assert generation.generate(model, tokenizer, prompts, 6) == alone


def test_out_of_memory_halves_the_batch_and_then_gives_up(teacher_folder: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = load_tokenizer(str(teacher_folder))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    sizes: list[int] = []

    class Small:
        device = torch.device("cpu")

        def generate(self, ids: torch.Tensor, **_: Any) -> torch.Tensor:
            sizes.append(len(ids))
            if len(ids) > 1 or ids.shape[1] > 8:
                raise torch.OutOfMemoryError("full")
            return torch.cat([ids, ids[:, :1]], dim=1)

    texts = generation.generate(Small(), tokenizer, [[40, 41], [42] * 9], 1)  # type: ignore[arg-type]
    assert texts == [tokenizer.decode([40]), None]
    assert sizes == [2, 1, 1]


def test_the_job_judges_every_model_on_the_same_prompts(judge: Any):
    identity = {"attention_layers": (0, 1), "attention_rope": True}
    folder, metrics = judge({"student": identity, "distill": {}})
    sheet = json.loads((folder / "needle.json").read_text())
    assert list(sheet["models"]) == ["teacher", "student", "distill"]
    assert len(sheet["cells"]) == 6
    assert all(cell[name]["trials"] == 5 for cell in sheet["cells"] for name in sheet["models"])
    assert all(example["student"] == example["teacher"] for example in sheet["examples"])
    assert sheet["models"]["student"]["at_training_length"]["length"] == 160
    assert metrics["student/needle"] == metrics["teacher/needle"]
    assert set(sheet["seconds"]) == set(sheet["models"])
    picture = matplotlib.image.imread(folder / "needle.png")
    assert picture.shape[1] > picture.shape[0] > 100


def test_a_model_that_finds_everything_is_all_green(judge: Any, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch):
    trials = needle.make_trials(SECTION, load_tokenizer(str(teacher_folder)))
    answers = {tuple(trial.case.prompt_ids): f" {trial.case.answer}." for trial in trials}

    def oracle(_model: Any, _tokenizer: Any, prompts: Sequence[list[int]], *_: Any) -> list[str]:
        return [answers[tuple(prompt)] for prompt in prompts]

    monkeypatch.setattr(generation, "generate", oracle)
    _, metrics = judge({"student": {}})
    assert metrics["student/needle"] == metrics["needle_ratio"] == metrics["needle_at_training_length_ratio"] == 1


def test_the_picture_shows_what_was_found(tmp_path: Path):
    trials = placed((256, 0.0), (512, 0.0), (1024, 0.0))
    hits: dict[str, list[bool | None]] = {"teacher": [True] * 15, "student": [True] * 5 + [False] * 5 + [None] * 5}
    sheet = {
        "lengths": [256, 512, 1024],
        "depths": [0.0],
        "training_length": 512,
        "models": summarize(trials, hits, 512),
        "cells": make_cells(trials, hits),
    }
    draw_heatmap(sheet, tmp_path / "n.png")
    picture = matplotlib.image.imread(tmp_path / "n.png")[..., :3].reshape(-1, 3)
    for colour in ((0xFE, 0xE8, 0x38), (0x00, 0x22, 0x4E), (0xD9, 0xD9, 0xD9)):
        near = abs(picture - [channel / 255 for channel in colour]).max(axis=1) < 0.02
        assert near.sum() > 500, colour
