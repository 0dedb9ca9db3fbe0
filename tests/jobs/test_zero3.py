"""ZeRO-3: networks divided over the ranks train as whole ones do, and are exported whole."""

from __future__ import annotations

import weakref
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from radlads.model.convert.transplant import transplant
from radlads.model.student.export import export_student
from radlads.model.student.load import build_student
from radlads.model.teacher.load import load_teacher
from radlads.model.training import mlp_pieces
from radlads.model.training.objectives import build_objective
from radlads.model.weights.weight_files import open_weight_files
from radlads.tasks.contracts.job import Manifest
from radlads.tasks.contracts.recipe.recipe import Lora, Rate
from radlads.tasks.contracts.recipe.teacher import Calibration
from radlads.tasks.contracts.specs import spec_digest
from radlads.tasks.contracts.store.open import open_store
from radlads.tasks.jobs.code_version import code_version
from radlads.tasks.jobs.common import Job, execute
from radlads.tasks.jobs.data.loader import open_dataset
from radlads.tasks.jobs.origin import write_origin
from radlads.tasks.jobs.train import train
from radlads.tasks.jobs.train.engines import partition
from radlads.tasks.jobs.train.engines.build import build_engine
from radlads.tasks.jobs.train.engines.engine import Engine
from radlads.tasks.jobs.train.training_models import load_networks

NOW = datetime(2026, 1, 1, tzinfo=UTC)
TRAIN = "radlads.tasks.jobs.train.train"
MIXERS = {"mixer_rate": Rate(start=3e-3, final=1e-3)}
RATES = {**MIXERS, "rest_rate": Rate(start=1e-3, final=1e-4)}
SHORT = {"tokens": 6 * 128, "gradient_checkpointing": True}


def run(training: Any, job: Job) -> list[float]:
    assert execute(train.main, job) == "done", training.ending(job)
    return [loss for _, loss in training.curve(job)]


def exported(job: Job) -> dict[str, torch.Tensor]:
    files = open_weight_files(str(Path(job.spec.output_uri) / "model"))
    return {name: files.read(name) for name in files.names()}


