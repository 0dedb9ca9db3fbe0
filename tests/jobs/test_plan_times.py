"""The times of a plan: near what was measured, and everything counted that a run spends time on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.recipe import Align, Distill, Finetune, Recipe, parse_recipe
from radlads.tasks.contracts.recipe.sections import EvalTask
from radlads.tasks.jobs.plan.cost import judging_cost, light_costs, training_cost
from radlads.tasks.jobs.plan.memory import NetworkSizes
from radlads.tasks.jobs.plan.sizes import count_networks
from radlads.tasks.jobs.plan.timing.harness import task_size, task_sizes
from radlads.tasks.jobs.plan.timing.judged_memory import judging_budget
from radlads.tasks.jobs.plan.timing.measured import CPU, TABLE, SpeedRow, measured_rows, read_rows, record_row
from radlads.tasks.jobs.plan.timing.passes import Device, judging_flops, judging_seconds
from radlads.tasks.jobs.plan.timing.speed import distance, expected_speed
from radlads.tasks.jobs.plan.timing.step_time import gpu_step_seconds, work_of
from radlads.tasks.jobs.train.gpu_kinds import GPU_KINDS

ROWS = measured_rows()
SIZES = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
STEPS = {"tokens": 100 * 4 * 512, "context": 512, "batch": 4}


def gpus(count: int = 1, **changes: Any) -> JobResources:
    return JobResources(device="cuda", processes=count, threads=8, gpu_memory_gib=80.0, **changes)


def recipe_of(**sections: Any) -> Recipe:
    files = {"sources": [{"kind": "files", "paths": ["a.txt"]}]}
    raw = {"name": "tiny", "teacher": {"path": "/teacher"}, "data": {"train": files}, "align": STEPS}
    return parse_recipe(raw | sections)


SIMILAR = 1.1
"""Distance up to which the other rows should foretell one: the same kind of step, up to eight times the size."""


@pytest.fixture(scope="module")
def networks() -> NetworkSizes:
    return count_networks(recipe_of(), AutoConfig.for_model("qwen3", **SIZES))


def of_h100(shape: str) -> SpeedRow:
    return next(row for row in ROWS if row.kind == "H100" and row.shape.startswith(shape))


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_plan_expects_what_was_measured_and_nearly_so_without_that_row(row: SpeedRow) -> None:
    told = expected_speed(row.work, row.kind)
    assert told.step_seconds == pytest.approx(row.step_seconds, rel=0.15)
    assert told.source == f"measured on {row}"
    others = [one for one in ROWS if one is not row]
    if any(one.kind == row.kind and distance(one.work, row.work) < SIMILAR for one in others):
        assert expected_speed(row.work, row.kind, others).step_seconds == pytest.approx(row.step_seconds, rel=0.25)


def test_every_row_says_where_it_comes_from(project_root: Path) -> None:
    for row in ROWS:
        page = (project_root / row.file).read_text(encoding="utf-8")
        assert f"{row.tokens_per_second:,.0f}" in page, row
        assert row.date in page


def test_the_memory_and_the_work_of_a_measured_case_are_as_the_plan_counts_them(
    monkeypatch: pytest.MonkeyPatch, project_root: Path
) -> None:
    monkeypatch.syspath_prepend(str(project_root / "benchmarks"))
    from training_bench.recording import case_memory, case_networks, recorded_case

    cases = [(row, recorded_case(row)) for row in ROWS if row.shape.startswith("qwen2.5-7b")]
    assert len(cases) > 6
    known: dict[str, NetworkSizes] = {}
    for row, case in cases:
        sizes = known.get(row.shape) or known.setdefault(row.shape, case_networks(case, liger=True))
        assert work_of(case.stage, case.section(), sizes, case.resources(threads=1)) == row.work
        memory = case_memory(case, sizes)
        assert row.peak_gib is not None
        assert (memory["total"] - memory["overhead"]) / 2**30 == pytest.approx(row.peak_gib, rel=0.10)


def test_what_was_not_measured_is_told_as_an_estimate_or_an_assumption() -> None:
    work = of_h100("qwen2.5-7b").work
    other = expected_speed(work, "A100")
    assert other.source.startswith("estimated; the nearest measurement is of H100, qwen2.5-7b")
    known = expected_speed(work, "H100").step_seconds
    assert other.step_seconds == pytest.approx(989 / 312 * known, rel=0.2)  # a third of the peak
    assert expected_speed(work, "B200").step_seconds < 0.6 * known
    assert expected_speed(work, None).source.startswith("assumed: 15% of 100 TFLOP/s, a GPU of unknown kind")
    assert expected_speed(work, "H100", []).source.startswith("computed")
    far = work.model_copy(update={"context": 16384, "devices": 4, "recomputed": work.flops / 4, "passes": 2})
    assert expected_speed(far, "H100").source.startswith("estimated")


def test_rows_that_are_shared_were_not_measured_by_those_that_are_not(networks: NetworkSizes) -> None:
    """Two rows by two GPUs are as many tokens and passes as a row by each."""
    one, two = (
        work_of("distill", Distill(**{**STEPS, "micro_batch": n, "sequence_parallel": n}), networks, gpus(2))
        for n in (1, 2)
    )
    assert (one.tokens, one.passes) == (two.tokens, two.passes)
    row = of_h100("qwen2.5-7b").model_copy(update={"work": one})
    assert expected_speed(one, "H100", [row]).source.startswith("measured")
    assert expected_speed(two, "H100", [row]).source.startswith("estimated")


def test_time_follows_what_a_step_does() -> None:
    work = of_h100("qwen2.5-7b").work

    def seconds(**changes: Any) -> float:
        return expected_speed(work.model_copy(update=changes), "H100").step_seconds

    assert 1.1 < seconds(recomputed=work.flops / 4) / seconds() < 1.3
    assert 1.6 < seconds(passes=2) / seconds() < 1.95  # one optimizer for two passes
    assert seconds(offload=True) > 5 * seconds()
    assert 0.9 * seconds() < seconds(devices=8) < 1.2 * seconds()
    small = of_h100("smollm2").work.model_copy(update={"tokens": 512})
    bound = expected_speed(small, "H100").step_seconds  # by launches: fewer tokens take as long
    assert bound == pytest.approx(of_h100("smollm2").step_seconds, rel=0.15)


def test_a_stage_counts_what_it_does_besides_training(networks: NetworkSizes) -> None:
    section = Distill(**STEPS)

    def parts(section: Any) -> dict[str, float]:
        cost = training_cost("distill", section, networks, "H100", gpus(2))
        assert cost["seconds"] == pytest.approx(sum(cost["seconds_by"].values()))
        assert cost["gpu_hours"] == pytest.approx(2 * cost["seconds"] / 3600)
        return cost["seconds_by"]

    plain = parts(section)
    assert plain["start"] > 10
    assert plain["checkpoints"] == 0  # a hundred steps, one in five hundred
    assert plain["export"] == pytest.approx(2 * networks.student_parameters / 0.4e9)
    often = parts(section.model_copy(update={"heldout_every": 10, "checkpoint_every": 10}))
    assert often["heldout"] == pytest.approx(
        11 * plain["heldout"]
    )  # before the first step, nine along the way, at the end
    assert often["checkpoints"] > 0
    phases = Distill(**STEPS, phases=[{"tokens": 50 * 2048}, {"tokens": 50 * 2048}])
    both = training_cost("distill", phases, networks, "H100", gpus(2))
    assert sum(part["seconds"] for part in both["phases"]) == pytest.approx(both["seconds_by"]["train"])


def test_a_divergence_with_logits_in_memory_takes_longer(networks: NetworkSizes) -> None:
    """Reverse KL and JSD have no products that drop the logits; by what the traffic takes at SmolLM2's sizes."""
    sizes = replace(networks, vocab=49_152)
    times = {}
    for divergence in ("forward", "reverse", "jsd"):
        section = Distill(data="train", divergence=divergence, **STEPS | {"batch": 96, "micro_batch": 96})
        work = work_of("distill", section, sizes, gpus(cuda_graphs="on"))
        times[divergence] = gpu_step_seconds(work, GPU_KINDS["H100"])
        phased = Distill(
            data="train", **STEPS, phases=({"tokens": 50 * 4 * 512, "divergence": divergence}, {"tokens": 50 * 4 * 512})
        )
        assert work_of("distill", phased.parts[0], sizes, gpus()).logit_bytes == work.logit_bytes
    traffic = 96 * 512 * 49_152 / GPU_KINDS["H100"].bandwidth
    assert times["reverse"] - times["forward"] == pytest.approx(23 * traffic)
    assert times["jsd"] - times["forward"] == pytest.approx(39 * traffic)
    assert all(row.work.logit_bytes == 0 for row in ROWS)


