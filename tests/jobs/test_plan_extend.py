"""The plan of an extend stage: memory at its longest context, time of each phase, and where its teacher can teach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.recipe import parse_recipe
from radlads.tasks.contracts.specs import PlanReport
from radlads.tasks.jobs.plan import plan
from radlads.tasks.plan_table import plan_rows

TEACHER = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
PHASES = [
    {"tokens": 1 << 27, "batch": 64},
    {"tokens": 1 << 27, "context": 32768, "batch": 32},
    {"tokens": 1 << 28, "context": 131072, "batch": 8},
]
GPUS = JobResources(device="cuda", processes=8, threads=1, gpu_memory_gib=141.0, dollars_per_gpu_hour=2.0)


def planned(
    tmp_path: Path,
    student: dict[str, Any] | None = None,
    gibibytes: float = 141,
    resources: JobResources = GPUS,
    **extend: Any,
) -> PlanReport:
    (tmp_path / "config.json").write_text(json.dumps(TEACHER))
    section = {"tokens": 1 << 29, "context": 16384, "batch": 64, "phases": PHASES, "gradient_checkpointing": True}
    recipe = parse_recipe(
        {
            "name": "long",
            "teacher": {"path": str(tmp_path)},
            "student": student or {"attention_layers": [6, 13, 20, 27]},
            "data": {"train": {"sources": [{"kind": "hub", "path": "nobody/nothing"}]}},
            "extend": section | extend,
        }
    )
    resources = resources.model_copy(update={"gpu_memory_gib": gibibytes})
    return plan.make_plan(recipe, resources, preview=True, sizes_only=True)


def test_phases_have_their_sizes_and_their_cost(tmp_path: Path) -> None:
    report = planned(tmp_path)
    stage = report.stages["extend"]
    phases = stage["phases"]
    assert [phase["context"] for phase in phases] == [16384, 32768, 131072]
    assert [phase["steps"] for phase in phases] == [128, 128, 256]
    for key in ("tokens", "steps", "flops"):
        assert stage[key] == pytest.approx(sum(phase[key] for phase in phases))
    training = sum(phase["seconds"] for phase in phases)
    assert stage["seconds_by"]["train"] == pytest.approx(training)
    for key in ("seconds", "gpu_hours", "dollars"):  # with start-up, checkpoints and export
        assert stage[key] > sum(phase[key] for phase in phases)
    assert stage["context"] == 131072
    per_token = [phase["flops"] / phase["tokens"] for phase in phases]
    kept, width = 4, 16 * 128
    # Softmax layers multiply 2·T·W more a token and pass: forward, twice that backward; recomputation does not count.
    assert per_token[2] - per_token[0] == pytest.approx(3 * kept * 2 * (131072 - 16384) * width)
    table = plan_rows(report)
    assert [row["stage"] for row in table] == ["extend", "· phase 1", "· phase 2", "· phase 3"]
    assert [row["context"] for row in table] == ["131,072", "16,384", "32,768", "131,072"]
    assert all(row["time"] and row["$"] for row in table)


def test_memory_is_that_of_the_longest_context(tmp_path: Path) -> None:
    memory = planned(tmp_path).stages["extend"]["memory_bytes_per_gpu"]
    last = planned(tmp_path, phases=[], context=131072, batch=8).stages["extend"]["memory_bytes_per_gpu"]
    assert [memory[kind] for kind in ("activations", "logits")] == [last[kind] for kind in ("activations", "logits")]
    # Only a stage whose steps are single passes frees activations as it makes gradients.
    assert memory["gradients"] > last["gradients"]
    assert memory["total"] == last["total"] + memory["gradients"] - last["gradients"]
    assert memory["teacher"] == 0
    (misfit,) = planned(tmp_path, gibibytes=24).misfits
    assert misfit.startswith("extend needs about")


def test_sharing_rows_is_advised_where_processes_can(tmp_path: Path) -> None:
    (misfit,) = planned(tmp_path, gibibytes=40).misfits
    assert "extend.sequence_parallel: 2 (then" in misfit
    recorded = GPUS.model_copy(update={"cuda_graphs": "on"})
    (misfit,) = planned(tmp_path, gibibytes=40, resources=recorded).misfits
    assert "sequence_parallel" not in misfit, "the plan would refuse it"
    shared = planned(tmp_path, gibibytes=40, sequence_parallel=2)
    assert shared.misfits == ()
    with pytest.raises(UserError, match=r"extend.sequence_parallel: 32 processes cannot divide the 16 heads"):
        planned(tmp_path, resources=GPUS.model_copy(update={"processes": 32}), sequence_parallel=32)


def test_the_longest_phase_is_given_up_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "check_sharing", lambda *args: {})
    report = planned(tmp_path, gibibytes=40)
    (misfit,) = report.misfits
    assert "no phase of extend beyond context 32768 (then" in misfit
    assert "not enough" not in misfit
    shorter = planned(tmp_path, gibibytes=40, phases=PHASES[:2], tokens=1 << 28)
    assert shorter.misfits == ()


def test_the_teacher_takes_memory_and_time_only_where_it_is_asked_for(tmp_path: Path) -> None:
    alone = planned(tmp_path)
    taught = planned(tmp_path, phases=[PHASES[0] | {"teacher_kl": 0.1}, *PHASES[1:]])
    memory = taught.stages["extend"]["memory_bytes_per_gpu"]
    assert memory["teacher"] == 2 * taught.teacher_parameters
    before, after = (report.stages["extend"]["phases"] for report in (alone, taught))
    assert after[0]["flops"] > 1.2 * before[0]["flops"]
    assert after[1:] == before[1:]
    alone = GPUS.model_copy(update={"processes": 1, "offload_optimizer": True})
    one = {"phases": [], "context": 32768, "batch": 32, "resources": alone}
    assert "teacher.bits: 8" in planned(tmp_path, gibibytes=15, teacher_kl=0.1, **one).misfits[0]
    assert "teacher.bits" not in planned(tmp_path, gibibytes=15, **one).misfits[0]


def test_a_teacher_beyond_its_positions_is_refused_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"extend.context \(131072\) is beyond the 40960 positions .* nothing to teach; "
                                        "shorten it, or train without the teacher there"):  # fmt: skip
        planned(tmp_path, teacher_kl=0.1)
    within = planned(tmp_path, phases=[phase | {"teacher_kl": 0.1} for phase in PHASES[:2]] + PHASES[2:])
    assert not any("positions" in warning for warning in within.warnings)


def test_only_softmax_attention_with_rotary_positions_is_warned_of(tmp_path: Path) -> None:
    rotary = {"attention_layers": [6, 13, 20, 27], "attention_rope": True}
    (warning,) = [line for line in planned(tmp_path, rotary).warnings if "positions" in line]
    assert warning.startswith("extend.context (131072) is beyond the 40960 positions")
    for student in ({"attention_layers": [6, 13]}, {"attention_rope": True}):
        assert not any("positions" in line for line in planned(tmp_path, student).warnings)