def assert_same_models(one: Job, other: Job, tolerance: float) -> None:
    ours, theirs = exported(one), exported(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.allclose(tensor.float(), theirs[name].float(), atol=tolerance, rtol=tolerance), name


@pytest.fixture(scope="module")
def hybrid(training: Any) -> Any:
    """hybrid(job): the job, on a student whose second layer is the teacher's attention."""
    return with_kept_layer(training, "hybrid", attention_rope=True)


@pytest.fixture(scope="module")
def without_positions(training: Any) -> Any:
    """Likewise, where that layer has no rotary positions, and scaled scores."""
    return with_kept_layer(training, "without-positions", attention_rope=False, attention_log_scale=8)


def with_kept_layer(training: Any, name: str, **settings: Any) -> Any:
    teacher = load_teacher(str(training.teacher))
    settings |= {"variant": "hxa079", "options": {}, "attention_layers": (1,), "untie_embeddings": True}
    student = build_student(teacher.config, **settings)
    transplant(teacher, student)
    write_origin(student.config, training.reference)
    from transformers import AutoTokenizer

    export_student(student, AutoTokenizer.from_pretrained(training.teacher), training.root / name / "model")
    manifest = Manifest(stage="student", digest=name, spec={}, files=(), code=code_version(), created_at=NOW)
    open_store(training.store).commit(name, training.root / name, manifest)

    def change(job: Job, **spec: Any) -> Job:
        given = dict(job.spec.inputs) | {"student": training._input(name)}
        changed = job.spec.spec | spec
        typed = type(job.typed).model_validate(changed)
        digest = spec_digest(job.spec.stage, typed, given)
        sheet = job.spec.model_copy(update={"spec": changed, "inputs": given, "digest": digest})
        (job.scratch / "job.json").write_text(sheet.model_dump_json(), encoding="utf-8")
        return Job(spec=sheet)

    return change


WHOLE = {"zero_stage": 1}
"""DeepSpeed's engine, in fp32, which has nothing in common with what is tested here but the step."""


@pytest.mark.parametrize("stage", ["align", "distill", "finetune", "extend", "pretrain"])
def test_a_stage_trains_as_under_deepspeed(training, stage):
    rates = MIXERS if stage == "align" else RATES
    plain = training.job(stage, f"zero1-{stage}", resources=WHOLE, **SHORT, **rates)
    wanted = run(training, plain)
    for zero in (2, 3) if stage in ("align", "distill") else (3,):
        divided = training.job(stage, f"zero{zero}-{stage}", resources={"zero_stage": zero}, **SHORT, **rates)
        assert run(training, divided) == pytest.approx(wanted, rel=1e-5)
        assert_same_models(divided, plain, 1e-5)


def test_what_is_gathered_once_a_step_is_read_between_steps(training):
    """Held-out passes without gradients, MLPs that stay whole on every rank, and hidden states of every layer."""
    options = {**SHORT, **RATES, "freeze": ("mlp",), "heldout_every": 2, "hidden_weight": 0.3}
    plain = training.job("distill", "zero1-frozen", resources=WHOLE, **options)
    other = training.job("distill", "zero2-frozen", resources={"zero_stage": 2}, **options)
    assert run(training, other) == pytest.approx(run(training, plain), rel=1e-5)
    assert_same_models(other, plain, 1e-5)


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_two_ranks_with_frozen_weights_in_8_bit_and_kept_attention(training, hybrid, run_ranks, stage):
    kept = {"freeze": ("mlp", "embeddings"), "hidden_weight": 0.3, "divergence": "reverse"}
    rates = MIXERS if stage == "align" else {**RATES, **kept}
    bits = {"teacher_bits": 8, "mlp_bits": 8 if stage == "distill" else 16}
    options = {**SHORT, **rates, "micro_batch": 1}
    two = {"processes": 2, "zero_stage": 3}
    divided = hybrid(training.job(stage, f"zero3-two-{stage}", resources=two, **options), **bits)
    run_ranks(TRAIN, divided, 2)
    plain = hybrid(training.job(stage, f"zero3-one-{stage}", resources=WHOLE, **options), **bits)
    wanted = run(training, plain)
    assert [loss for _, loss in training.curve(divided)] == pytest.approx(wanted, rel=1e-4)
    assert_same_models(divided, plain, 1e-3)


def test_positions_fade_on_two_ranks_as_on_one(training, without_positions, run_ranks):
    options = {**SHORT, **RATES, "micro_batch": 1, "rope_fade": {"tokens": 4 * 128}}
    curves = []
    for name, processes, zero in (("one", 1, 1), ("two", 2, 3), ("replicated", 1, 2)):
        resources = {"processes": processes, "zero_stage": zero}
        job = without_positions(training.job("distill", f"fading-{name}", resources=resources, **options))
        if processes > 1:
            run_ranks(TRAIN, job, processes)
        else:
            run(training, job)
        curves.append([loss for _, loss in training.curve(job)])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[2] == pytest.approx(curves[0], rel=1e-4)
    at_once = without_positions(training.job("distill", "fading-not", resources=WHOLE, **options | {"rope_fade": None}))
    assert run(training, at_once)[0] != pytest.approx(curves[0][0], rel=1e-3)


def test_shared_mlps_in_pieces_of_the_tokens(training, monkeypatch):
    """Units of their own, whose recomputation ends at their input; their sums are compared after every layer."""
    options = {**SHORT, **RATES, "freeze": ("mlp",), "hidden_weight": 0.3}
    whole = run(training, training.job("distill", "zero1-whole-mlps", resources=WHOLE, **options))
    monkeypatch.setattr(mlp_pieces, "PIECE", 24)
    monkeypatch.setattr(partition, "_REPLICATED", 0)
    pieces = training.job("distill", "zero3-mlps-in-pieces", resources={"zero_stage": 3}, **options)
    assert run(training, pieces) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(("how", "again"), [(True, [24, 24, 16]), ("selective", [64])])
def test_shared_mlps_are_computed_again_as_the_students_own(training, monkeypatch, how, again):
    """The teacher's modules take their place; its own passes are in pieces as before."""
    monkeypatch.setattr(mlp_pieces, "PIECE", 24)
    monkeypatch.setattr(partition, "_REPLICATED", 0)
    options = {"freeze": ("mlp",), "gradient_checkpointing": how, **RATES}
    job = training.job("distill", f"zero3-again-{how}", resources={"zero_stage": 3}, **options)
    job.open_process_group()
    networks = load_networks(job, job.typed)
    objective = build_objective(job.typed, networks.student, networks.teacher)
    engine = build_engine(job, objective, job.typed.section, micro_batch=2, num_micro=1)
    objective.train()
    mlp, rows = networks.student.model.layers[0].mlp, list[int]()
    mlp.act_fn.register_forward_hook(lambda _module, args, _out: rows.append(args[0].shape[:-1].numel()))
    loss, _ = engine.forward(open_dataset(training.root / "data").split("heldout").batch([0, 1], 32))
    assert rows == [24, 24, 16, *again]
    rows.clear()
    loss.backward()
    assert rows == again


def test_lora_in_bf16_is_merged_into_an_export_of_bf16(training):
    options = {**SHORT, **RATES, "precision": "bf16", "lora": Lora(targets=("q_proj", "o_proj"), rank=4)}
    divided = training.job("finetune", "zero3-lora", resources={"zero_stage": 3}, **options)
    curve = run(training, divided)
    plain = training.job("finetune", "deepspeed-lora", resources={"offload_optimizer": True}, **options)
    assert curve == pytest.approx(run(training, plain), rel=5e-3)
    assert_same_models(divided, plain, 2e-2)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 3), (3, 2)])