def test_texts_are_counted_by_their_files(networks: NetworkSizes, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 80_000)
    (tmp_path / "long.txt.gz").write_bytes(b"x" * 100_000)

    def cost(*names: str) -> tuple[float, float]:
        texts = [{"name": "one", "paths": [str(tmp_path / name) for name in names], "context": 256}] if names else []
        recipe = recipe_of(evaluate={"data": "train", "heldout_tokens": 1024, "context": 256, "texts": texts})
        budget = judging_budget(recipe.evaluate, networks, gpus(), 80e9)
        device = Device("H100", 1, 8)
        return judging_seconds(recipe.evaluate, networks, recipe, device, budget), judging_flops(
            recipe.evaluate, networks, recipe
        )

    none, text, both = cost(), cost("long.txt"), cost("long.txt", "long.txt.gz")
    assert cost("gone.txt") == none
    of = networks.multiplied
    assert text[1] - none[1] == pytest.approx(100_000 * (of.teacher_flops(256) + of.forward_flops(256)))
    for kind in (0, 1):
        assert (both[kind] - none[kind]) / (text[kind] - none[kind]) == pytest.approx(1.75)


def test_judging_counts_the_items_of_the_suites_files(networks: NetworkSizes, tmp_path: Path) -> None:
    (tmp_path / "openbook_qa.jsonl").write_text('{"a": 1}\n' * 7)
    suite = {"path": str(tmp_path), "tasks": ["openbookqa", "piqa"], "limit": 5}
    section = recipe_of(evaluate={"context": 512, "suite": suite}).evaluate
    assert section is not None
    assert [size.items for size in task_sizes(section)] == [5, 5]
    whole = recipe_of(evaluate={"context": 512, "suite": suite | {"limit": None}}).evaluate
    assert whole is not None
    assert [size.items for size in task_sizes(whole)] == [7, 1838]


