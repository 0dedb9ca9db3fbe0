"""`radlads plan` as a person sees it: the table, the machine that is planned for, what does not fit."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from radlads.flows.cli import app
from radlads.flows.plan_view import machine_of, plan_offline, print_plan
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.recipe import Recipe, Resources, load_recipe
from radlads.tasks.contracts.specs import PlanReport
from radlads.tasks.launchers.devices import planned_resources
from radlads.tasks.plan_table import short_count

MIXTURE = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("mixture")
    (tmp_path / "config.json").write_text(json.dumps(MIXTURE))
    stage = {"tokens": 300_000_000, "context": 4096, "batch": 32, "micro_batch": 2, "gradient_checkpointing": True}
    raw = {
        "name": "mixture",
        "description": "A mixture of experts.",
        "teacher": {"path": str(tmp_path), "bits": 8},
        "student": {"mlp_bits": 8, "attention_layers": [3, 7]},
        "data": {"train": {"sources": [{"kind": "hub", "path": "nobody/nothing"}]}},
        "align": stage,
        "distill": stage | {"freeze": ["mlp"]},
        "evaluate": {"context": 1024, "batch": 4},
        "resources": {"dollars_per_gpu_hour": 3.5},
    }
    path = tmp_path / "mixture.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture(scope="module")
def planned(recipe_file: Path) -> tuple[Recipe, PlanReport]:
    """The recipe and its plan for eight large GPUs."""
    recipe = load_recipe(str(recipe_file))
    return recipe, plan_offline(recipe, gpus=8, gpu_memory_gib=141, sizes_only=True)


def test_a_plan_reads_in_a_hundred_columns_a_line_a_stage(planned: tuple[Recipe, PlanReport]):
    screen = io.StringIO()
    print_plan(Console(file=screen, width=100, color_system=None), *planned)
    lines = screen.getvalue().splitlines()
    assert all(len(line) <= 100 for line in lines)
    text = screen.getvalue()
    assert "8 × GPU, 141.0 GiB each, as fast as an H200" in text
    assert "3.3" in text  # billions of parameters that are active a token
    for stage in ("align", "distill", "evaluate"):
        (row,) = [line for line in lines if line.startswith(f"{stage} ")]
        assert "…" not in row
    header = next(line for line in lines if line.startswith("stage"))
    assert header.split() == "stage tokens steps context batch student teacher adam rest GiB host time GPU h $".split()
    assert "in all" in text
    assert "tokenize train 10 min, transplant " in text
    assert re.search(r"speed     align \d+% of peak: estimated; the nearest", text)
    assert re.search(r"speed     distill \d+% of peak: estimated; the nearest", text)


def test_a_narrow_screen_loses_no_number(planned: tuple[Recipe, PlanReport]):
    screens = {}
    for width in (50, 100):
        screens[width] = io.StringIO()
        print_plan(Console(file=screens[width], width=width, color_system=None), *planned)
    narrow, wide = (
        [line.split() for line in table.splitlines() if line.startswith(("stage", "align", "distill"))]
        for table in (screen.getvalue().partition("GiB of each")[0] for screen in screens.values())
    )
    assert narrow == wide
    assert len(wide) == 3


def test_the_command_shows_the_table_and_then_what_does_not_fit(recipe_file: Path):
    asked = ["plan", str(recipe_file), "--gpus", "1", "--gpu-memory", "24", "--sizes-only"]
    done = CliRunner().invoke(app, asked)
    assert isinstance(done.exception, UserError)
    assert "align needs about" in str(done.exception)
    assert "distill" in done.output


@pytest.mark.parametrize(
    ("gpus", "memory", "message"),
    [
        (8, None, "the memory of each of the 8 GPUs is unknown"),
        (-1, None, "-1 GPUs cannot be planned for; give --gpus a number from 1 to"),
        (0, 80.0, "0 GPUs cannot be planned for"),
        (8, -4.0, "a GPU of -4 GiB cannot be planned for; give --gpu-memory more than 0"),
        (8, 0.0, "a GPU of 0 GiB cannot be planned for"),
    ],
)
def test_a_machine_that_makes_no_sense_is_refused(gpus: int, memory: float | None, message: str):
    with pytest.raises(UserError, match=message):
        planned_resources(Resources(), gpus, memory)


def test_this_machine_is_planned_for_unless_another_is_described():
    assert planned_resources(Resources(), None, None) is None
    told = planned_resources(Resources(processes=4, gpu_memory_gib=80, offload_optimizer=True), None, None)
    assert told is not None
    assert (told.device, told.processes, told.gpu_memory_gib, told.offload_optimizer) == ("cuda", 4, 80, True)


def test_the_machines_that_a_recipe_names_are_planned_for(tmp_path: Path):
    """Slurm need not be here, nor a host answer: what there is says the recipe."""
    (tmp_path / "hostfile").write_text("one slots=8\ntwo slots=4\n")
    slurm = Resources(launcher="slurm", slurm={"nodes": 2, "gpus_per_node": 8}, gpu_memory_gib=80)
    hosts = Resources(launcher="hosts", hosts=str(tmp_path / "hostfile"), gpu_memory_gib=80)
    for resources, gpus in ((slurm, 16), (hosts, 12)):
        told = machine_of(resources, None, None)
        assert (told.device, told.processes, told.gpu_memory_gib) == ("cuda", gpus, 80)
        assert machine_of(resources, None, 141.0).gpu_memory_gib == 141
        assert machine_of(resources, 4, None).processes == 4


def test_counts_are_short():
    numbers = (None, 7, 9_999, 12_345, 999_900, 100_000_000, 1_500_000_000, 20_905_482_240)
    assert [short_count(n) for n in numbers] == ["", "7", "9,999", "12.3k", "1,000k", "100M", "1.5B", "20.9B"]