def test_a_checkpoint_goes_on_under_another_stage(training, monkeypatch, before, after):
    options = {**SHORT, **RATES, "checkpoint_every": 2}
    whole = training.job("distill", "zero3-uncut", resources={"zero_stage": 2}, **options)
    wanted = run(training, whole)
    job = training.job("distill", f"zero3-from-{before}", resources={"zero_stage": before}, **options)
    step = Engine.step

    def crash(self: Engine, batches: Any, rates: Any, number: int, **more: Any) -> Any:
        if number == 4:
            raise RuntimeError("cut")
        return step(self, batches, rates, number, **more)

    monkeypatch.setattr(Engine, "step", crash)
    assert execute(train.main, job) == "crash"
    monkeypatch.setattr(Engine, "step", step)
    resources = job.spec.resources.model_copy(update={"zero_stage": after})
    assert run(training, Job(spec=job.spec.model_copy(update={"resources": resources}))) == pytest.approx(
        wanted, rel=1e-5
    )


def test_a_pass_after_a_restore_is_of_the_restored_state(training):
    losses = []
    for stage in (2, 3):
        job = training.job("distill", f"zero3-restored-{stage}", resources={"zero_stage": stage}, **RATES)
        job.open_process_group()
        spec = job.typed
        networks = load_networks(job, spec)
        engine = build_engine(
            job, build_objective(spec, networks.student, networks.teacher), spec.section, micro_batch=2, num_micro=1
        )
        split = open_dataset(training.root / "data").split("heldout")
        batch = split.batch([0, 1], 32)
        with torch.no_grad():
            before = engine.forward(batch)[0].item()
            for one in engine.held_state():
                one.tensors["param"].mul_(1.2)
            engine.settle()
            losses.append((before, engine.forward(batch)[0].item()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][0] != pytest.approx(losses[0][1], rel=1e-2)


def test_an_export_reads_a_shard_at_a_time_and_writes_the_same_bytes(training, tmp_path, monkeypatch):
    monkeypatch.setattr(partition, "_REPLICATED", 1)  # else every rank holds these small modules whole
    options = {"precision": "bf16", "freeze": ("mlp", "embeddings", "head"), **RATES}
    job = training.job("distill", "zero3-export", resources={"zero_stage": 3}, **options)
    job.open_process_group()
    spec, limit = job.typed, 20_000
    networks = load_networks(job, spec)
    export_student(networks.student, None, tmp_path / "whole", max_shard_bytes=limit)
    objective = build_objective(spec, networks.student, networks.teacher)
    before = [*networks.student.parameters(), *networks.teacher.parameters()]
    engine = build_engine(job, objective, spec.section, micro_batch=2, num_micro=1)
    assert not any(parameter.numel() for parameter in before if parameter.ndim > 1)  # whoever refers to them still
    alive: list[weakref.ref[torch.Tensor]] = []
    sizes: list[tuple[int, int]] = []
    with engine.reading(0) as read:
        assert read is not None

        def watched(name: str) -> torch.Tensor:
            alive.append(weakref.ref(tensor := read(name)))
            held = sum(one.nbytes for ref in alive if (one := ref()) is not None)
            sizes.append((tensor.nbytes, held))
            return tensor

        export_student(
            networks.student, None, tmp_path / "divided", max_shard_bytes=limit, dtype=job.dtype, read=watched
        )
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sum(name.endswith(".safetensors") for name in names) > 3
    assert names == sorted(path.name for path in (tmp_path / "divided").iterdir())
    for name in names:
        assert (tmp_path / "divided" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    each, held = zip(*sizes, strict=True)
    assert max(held) <= max(limit, *each) < sum(each) / 3


@pytest.mark.parametrize(
    ("resources", "calibrate", "told"),
    [({"offload_optimizer": True}, None, "set one of the two"), ({}, Calibration(), "needs whole networks")],
)
def test_what_it_excludes_is_refused(training, resources, calibrate, told):
    job = training.job(
        "align", f"zero3-no-{len(resources)}", resources={"zero_stage": 3, **resources}, **SHORT, **MIXERS
    )
    changed = job.spec.spec | {"calibrate": calibrate and calibrate.model_dump()}
    assert execute(train.main, Job(spec=job.spec.model_copy(update={"spec": changed}))) == "config"
    assert told in training.ending(job)["message"]
