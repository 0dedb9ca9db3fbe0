"""A step is normalised by its labels, however its sequences are cut into forward passes and shared among ranks.

Run as a program, this file is one rank: FOLDER RANK WORLD_SIZE TEACHER STUDENT.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from radlads.model.student.load import load_student
from radlads.model.teacher.load import load_teacher
from radlads.model.training.objectives import Objective, build_objective
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.recipe import Align, Distill, Finetune, Optimizer
from radlads.tasks.contracts.specs import TeacherRef, TrainSpec
from radlads.tasks.jobs.common import execute
from radlads.tasks.jobs.data.batch_plan import plan_batches
from radlads.tasks.jobs.data.loader import Batch, TokenDataset, TokenSplit, open_dataset
from radlads.tasks.jobs.process_group import join_group
from radlads.tasks.jobs.train import train
from radlads.tasks.jobs.train.engines.engine import Engine
from radlads.tasks.jobs.train.heldout import heldout_metrics
from radlads.tasks.jobs.train.label_check import check_labels

CPU = torch.device("cpu")
SEQUENCES, CONTEXT, VOCABULARY = 4, 24, 400
# Labels of each sequence: ragged, and of two ranks with two passes each one has none at all.
LABELS = (20, 0, 1, 0)
ASSISTANT = {"assistant_only": True, "label_smoothing": 0.1}
COMPREHENSIVE = {"loss": "comprehensive"}
# Name → stage, settings of its section, precision, ZeRO stage (3: ZeRO-2 with the optimizer in host memory).
CASES: dict[str, tuple[str, dict[str, Any], torch.dtype, int]] = {
    **{f"finetune-{zero}": ("finetune", ASSISTANT, torch.float32, zero) for zero in (0, 1, 2, 3)},
    "finetune-bf16": ("finetune", ASSISTANT, torch.bfloat16, 2),
    "finetune-unmasked": ("finetune", {}, torch.float32, 1),
    "distill": ("distill", {"ce_weight": 0.3, "l2wrap": 1e-3}, torch.float32, 2),
    **{f"align-{loss}": ("align", {"loss": loss}, torch.float32, 1) for loss in ("l2", "mse", "scaled_mse")},
    "align-comprehensive": ("align", COMPREHENSIVE, torch.float32, 1),
    "align-svd": ("align", COMPREHENSIVE | {"comprehensive": {"revision": "svd"}}, torch.float32, 1),
}
SECTIONS = {"align": Align, "distill": Distill, "finetune": Finetune}


def make_objective(case: str, teacher: Path, student: Path) -> Objective:
    """The objective of a case; its clip is out of reach, so that Adam's first moment tells the gradient."""
    stage, changes, dtype, _ = CASES[case]
    sizes = {"tokens": 4096, "context": CONTEXT, "batch": SEQUENCES, "optimizer": Optimizer(clip=1e9)}
    spec = TrainSpec(
        objective=stage, section=SECTIONS[stage](**sizes, **changes), teacher=TeacherRef(path="x", fingerprint="y")
    )
    loaded = None if stage == "finetune" else load_teacher(str(teacher), dtype=dtype, device=CPU)
    return build_objective(spec, load_student(student, dtype=dtype), loaded)


def rows(step: int) -> Batch:
    """The four sequences of a step; with each step the labels move on by two sequences."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCABULARY, (SEQUENCES, CONTEXT + 1), generator=generator)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, count in enumerate(LABELS):
        mask[(row + 2 * step) % SEQUENCES, 3 : 3 + count] = True
    return {"input_ids": ids, "loss_mask": mask}


def make_engine(objective: Objective, case: str, sequences: int, world_size: int) -> Engine:
    _, _, dtype, zero = CASES[case]
    return Engine(
        objective, objective.section, device=CPU, dtype=dtype, zero_stage=min(zero, 2), offload=zero == 3,
        micro_batch=sequences, num_micro=SEQUENCES // world_size // sequences,
    )  # fmt: skip


def two_steps(objective: Objective, case: str, sequences: int, rank: int, world_size: int) -> dict[str, Tensor]:
    """Adam's first moments and the metrics of two steps at a rate of 0, which move nothing."""
    engine = make_engine(objective, case, sequences, world_size)
    found: dict[str, Tensor] = {}
    for step in range(2):
        places = [(index * world_size + rank) * sequences for index in range(engine.num_micro)]  # as BatchPlan.micro
        batches = [{key: x[at : at + sequences] for key, x in rows(step).items()} for at in places]
        seen = engine.step(batches, {"mixer": 0.0, "rest": 0.0}, step + 1, stop=False)
        numbers = seen.metrics | {"grad_norm": seen.grad_norm}
        found |= {f"metrics/{step}/{name}": torch.tensor(value).double() for name, value in numbers.items()}
    return found | first_moments(engine)


