"""`decay_dtype`: the log decay that training hands to the recurrence, in the digest and checked by the plan."""

from __future__ import annotations

import pytest
import torch

from radlads.kernels.wkv7 import wkv7
from radlads.model.mixers.shared import recurrence_wkv7
from radlads.tasks.contracts.identity import identity
from radlads.tasks.contracts.recipe.recipe import load_recipe, parse_recipe
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_auto_is_the_precision_of_the_stage(training, monkeypatch, precision):
    seen = set()

    def spied(r, log_decay, *others, **options):
        seen.add((r.dtype, log_decay.dtype))
        return wkv7(r, log_decay, *others, **options)

    monkeypatch.setattr(recurrence_wkv7, "wkv7", spied)
    job = training.job("align", f"decay-auto-{precision}", tokens=128, precision=precision)
    assert execute(train.main, job) == "done", training.ending(job)
    assert seen == {(torch.float32, torch.float32) if precision == "fp32" else (torch.bfloat16, torch.bfloat16)}


def test_the_digest_without_the_key_is_of_what_such_products_were_made_with(training):
    """They had a decay of 32 bits on a GPU; today's default has another one there, and another digest."""
    sections = ({"decay_dtype": "float32"}, {}, {"decay_dtype": "auto"}, {"decay_dtype": "bfloat16"})
    jobs = [training.job("align", "digest", tokens=128, **more) for more in sections]
    digests = [job.spec.digest for job in jobs]
    assert digests[1] == digests[2]
    assert len({digests[0], digests[1], digests[3]}) == 3
    from_before = identity(jobs[0].typed, jobs[0].typed.pins)
    assert "decay_dtype" not in from_before["section"]


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


@pytest.mark.parametrize(("variant", "faults"), [("sliding_window", 2), ("gated_deltanet", 0), ("rad_rwkv6", 0)])
def test_parts_that_a_variant_lacks_are_refused_by_the_plan(variant, faults):
    """A rate for them would change nothing, and a stage that trains them alone would fail when its turn comes."""
    raw = load_recipe("smoke").model_dump(mode="json")
    raw["student"] = {"variant": variant, "attention_layers": [3]}
    raw["distill"]["optimizer"] = {"decay_base_rate": 2.0}
    raw["finetune"]["train_only"] = ["decay", "token_shift"]
    findings = Findings()
    check_training(parse_recipe(raw), None, 1, findings)
    lacks = f"the variant {variant} has no decay"
    assert (
        findings.faults
        == [
            f"distill.optimizer.decay_base_rate: {lacks}; leave the key out, or change student.variant",
            f"finetune.train_only: {lacks} and no token_shift; leave them out, or change student.variant",
        ][:faults]
    )
