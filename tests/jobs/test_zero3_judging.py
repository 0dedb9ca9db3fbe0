"""ZeRO-3 in stages that do not train: numbers and choices are those of whole networks on one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from radlads.model.student.load import load_student
from radlads.tasks.contracts.job import InputRef
from radlads.tasks.contracts.recipe.choice import AttentionChoice, RecallProbe
from radlads.tasks.contracts.recipe.sections import Needle
from radlads.tasks.contracts.specs import ChooseSpec, NeedleSpec
from radlads.tasks.jobs.choose import choose
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.judge import needle

TOLERANCE = 1e-6
# Fewer batches than would go evenly into two ranks, of two lengths, and passes of different numbers.
PROBE = RecallProbe(lengths=(96, 128), documents=5, heldout_tokens=192, context=64, micro_batch=1)
NEEDLE = Needle(lengths=(160,), depths=(0.5,), trials=5, batch=2, max_new_tokens=6)
BOTH = """
import sys
from radlads.tasks.jobs.choose import choose
from radlads.tasks.jobs.common import execute, open_job
from radlads.tasks.jobs.judge import divided, needle
from pathlib import Path

held = []
hold = divided.hold
def counted(job, network, *more):
    network = hold(job, network, *more)
    held.append(sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in network.parameters()))
    assert held[-1] < 0.8 * sum(p.numel() for p in network.parameters())
    return network
needle_models = __import__("radlads.tasks.jobs.judge.judged_models", fromlist=["hold"])
choose.hold = needle_models.hold = counted
for main, path in ((choose.main, sys.argv[1]), (needle.main, PATH)):
    assert execute(main, open_job(Path(path))) == "done"
assert len(held) == 4
"""


def moved(training: Any, job: Job, resources: dict[str, Any], name: str) -> Job:
    sheet = job.spec.model_copy(
        update={
            "store": training.store,
            "output_uri": f"{training.store.uri}/{name}-{job.spec.digest}",
            "resources": job.spec.resources.model_copy(update=resources),
            "scratch": str(job.scratch.with_name(f"{job.scratch.name}-{name}")),
        }
    )
    Path(sheet.scratch).mkdir(parents=True, exist_ok=True)
    (Path(sheet.scratch) / "job.json").write_text(sheet.model_dump_json())
    return Job(spec=sheet)


def test_two_ranks_with_divided_networks_choose_and_find_as_one(training, make_job, run_main, run_ranks):
    inputs = {name: InputRef(uri=f"{training.store.uri}/{name}", digest=name) for name in ("student", "data")}
    way = AttentionChoice(count=1, choose="recall", recall=PROBE)
    chosen = ChooseSpec(section=way, teacher=training.reference, attention_rope=False, run_tokens=400_000)
    found = NeedleSpec(section=NEEDLE, teacher=training.reference, training_length=200)
    jobs = [make_job("choose", chosen, inputs), make_job("needle", found, {"student": inputs["student"]})]
    alone = [moved(training, job, {}, "alone") for job in jobs]
    wanted = [run_main(main, job).metrics for main, job in zip((choose.main, needle.main), alone, strict=True)]
    both = [moved(training, job, {"processes": 2, "zero_stage": 3}, "divided") for job in jobs]
    run_ranks(BOTH.replace("PATH", repr(str(both[1].scratch / "job.json"))), both[0], 2)
    for job, numbers in zip(both, wanted, strict=True):
        manifest = job.store.read_manifest(job.output_prefix)
        assert manifest is not None
        assert manifest.metrics.keys() == numbers.keys()
        for key in numbers.keys() - {"seconds", "processes"}:
            assert manifest.metrics[key] == pytest.approx(numbers[key], rel=TOLERANCE), key
    sheets = [json.loads((Path(job.spec.output_uri) / "needle.json").read_text()) for job in (alone[1], both[1])]
    assert sheets[0]["examples"] == sheets[1]["examples"]
    students = [load_student(Path(job.spec.output_uri) / "model").state_dict() for job in (alone[0], both[0])]
    assert students[0].keys() == students[1].keys()
    assert all(students[0][name].equal(students[1][name]) for name in students[0])
