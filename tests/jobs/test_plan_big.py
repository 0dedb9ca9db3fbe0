"""Plans from a config alone, for machines that are not here, and what they refuse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.recipe import Recipe, parse_recipe
from radlads.tasks.contracts.specs import PlanReport
from radlads.tasks.jobs.plan import checks, plan

CPU = JobResources(device="cpu", processes=1, threads=1)
REKA = {
    "model_type": "llama",
    "vocab_size": 100352,
    "hidden_size": 6144,
    "intermediate_size": 19648,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 96,
    "max_position_embeddings": 98304,
    "tie_word_embeddings": False,
}
QWEN_72B = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
FROZEN = ["mlp", "embeddings", "head"]


def gpus(count: int, gibibytes: float) -> JobResources:
    return JobResources(device="cuda", processes=count, threads=1, gpu_memory_gib=gibibytes, dollars_per_gpu_hour=2.0)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """recipe(config, **sections): of a teacher that is nothing but a config.json, on data that does not exist."""

    def make(config: dict[str, Any], *, bits: int = 16, **sections: Any) -> Recipe:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return parse_recipe(
            {
                "name": "big",
                "teacher": {"path": str(tmp_path), "bits": bits},
                "data": {"train": {"sources": [{"kind": "hub", "path": "nobody/nothing"}]}},
                "align": {"tokens": 100_000_000, "context": 512, "batch": 32, "micro_batch": 4},
                **sections,
            }
        )

    return make


def planned(asked: Recipe, resources: JobResources) -> PlanReport:
    return plan.make_plan(asked, resources, preview=True, sizes_only=True)


def distill(**changes: Any) -> dict[str, Any]:
    sizes = {"tokens": 300_000_000, "context": 4096, "batch": 32, "micro_batch": 2, "gradient_checkpointing": True}
    return sizes | changes


def test_a_config_alone_is_enough_for_sizes(recipe: Callable[..., Recipe]):
    report = planned(recipe(REKA, distill=distill()), gpus(8, 192))
    assert report.teacher_parameters == 20_905_482_240
    assert report.teacher is not None
    assert report.misfits == ()
    assert sum(report.groups.values()) == report.student_parameters
    assert report.groups["mlp"] == 44 * 3 * 6144 * 19648
    assert 0 < report.new_parameters < report.mixer_parameters
    assert report.stages["distill"]["memory_bytes_per_gpu"]["total"] < 0.95 * report.assumptions["memory_bytes"]
    assert report.gpu_hours is not None
    assert report.dollars == pytest.approx(2 * report.gpu_hours)
    assert any("only sizes are planned" in warning for warning in report.warnings)


def test_the_21b_recipe_fits_one_large_gpu_only_as_it_was_published(recipe: Callable[..., Recipe]):
    """HRWKV7-Reka-Flash-3.1 was made on one MI300X: MLPs frozen and in 8 bit, the teacher in 8 bit."""
    published = recipe(
        REKA,
        bits=8,
        student={"mlp_bits": 8, "attention_layers": [8, 15, 22, 29, 36, 43]},
        distill=distill(freeze=FROZEN, micro_batch=4),
    )
    report = planned(published, gpus(1, 192))
    assert report.misfits == ()
    memory = report.stages["distill"]["memory_bytes_per_gpu"]
    assert memory["weights"] < 10 * 1024**3  # what the teacher holds too is not counted twice
    whole = planned(recipe(REKA, distill=distill(micro_batch=4)), gpus(1, 192))
    assert len(whole.misfits) == 1
    advice = r"resources.offload_optimizer: true \(then 180 GiB and 359 GiB of host memory each\)"
    assert re.search(advice, whole.misfits[0]), whole.misfits[0]


def test_72b_is_refused_with_what_would_make_it_fit(recipe: Callable[..., Recipe]):
    asked = recipe(QWEN_72B, distill=distill())
    with pytest.raises(
        UserError, match=r"distill needs about \d+\.\d GiB on each GPU, which has 80\.0 GiB; what would"
    ):
        plan.make_plan(asked, gpus(8, 80), sizes_only=True)
    report = planned(asked, gpus(8, 80))
    assert report.teacher_parameters == 72_706_203_648
    assert [line.split()[0] for line in report.misfits] == ["align", "distill"]
    assert all(len(line) < 400 for line in report.misfits)
    assert all("resources.zero_stage: 3" in line for line in report.misfits)
    assert not any("offload" in line for line in report.misfits)  # what excludes it is not proposed with it


def test_only_a_preview_tells_instead_of_refusing(recipe: Callable[..., Recipe]):
    with pytest.raises(UserError, match="align needs about"):
        plan.make_plan(recipe(QWEN_72B), gpus(1, 24), sizes_only=True)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"distill": distill()}, r"student.mlp_bits is 8, but distill trains the MLPs, .* add mlp to distill.freeze"),
        (
            {"distill": distill(freeze=FROZEN), "finetune": distill()},
            r"student.mlp_bits is 8, but finetune trains the MLPs",
        ),
        (
            {"distill": distill(freeze=["mlp"], phases=[
                {"tokens": 200_000_000}, {"tokens": 100_000_000, "batch": 7, "micro_batch": 1}
            ])},
            r"distill.phases.1.batch \(7\) must be a multiple of the number of processes \(8\)",
        ),
    ],
)  # fmt: skip
def test_faults_of_memory_and_phases_are_one_clear_line(
    recipe: Callable[..., Recipe], sections: dict[str, Any], message: str
):
    with pytest.raises(UserError, match=message) as caught:
        planned(recipe(REKA, bits=8, student={"mlp_bits": 8}, **sections), gpus(8, 192))
    assert len(str(caught.value).splitlines()) == 1


def test_8_bit_without_its_library_is_told(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs torchao: pip install 'radlads\[quant\]'"):
        planned(recipe(REKA, bits=8), gpus(8, 192))


def test_mlps_that_are_held_twice_are_warned_about(recipe: Callable[..., Recipe]):
    asked = recipe(REKA, student={"mlp_bits": 8}, distill=distill(freeze=FROZEN))
    assert any("holds the frozen MLPs twice" in warning for warning in planned(asked, gpus(8, 192)).warnings)


def test_a_plan_that_will_run_still_needs_weights(recipe: Callable[..., Recipe]):
    with pytest.raises(UserError, match=r"has no .safetensors weights"):
        plan.make_plan(recipe(REKA), CPU)