def first_moments(engine: Engine) -> dict[str, Tensor]:
    """Of every parameter, whole, on every rank."""
    whole = {name: torch.zeros(parameter.numel()) for name, parameter in engine.parameters.items()}
    for one in engine.own_state():
        whole[one.name][one.start : one.start + one.numel] = one.tensors["exp_avg"]
    for moment in whole.values():
        torch.distributed.all_reduce(moment)
    return {name: whole[name].view(parameter.shape) for name, parameter in engine.parameters.items()}


def one_rank(folder: Path, rank: int, world_size: int, teacher: Path, student: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "group"), world_size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    for case in CASES:
        for sequences in (1, 2):
            found = two_steps(make_objective(case, teacher, student), case, sequences, rank, world_size)
            if rank == 0:
                save_file(found, folder / f"{case}-{sequences}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def places(training) -> tuple[Path, Path]:
    """Folders of teacher and student."""
    return training.teacher, training.root / "student" / "model"


@pytest.fixture(scope="module")
def by_two(job_python, places, tmp_path_factory) -> Path:
    """What two ranks found in every case."""
    folder = tmp_path_factory.mktemp("two")
    ranks = [job_python.start(__file__, str(folder), str(rank), "2", *map(str, places)) for rank in range(2)]
    codes = [rank.wait() for rank in ranks]
    assert codes == [0, 0], [rank.output for rank in ranks]
    return folder


def expected(objective: Objective) -> dict[str, Tensor]:
    """The same of both steps whole, in plain torch."""
    parameters = {name: p for name, p in objective.student.named_parameters() if objective.trainable(name)}
    objective.train()
    found: dict[str, Tensor] = {}
    moments = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for step in range(2):
        for parameter in parameters.values():
            parameter.requires_grad_(True).grad = None
        loss, metrics = objective(rows(step))
        loss.backward()
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
        norm = nn.utils.get_total_norm(list(grads.values()))
        numbers = {"loss": loss.detach()} | metrics | {"grad_norm": norm}
        found |= {f"metrics/{step}/{name}": value.double() for name, value in numbers.items()}
        moments = {name: 0.9 * moment + 0.1 * grads[name] for name, moment in moments.items()}
    return found | {name: moment.float() for name, moment in moments.items()}


@pytest.mark.parametrize("case", CASES)
def test_passes_and_ranks_change_nothing_but_rounding(case, places, by_two):
    join_group(CPU, 0, 1)
    wanted = expected(make_objective(case, *places))
    found = {f"1 rank, {n} at a time": two_steps(make_objective(case, *places), case, n, 0, 1) for n in (1, 2, 4)}
    found |= {f"2 ranks, {n} at a time": load_file(by_two / f"{case}-{n}.safetensors") for n in (1, 2)}
    tolerance = 0.02 if CASES[case][2] == torch.bfloat16 else 1e-5
    for cut, numbers in found.items():
        assert numbers.keys() == wanted.keys()
        told = {name: float(value) for name, value in numbers.items() if name.startswith("metrics/")}
        assert told == {name: pytest.approx(float(wanted[name]), rel=tolerance, abs=1e-7) for name in told}, cut
        ours, theirs = (
            torch.cat([x[name].flatten() for name in sorted(wanted) if name not in told]) for x in (numbers, wanted)
        )
        assert (ours - theirs).norm() <= tolerance * theirs.norm(), cut


def test_what_is_expected_is_the_cross_entropy_of_all_labels(places):
    """So that the comparison above has a foot outside of the objective."""
    objective = make_objective("finetune-0", *places)
    batch = rows(0)
    logits = objective.student(batch["input_ids"][:, :-1]).logits
    labels = batch["input_ids"][:, 1:].masked_fill(~batch["loss_mask"][:, 1:], -100)
    sums = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1, reduction="sum")
    assert objective.num_labels(batch) == sum(LABELS)
    torch.testing.assert_close(objective(batch)[0], sums / sum(LABELS))


@pytest.mark.parametrize("zero", [0, 2])
def test_a_step_without_a_label_is_an_error_and_moves_nothing(places, zero):
    join_group(CPU, 0, 1)
    objective = make_objective(f"finetune-{zero}", *places)
    engine = make_engine(objective, f"finetune-{zero}", 2, 1)
    before = {name: p.detach().clone() for name, p in objective.student.named_parameters()}
    batch = rows(0) | {"loss_mask": torch.zeros(SEQUENCES, CONTEXT + 1, dtype=torch.bool)}
    batches = [{key: x[at : at + 2] for key, x in batch.items()} for at in (0, 2)]
    with pytest.raises(UserError, match="step 7: none of its tokens is a label"):
        engine.step(batches, {"mixer": 1e-3, "rest": 1e-3}, 7, stop=False)
    assert engine.adam_steps() == 0
    assert all(torch.equal(p, before[name]) for name, p in objective.student.named_parameters())


def masked(dataset: TokenDataset, folder: Path, masks: dict[str, Any]) -> TokenDataset:
    """The dataset with masks: split → which tokens count (an index of its stream)."""
    splits = {}
    for name, split in dataset.splits.items():
        mask = np.zeros(split.tokens, np.uint8)
        mask[masks.get(name, slice(0))] = 1
        mask.tofile(folder / f"{name}-mask.bin")
        splits[name] = replace(split, mask_files=(str(folder / f"{name}-mask.bin"),))
    return replace(dataset, splits=splits, has_mask=True)


