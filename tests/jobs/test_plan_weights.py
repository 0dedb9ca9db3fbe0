"""plan and transplant of teachers whose files are damaged: refused from their headers, before anything is made."""

# ruff: noqa: E501 - tables, a mistake a line

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from radlads.model.teacher.refusals import size_fault
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.recipe import parse_recipe
from radlads.tasks.contracts.recipe.sections import Student
from radlads.tasks.contracts.specs import PlanReport, TransplantSpec
from radlads.tasks.jobs import transplant
from radlads.tasks.jobs.plan import plan
from radlads.tasks.jobs.sources import pin_teacher

# One family is enough here: tests/model/test_teacher_weights.py has them all.
pytestmark = pytest.mark.parametrize("teacher_folder", ["qwen3"], indirect=True)
CPU = JobResources(device="cpu", processes=1, threads=1)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(teacher_folder: Path, tmp_path: Path) -> Path:
    """A copy of a teacher, to be damaged."""
    return Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))


@pytest.fixture
def make_plan(folder: Path, tmp_path: Path, stories: list[str]) -> Callable[[], PlanReport]:
    (tmp_path / "stories.txt").write_text("\n---\n".join(stories))
    training = {"tokens": 4096, "context": 64, "batch": 4, "micro_batch": 2}
    source = {"kind": "files", "paths": [str(tmp_path / "*.txt")], "separator": "\n---\n"}
    recipe = parse_recipe(
        {
            "name": "tiny",
            "teacher": {"path": str(folder)},
            "student": {"attention_layers": [1]},
            "data": {"train": {"sources": [source]}},
            "align": training,
        }
    )
    return lambda: plan.make_plan(recipe, CPU)


def cut(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()} | tensors
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, folder / WEIGHTS)


def second_set(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "model-00001-of-00001.safetensors")
    placed = dict.fromkeys(load_file(folder / WEIGHTS), "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": placed}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "is no whole safetensors file: .*does not fit in it: .*download it again"),
        (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 100), "its header claims 18446744073709551615 bytes"),
        (lambda f: (f / WEIGHTS).write_bytes(b""), "is no whole safetensors file"),
        (lambda f: (f / WEIGHTS).rename(f / "model.fp16.safetensors"), "it has only model.fp16.safetensors"),
        (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "pickled .bin files are not supported"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "a PEFT adapter .* beside whole weights"),
        (second_set, "holds two sets of weights"),
        (lambda f: change(f, **{Q: None}), f"lacks {Q}, which its config asks for"),
        (lambda f: change(f, **{Q: torch.ones(3, 3)}), r"q_proj.weight is \(3, 3\) in the checkpoint and"),
        (lambda f: change(f, **{Q: torch.ones(32, 32).char()}), "q_proj.weight is kept as I8: .*quantised"),
        (lambda f: change(f, extra=torch.ones(1)), "has extra, without a place"),
    ],
)
def test_damaged_weights_are_refused_by_the_plan(make_plan: Any, folder: Path, damage: Any, words: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=f"^teacher: .*{words}") as caught:
        make_plan()
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "changes", [{"hidden_act": "nonsense"}, {"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}}]
)
def test_a_config_that_makes_no_model_is_refused_in_one_line(
    make_plan: Any, folder: Path, changes: dict[str, Any]
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=r"^teacher: (transformers cannot build|cannot read the config).*nonsense.*$"):
        make_plan()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_parameters.rope_theta is 0"),
    ],
)
def test_numbers_that_give_no_numbers_are_refused(
    make_plan: Any, folder: Path, changes: dict[str, Any], words: str
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=f"^teacher: {words} in its config; a number above 0 is needed$"):
        make_plan()


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config", {"rope_parameters": YARN | {"factor": -4.0}}, "rope_parameters.factor is -4.0 in its config; a number of at least 1"),
        ("config", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor is 0.5 in its config"),
        ("config", {"eos_token_id": 99999}, r"eos_token_id is 99999 in its config, but its vocabulary has the ids 0 to \d+"),
        ("config", {"eos_token_id": [1, 99999]}, "eos_token_id is 99999"),
        ("config", {"pad_token_id": 99999}, "pad_token_id is 99999"),
        ("generation_config", {"eos_token_id": 99999}, "eos_token_id is 99999 in its generation_config"),
    ],
)  # fmt: skip
def test_settings_that_no_model_can_have_are_one_line(
    make_plan: Any, folder: Path, file: str, changes: dict[str, Any], words: str
) -> None:
    path = folder / f"{file}.json"
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))
    with pytest.raises(UserError, match=f"^teacher: {words}") as caught:
        make_plan()
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"factor": 0}, "factor is 0"),
        ({"factor": "4"}, "factor is '4'"),
        ({"factor": True}, "factor is True"),
        ({"attention_factor": 0.0}, "attention_factor is 0.0 in its config; a number above 0"),
        ({"beta_slow": -1}, "beta_slow is -1"),
        ({"beta_fast": 1, "beta_slow": 32}, "beta_fast is 1 in its config; a number of at least beta_slow (32)"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings is 0"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5 in its config; a number above 0 and at most 1"),
        ({"low_freq_factor": 4.0, "high_freq_factor": 4.0}, "high_freq_factor is 4.0 in its config; a number above low_freq_factor (4.0)"),
        ({"short_factor": [1.0, 0.0]}, "short_factor has 0.0 in its config; a list of numbers above 0"),
        ({"long_factor": 3}, "long_factor is 3 in its config; a list of numbers above 0"),
        ({"factor": None, "beta_fast": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["", "sliding_attention."])
def test_rotary_settings_of_all_layers_and_of_each_kind(
    teacher_folder: Path, kind: str, changes: dict[str, Any], words: str | None
) -> None:
    part = YARN | changes
    fault = size_fault({"rope_parameters": {kind[:-1]: part} if kind else part})
    assert fault is None if words is None else fault is not None and fault.startswith(f"rope_parameters.{kind}{words}")


def test_weights_that_are_rounded_are_warned_about(make_plan: Any, folder: Path) -> None:
    assert not any("rounded" in line for line in make_plan().warnings)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (line,) = [line for line in make_plan().warnings if "rounded" in line]
    assert line.startswith(
        f"{len(load_file(folder / WEIGHTS))} of the teacher's tensors are kept as F32 and are rounded"
    )


def test_values_that_are_not_finite_end_the_transplant_with_their_name(
    make_plan: Any, make_job: Any, run_main: Any, folder: Path
) -> None:
    bad = load_file(folder / WEIGHTS)[Q]
    bad[1, 2:4] = torch.nan
    change(folder, **{Q: bad})
    assert make_plan().num_layers == 2
    job = make_job("transplant", TransplantSpec(teacher=pin_teacher(str(folder)), student=Student()))
    with pytest.raises(UserError, match=f"^teacher tensor {Q} has 2 values that are not finite; the file is damaged"):
        transplant.main(job)
