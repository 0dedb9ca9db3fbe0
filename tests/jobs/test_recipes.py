"""Every shipped recipe plans, from its teacher's numbers alone, and so does its tiny twin, which is made from it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from radlads.deployments.twins import PREFIX, large_recipes, recipe_folder, render, shrink
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.recipe import Recipe, list_recipes, load_recipe
from radlads.tasks.contracts.specs import PlanReport
from radlads.tasks.jobs.plan import plan

LARGE = [name for name, _ in large_recipes()]
CPU = JobResources(device="cpu", processes=1, threads=1)


def qwen2(hidden: int, layers: int, heads: int, kv: int, intermediate: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": intermediate,
        "vocab_size": 152064,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    } | more


QWEN3 = {"model_type": "qwen3", "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960}
REKA = {"model_type": "llama", "vocab_size": 100352, "rms_norm_eps": 1e-5, "rope_theta": 8e6}
SMOLLM2 = {"model_type": "llama", "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True}
# Architecture as published, and the number of parameters that follows.
TEACHERS: dict[str, tuple[dict[str, Any], int]] = {
    "Qwen/Qwen2.5-7B-Instruct": (qwen2(3584, 28, 28, 4, 18944), 7_615_616_512),
    "Qwen/Qwen2.5-32B-Instruct": (qwen2(5120, 64, 40, 8, 27648), 32_763_876_352),
    "Qwen/Qwen2.5-72B-Instruct": (qwen2(8192, 80, 64, 8, 29568), 72_706_203_648),
    "Qwen/Qwen3-8B": (qwen2(4096, 36, 32, 8, 12288, **QWEN3), 8_190_735_360),
    "Qwen/Qwen3-14B": (qwen2(5120, 40, 40, 8, 17408, **QWEN3), 14_768_307_200),
    "SmolLM2-135M-Instruct.Q4_1.gguf": (qwen2(576, 30, 9, 3, 1536, **SMOLLM2), 134_515_008),
    "RekaAI/reka-flash-3": (qwen2(6144, 44, 64, 8, 19648, **REKA), 20_905_482_240),
    "RekaAI/reka-flash-3.1": (qwen2(6144, 44, 64, 8, 19648, **REKA, head_dim=96), 20_905_482_240),
}


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., PlanReport]:
    """planned(name, overrides, **resources): the plan of a recipe whose teacher is a config alone."""

    def make(name: str, overrides: dict[str, Any] | None = None, **resources: Any) -> PlanReport:
        recipe = load_recipe(name)
        assert recipe.teacher is not None
        config, _ = TEACHERS[recipe.teacher.path]
        (tmp_path / "config.json").write_text(json.dumps(config))
        recipe = load_recipe(name, {"teacher.path": str(tmp_path), **(overrides or {})})
        machine = {"device": "cuda", "processes": 1, "threads": 1, "gpu_memory_gib": 2000.0, **resources}
        return plan.make_plan(recipe, JobResources(**machine), sizes_only=True)

    return make


def test_the_plan_says_where_less_need_be_recomputed(planned: Callable[..., PlanReport]) -> None:
    """Only what fits: with its own passes, with smaller ones, or not at all."""
    machine = {"processes": 8, "gpu_memory_gib": 80.0}
    (found,) = planned("qwen3-8b-hybrid", **machine).advice
    assert re.fullmatch(
        r"distill.gradient_checkpointing: selective fits \(7\d GiB\) and would take 1\d% less time", found
    )
    (found,) = planned("qwen3-8b-hybrid", **machine | {"gpu_memory_gib": 70.0}).advice
    assert found.startswith("distill.gradient_checkpointing: selective with distill.micro_batch: 6 fits")
    assert planned("qwen3-8b-hybrid", **machine | {"gpu_memory_gib": 58.0}).advice == ()
    # Half of the passes is advised only where it divides the batch, and where no phase has a number of its own.
    odd = {"distill.micro_batch": 3, "distill.batch": 72}
    assert not any("micro_batch" in line for line in planned("qwen3-8b-hybrid", odd, **machine).advice)
    phases = [{"tokens": 500_000_000, "micro_batch": 24, "batch": 192}, {"tokens": 500_000_000}]
    found = planned("qwen3-8b-hybrid", {"distill.phases": phases}, **machine | {"gpu_memory_gib": 84.0}).advice
    assert found == (), "selective would keep 24 sequences"


def stages(recipe: Recipe) -> list[str]:
    sections = (*recipe.training_stages, "evaluate", "needle")
    return [stage for stage in sections if getattr(recipe, stage) is not None]


def test_every_recipe_that_converts_something_large_has_a_twin_and_a_teacher_here() -> None:
    converting = {name for name in list_recipes() if load_recipe(name).teacher is not None}
    small = {"smoke", "smoke-pure"}
    assert converting - small == {*LARGE, *(PREFIX + name for name in LARGE)}
    assert {load_recipe(name).teacher.path for name in LARGE} == TEACHERS.keys()


@pytest.mark.parametrize("name", LARGE)
def test_a_twin_is_made_from_its_original(name: str) -> None:
    raw = yaml.safe_load((recipe_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    written = (recipe_folder() / f"{PREFIX}{name}.yaml").read_text(encoding="utf-8")
    assert written == render(shrink(raw)), "run python -m radlads.deployments.twins"
    full, twin = load_recipe(name), load_recipe(PREFIX + name)
    assert stages(twin) == stages(full)
    assert twin.teacher.bits == full.teacher.bits
    same = {"attention_layers": ()}
    assert twin.student.model_copy(update=same) == full.student.model_copy(update=same)
    assert type(twin.student.attention_layers) is type(full.student.attention_layers)
    assert bool(twin.student.attention_layers) == bool(full.student.attention_layers)
    sizes = {"tokens", "context", "batch", "micro_batch", "heldout_tokens", "phases", "lora"}
    for stage in full.training_stages:
        small, large = getattr(twin, stage), getattr(full, stage)
        assert small.model_dump(exclude=sizes) == large.model_dump(exclude=sizes)
        assert len(small.parts) == len(large.parts)
        for ours, theirs in zip(small.parts, large.parts, strict=True):
            assert ours.model_dump(exclude=sizes) == theirs.model_dump(exclude=sizes)
            assert ours.context < theirs.context
        assert (getattr(small, "lora", None) is None) == (getattr(large, "lora", None) is None)


@pytest.mark.parametrize("name", LARGE)
def test_a_twin_plans(name: str) -> None:
    recipe = load_recipe(PREFIX + name)
    report = plan.make_plan(recipe, CPU)
    assert next(stage for stage in report.stages if stage in stages(recipe)) == "align"
    assert set(stages(recipe)) <= set(report.stages)
    assert report.student_parameters > report.teacher_parameters


@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_plans_from_its_teachers_numbers(name: str, planned: Callable[..., PlanReport]) -> None:
    recipe = load_recipe(name)
    report = planned(name)
    assert recipe.teacher is not None
    assert report.teacher_parameters == TEACHERS[recipe.teacher.path][1]
    assert set(stages(recipe)) <= set(report.stages)
    for stage in recipe.training_stages:
        section = getattr(recipe, stage)
        assert report.stages[stage]["steps"] == section.num_steps
        assert report.stages[stage]["tokens"] == section.seen_tokens


def test_published_sizes_follow(planned: Callable[..., PlanReport]) -> None:
    """rwkv7_variants §13: parameters that the mixers of the two Reka systems add."""
    pure = planned("prwkv7-reka-flash-3")
    assert pure.attention_layers == ()
    assert pure.student_parameters - pure.teacher_parameters == pytest.approx(0.19e9, rel=0.03)
    hybrid = planned("hrwkv7-reka-flash-3.1")
    assert hybrid.attention_layers == (8, 15, 22, 29, 36, 43)
    assert hybrid.student_parameters - hybrid.teacher_parameters == pytest.approx(0.44e9, rel=0.03)


def test_the_extension_doubles_its_context_and_costs_more_a_token(planned: Callable[..., PlanReport]) -> None:
    """The softmax layers that are chosen after align see every token before them, in the plan as well."""
    recipe = load_recipe("qwen3-8b-hybrid-128k")
    assert recipe.extend is not None
    assert [part.context for part in recipe.extend.parts] == [1 << n for n in (14, 15, 16, 17)]
    assert {part.batch * part.context for part in recipe.extend.parts} == {1 << 21}
    assert recipe.needle is not None
    assert max(recipe.needle.lengths) == recipe.extend.longest_context
    report = planned("qwen3-8b-hybrid-128k")
    phases = report.stages["extend"]["phases"]
    per_token = [phase["flops"] / phase["tokens"] for phase in phases]
    assert per_token[3] - per_token[2] == pytest.approx(3 * 9 * 2 * 65536 * 4096)
    assert not any(warning.startswith("extend.context") for warning in report.warnings)


def test_every_number_of_tokens_is_the_published_one() -> None:
    recipes = {name: load_recipe(name) for name in LARGE}
    tokens = {name: {s: getattr(one, s).tokens for s in one.training_stages} for name, one in recipes.items()}
    assert tokens["qwerky7-qwen2.5-7b"] == {"align": 10**8, "distill": 5 * 10**8, "finetune": 10**8}
    assert tokens["qwerky7-qwen2.5-72b-2a"] == {"align": 10**8, "distill": 6 * 10**8}
    assert tokens["qwen3-8b-hybrid"] == {"align": 32 * 10**7, "distill": 10**9, "finetune": 10**9}
    hybrid = load_recipe("hrwkv7-reka-flash-3.1")
    assert hybrid.align.tokens == 10**8
    contexts = [(part.context, part.seen_tokens) for part in hybrid.distill.parts]
    assert sum(seen for context, seen in contexts if context == 4096) == pytest.approx(360e6, rel=1e-3)
    assert contexts[-1] == (8192, 5400 * 4 * 8192)
    pure = load_recipe("prwkv7-reka-flash-3")
    assert [part.temperature for part in pure.distill.parts] == [1.5, 1.2, 1.0]
    assert [part.mixer_rate.start for part in pure.distill.parts] == [3e-5, 1e-5, 1e-5]


# What the recipes of 72B say would fit.
SQUEEZED: dict[str, Any] = {
    "teacher.bits": 8,
    "student.mlp_bits": 8,
    "distill.freeze": ["mlp"],
    "align.gradient_checkpointing": True,
    "align.micro_batch": 1,
    "distill.micro_batch": 1,
    "evaluate": None,
    "needle": None,
}
# Recipe, overrides, GPUs and bytes of one: where it was run, or where its remarks say that it fits.
FITS = [
    ("prwkv7-reka-flash-3", {}, 1, 192 * 1e9),
    ("hrwkv7-reka-flash-3.1", {}, 1, 192 * 1e9),
    ("qwerky7-qwen2.5-7b", {}, 8, 80 * 1e9),
    ("qwen3-8b-hybrid", {}, 8, 80 * 1e9),
    ("qwen3-8b-hybrid-128k", {}, 8, 256 * 1e9),
    ("qwerky7-qwen2.5-32b", {"offload_optimizer": True}, 8, 192 * 1e9),
    ("qwerky7-qwen2.5-72b", SQUEEZED | {"finetune.freeze": ["mlp"], "offload_optimizer": True}, 8, 192 * 1e9),
    ("qwerky7-qwen2.5-72b-2a", SQUEEZED | {"offload_optimizer": True}, 8, 192 * 1e9),
]


@pytest.mark.parametrize(("name", "overrides", "processes", "size"), FITS, ids=[case[0] for case in FITS])
def test_a_recipe_fits_where_it_was_run(
    name: str, overrides: dict[str, Any], processes: int, size: float, planned: Callable[..., PlanReport]
) -> None:
    asked = {key: value for key, value in overrides.items() if key != "offload_optimizer"}
    offload = overrides.get("offload_optimizer", False)
    gibibytes = size / 2**30
    report = planned(name, asked, processes=processes, gpu_memory_gib=gibibytes, offload_optimizer=offload)
    assert report.gpu_hours is not None
    if offload:
        with pytest.raises(UserError, match="needs about"):
            planned(name, processes=processes, gpu_memory_gib=gibibytes)


def costs() -> list[tuple[str, ...]]:
    """Rows of the table of docs/costs.md."""
    page = Path(__file__).resolve().parent.parent.parent / "docs" / "costs.md"
    rows = re.findall(r"^\| \d+M? ?\w* \| `.*$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [tuple(cell.strip() for cell in row.strip("|").split("|")) for row in rows]


@pytest.mark.parametrize("row", costs(), ids=lambda row: row[1])
def test_the_page_of_costs_is_what_the_plan_says(planned: Callable[..., PlanReport], row: tuple[str, ...]) -> None:
    _, recipe, _, tokens, machine, hours, gpu_hours, dollars = row
    found, fit = re.match(r"`([\w.-]+)`", recipe), re.fullmatch(r"(\d+) × (\d+) GB", machine)
    assert found is not None
    assert fit is not None
    name, gpus, stage = found[1], int(fit[1]), 3 if "zero_stage: 3" in recipe else 1
    resources = {"processes": gpus, "gpu_memory_gib": float(fit[2]), "zero_stage": stage, "dollars_per_gpu_hour": 2.5}
    report = planned(name, {"teacher.pypi": None}, **resources)
    assert report.gpu_hours is not None
    close = pytest.approx(report.gpu_hours, rel=0.06)
    assert float(gpu_hours) == close, report.gpu_hours
    assert float(hours) * gpus == pytest.approx(report.gpu_hours, rel=0.1)
    assert float(dollars.strip("$")) / 2.5 == pytest.approx(report.gpu_hours, rel=0.3 if gpus == 1 else 0.06)
    trained = sum(getattr(load_recipe(name), one).seen_tokens for one in load_recipe(name).training_stages)
    assert float(tokens.strip("B")) == pytest.approx(trained / 1e9, abs=0.05)