@pytest.fixture(scope="module")
def stories_dataset(training) -> TokenDataset:
    return open_dataset(training.root / "data")


def test_labels_of_rows_are_those_of_their_batches(stories_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("radlads.tasks.jobs.data.loader._READ_TOKENS", 100)
    some = np.random.Generator(np.random.PCG64(0)).random(stories_dataset.split("train").tokens) < 0.3
    split: TokenSplit = masked(stories_dataset, tmp_path, {"train": some}).split("train")
    labels = split.labels(32)
    assert len(labels) == split.rows(32) > 10
    batch = split.batch(list(range(split.rows(32))), 32)
    assert labels.tolist() == batch["loss_mask"][:, 1:].sum(1).tolist()


@pytest.mark.parametrize(
    ("counted", "told"),
    [
        (slice(0), r"none of the \d+ tokens of data 'train' is the assistant's"),
        (slice(0, 1), "none of the"),  # the stream's first token is never a label
        ("first step", "the 4 sequences of 32 tokens of step 2 hold no token of the assistant"),
        (slice(0, None, 32), None),
    ],
)
def test_a_stage_whose_steps_lack_labels_is_refused_before_its_first_one(stories_dataset, tmp_path, counted, told):
    section = Finetune(tokens=3 * 4 * 32, context=32, batch=4, assistant_only=True)
    if counted == "first step":
        row = int(plan_batches(section, stories_dataset.split("train"), 1)[0].rows(0)[3])
        counted = slice(row * 32 + 1, row * 32 + 33)
    plans = plan_batches(section, masked(stories_dataset, tmp_path, {"train": counted}).split("train"), 1)
    if told is None:
        check_labels(section, plans)
        return
    with pytest.raises(UserError, match=told):
        check_labels(section, plans)


def test_a_job_without_labels_ends_as_the_recipes_fault(training, tmp_path, monkeypatch):
    job = training.job("finetune", "no-labels", assistant_only=True)
    monkeypatch.setattr(train, "open_dataset", lambda folder: masked(open_dataset(folder), tmp_path, {}))
    assert execute(train.main, job) == "config"
    assert "is the assistant's: nothing would be learnt" in training.ending(job)["message"]


def test_micro_batch_changes_no_curve_of_a_job(training, tmp_path, monkeypatch):
    some = dict.fromkeys(("train", "heldout"), slice(20, None, 37))  # a label in most rows, none in some
    monkeypatch.setattr(train, "open_dataset", lambda folder: masked(open_dataset(folder), tmp_path, some))
    curves = []
    for size in (1, 4):
        settings = {"tokens": 6 * 128, "micro_batch": size, "assistant_only": True, "context": 32, "heldout_every": 3}
        job = training.job("finetune", f"ragged-{size}", **settings)
        assert execute(train.main, job) == "done", training.ending(job)
        lines = map(json.loads, (job.output / "metrics.jsonl").read_text().splitlines())
        names = ("loss", "accuracy", "grad_norm", "heldout/loss")
        curves.append([{name: row[name] for name in names if name in row} for row in lines])
    assert len(curves[0]) >= 6
    for one, four in zip(*curves, strict=True):
        assert one == pytest.approx(four, rel=1e-4)


@pytest.mark.parametrize("case", ["finetune-0", "align-scaled_mse", "align-svd", "distill"])
def test_heldout_metrics_do_not_depend_on_batches(case, places, stories_dataset, tmp_path):
    objective = make_objective(case, *places)
    split = masked(stories_dataset, tmp_path, {"heldout": slice(24, 30)}).split("heldout")

    def found(batch_size: int, max_tokens: int = 5 * CONTEXT) -> dict[str, float]:
        return heldout_metrics(
            objective, objective, split, context=CONTEXT, batch_size=batch_size, max_tokens=max_tokens, device=CPU,
            rank=0, world_size=1, document_ids=False,
        )  # fmt: skip

    whole = found(5)
    assert found(1) == pytest.approx(whole, rel=1e-5)
    assert found(2) == pytest.approx(whole, rel=1e-5)
    objective.eval()
    with torch.no_grad():
        loss, _ = objective(split.batch(list(range(5)), CONTEXT))
    assert whole["heldout/loss"] == pytest.approx(float(loss), rel=1e-5)


def test_heldout_rows_without_a_label_have_no_loss(places, stories_dataset, tmp_path, caplog):
    split = masked(stories_dataset, tmp_path, {}).split("heldout")
    options = {"batch_size": 2, "max_tokens": 96, "rank": 0, "world_size": 1, "document_ids": False}
    objective = make_objective("finetune-0", *places)
    assert heldout_metrics(objective, objective, split, context=CONTEXT, device=CPU, **options) == {}
    assert "no token of the held-out rows is a label" in caplog.text


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
