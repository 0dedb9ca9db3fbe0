"""`decay_dtype`: the log decay that training hands to the recurrence, in the digest and checked by the plan."""

from __future__ import annotations

import pytest
import torch

from radlads.kernels.wkv7 import wkv7
from radlads.model.mixers.shared import recurrence_wkv7
from radlads.tasks.contracts.recipe.recipe import parse_recipe
from radlads.tasks.jobs.common import execute
from radlads.tasks.jobs.plan.checks import Findings
from radlads.tasks.jobs.plan.training_checks import check_training
from radlads.tasks.jobs.train import train


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_the_recurrence_gets_what_the_recipe_says(training, monkeypatch, stage):
    seen = set()

    def spied(r, log_decay, *others, **options):
        seen.add(log_decay.dtype)
        return wkv7(r, log_decay, *others, **options)

    monkeypatch.setattr(recurrence_wkv7, "wkv7", spied)
    curves = {}
    for name in ("float32", "bfloat16"):
        seen.clear()
        job = training.job(stage, f"decay-{name}", tokens=128, decay_dtype=name)
        assert execute(train.main, job) == "done", training.ending(job)
        assert seen == {getattr(torch, name)}
        curves[name] = training.curve(job)[0][1]
    assert curves["bfloat16"] != curves["float32"]
    assert curves["bfloat16"] == pytest.approx(curves["float32"], rel=1e-2)


def test_only_the_rounded_one_is_in_the_digest(training):
    digests = [
        training.job("align", "digest", tokens=128, **more).spec.digest
        for more in ({}, {"decay_dtype": "float32"}, {"decay_dtype": "bfloat16"})
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(("variant", "faults"), [("hxa079", 0), ("rad_rwkv6", 1), ("gated_deltanet", 1)])
def test_a_variant_without_such_a_decay_is_refused_by_the_plan(variant, faults):
    files = {"sources": [{"kind": "files", "paths": ["a.txt"]}]}
    align = {"tokens": 4096, "context": 64, "batch": 4, "decay_dtype": "bfloat16"}
    student = {"variant": variant}
    findings = Findings()
    raw = {"name": "tiny", "teacher": {"path": "/t"}, "student": student, "data": {"train": files}, "align": align}
    check_training(parse_recipe(raw), None, 1, findings)
    said = f"align.decay_dtype: the variant {variant} has no log decay of RWKV-7"
    assert [fault.partition(";")[0] for fault in findings.faults] == [said] * faults