def test_judging_counts_harness_tasks_and_other_stages_count_too(networks: NetworkSizes) -> None:
    def judged_seconds(recipe: Recipe, **changes: Any) -> float:
        section, resources = recipe.evaluate or recipe.needle, gpus(**changes)
        assert section is not None
        budget = judging_budget(section, networks, resources, 80 * 2**30)
        told: float = judging_cost(section, networks, recipe, "H100", resources, budget)["seconds"]
        return told

    tasks = {"tasks": [{"name": "mmlu", "num_fewshot": 5}], "context": 512}
    recipes = [recipe_of(evaluate={"context": 512}), recipe_of(evaluate=tasks), recipe_of(needle={})]
    bare, tested, needle = (judged_seconds(one) for one in recipes)
    assert tested > 2 * bare
    assert needle > 30
    assert task_size(EvalTask(name="piqa", limit=10)).items == 10
    assert task_size(EvalTask(name="mmlu", limit=10)).items == 570
    assert task_size(EvalTask(name="gsm8k")) == task_size(EvalTask(name="gsm8k", num_fewshot=5))
    suite = recipe_of(evaluate={"context": 512, "suite": {"path": "x", "tasks": ["piqa", "gsm8k"]}})
    listed = recipe_of(evaluate={"context": 512, "tasks": [{"name": "piqa"}, {"name": "gsm8k"}]})
    same = [judged_seconds(one) for one in (suite, listed)]
    assert same[0] == same[1] > bare
    assert task_size(EvalTask(name="mmlu", num_fewshot=5)).tokens == 6 * task_size(EvalTask(name="mmlu")).tokens
    asked = {"generation": {"instructions": {"paths": ["x"]}}}, {"generation": {}}, {"speed": {"lengths": [65536]}}
    told = [recipe_of(evaluate={"context": 512} | one) for one in asked]
    taught, written, timed = (judged_seconds(one) for one in told)
    # 128 samples at once, of two models at two temperatures: 4 × 256 steps of 4 layers; 200 questions likewise.
    assert written - bare == pytest.approx(4 * 256 * 4 * 1.0e-3, rel=0.1)
    assert taught - written == pytest.approx(2 * 256 * 4 * 1.0e-3, rel=0.1)
    eight = {"batch": 8, "context": 512}
    plain, by_eight = (judged_seconds(recipe_of(evaluate=eight | one)) for one in ({}, asked[1]))
    assert by_eight - plain == pytest.approx(16 * 4 * 256 * 4 * 1.0e-3, rel=0.1)
    assert timed > bare + 4 * 2 * 64 * 4 * 1.0e-3
    ruler = recipe_of(needle={"haystack": ["x"], "ruler": {}})
    # Answers of 16, 30, 120 and 50 tokens at three lengths; of 128 to 160 prompts of 1,024 tokens at once, and to those
    # of 2,048 and 4,096 in two and in three batches. Two models of 4 layers.
    steps = 2 * (3 * (16 + 30 + 120 + 50) + 128 * (1 + 2 + 3))
    saved = judged_seconds(ruler) - judged_seconds(ruler, cuda_graphs="on")
    assert saved == pytest.approx(steps * 4 * (1.0e-3 - 0.25e-3), rel=0.1)
    before, after = light_costs(recipes[0], networks, {"train": 1e9}, "H100", gpus())
    assert list(before) == ["tokenize train", "transplant"]
    assert list(after) == ["publish"]
    assert before["tokenize train"]["seconds"] > 1000
    sample = {"sources": [{"kind": "sample", "tokens": 1_000_000}]}
    sampled, _ = light_costs(recipe_of(data={"train": sample}), networks, {"train": 1e6}, "H100", gpus())
    assert sampled["tokenize train"]["seconds"] > 1_000_000 / 64 * 4 * 1.0e-3


def test_a_cpu_is_told_no_absurd_number(networks: NetworkSizes) -> None:
    cpu = JobResources(device="cpu", processes=1, threads=2)
    short = training_cost("align", Align(**STEPS), networks, CPU, cpu)
    assert short["seconds"] < 3600
    assert short["gpu_hours"] is short["mfu"] is None
    endless = Finetune(tokens=10**11, context=512, batch=4)
    assert training_cost("finetune", endless, networks, CPU, cpu)["seconds"] is None


def test_a_row_replaces_the_earlier_one_of_the_same_case(tmp_path: Path) -> None:
    path = tmp_path / "speeds.json"
    row = ROWS[0].model_copy(update={"tokens_per_second": 1.0})
    record_row(row, path)
    assert len(read_rows(path)) == len(ROWS)
    record_row(row.model_copy(update={"shape": "another"}), path)
    assert [one.tokens_per_second for one in read_rows(path)[-2:]] == [1.0, 1.0]
    assert len(read_rows(path)) == len(read_rows(TABLE)) + 1


def test_rows_are_made_of_what_the_benchmark_measured(monkeypatch: pytest.MonkeyPatch, project_root: Path) -> None:
    monkeypatch.syspath_prepend(str(project_root / "benchmarks"))
    from training_bench.case import Case
    from training_bench.recording import recorded_case, speed_row
    from training_bench.report import Row
    from training_bench.shapes import CaseFlops

    case = Case("tiny", "distill", micro_batch=2, batch=8, gpus=2, gradient_checkpointing=True, freeze=("mlp",))
    rank = {"seconds": 0.5, "peak_bytes": 3 << 29, "marks": {"first step begins": 12.3}, "save_seconds": 0.25}
    made = speed_row(
        Row(case, "product", CaseFlops(1.0, 1.0), [rank, rank | {"seconds": 1.0}]),
        gpu="NVIDIA H200", command="python", file=project_root / "benchmarks" / "results" / "training_h200.md",
    )  # fmt: skip
    assert (made.kind, made.shape, made.file) == ("H200", "tiny", "benchmarks/results/training_h200.md")
    assert (made.tokens_per_second, made.peak_gib, made.startup_seconds, made.stall_seconds) == (2048, 1.5, 12.3, 0.25)
    assert (made.work.tokens, made.work.passes, made.work.devices) == (1024, 2, 2)
    assert made.step_seconds == 1.0
    again = SpeedRow.model_validate_json(made.model_dump_json())
    assert again == made
    assert recorded_case(made) == case
