"""Two processes under the real DeepSpeed launcher: the same training as one, and a fault of one ends both."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from radlads.tasks.contracts.recipe.recipe import Rate
from radlads.tasks.jobs.common import Job, execute
from radlads.tasks.jobs.train import train
from radlads.tasks.launchers.local import render_command

pytestmark = pytest.mark.slow

TRAIN = "radlads.tasks.jobs.train.train"
SETTINGS = {
    "mixer_rate": Rate(start=3e-3, final=1e-3),
    "rest_rate": Rate(start=1e-3, final=1e-4),
    "keep_checkpoints": 9,
}


@pytest.fixture
def launch(job_python):
    """launch(job): the job as the control plane starts it; only DeepSpeed's launcher has been imported before."""

    def start(job: Job) -> Any:
        folder = Path(sys.executable).parent
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = render_command(job.spec, Path("job.json"), port=port)
        environment = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "DS_ACCELERATOR": "cpu",
            "PYTHONSAFEPATH": "1",
            "OMP_NUM_THREADS": "1",
        }
        return job_python.start(*command[command.index("-m") :], env=environment, cwd=job.scratch)

    return start


@pytest.fixture(scope="module")
def whole(training) -> list[float]:
    """The curve of one process."""
    job = training.job("distill", "alone", **SETTINGS)
    assert execute(train.main, job) == "done", training.ending(job)
    return [loss for _, loss in training.curve(job)]


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_two_processes_train_as_one_does_and_one_continues_what_two_began(
    training, whole, launch, run_ranks, zero_stage
):
    resources = {"processes": 2, "zero_stage": zero_stage}
    job = training.job("distill", f"two-{zero_stage}", resources=resources, micro_batch=1, **SETTINGS)
    if zero_stage == 1:
        process = launch(job)
        assert process.wait() == 0, process.output[-4000:]
    else:  # the launcher is the same for every stage, and takes longer than the training
        run_ranks(TRAIN, job, 2)
    assert training.ending(job)["reason"] == "done"
    curve = [loss for _, loss in training.curve(job)]
    assert curve == pytest.approx(whole, rel=1e-4)
    product = job.store.read_manifest(job.output_prefix)
    assert product is not None

    # As if both processes had died after step 12.
    place = training.root / "store" / job.output_prefix
    (place / "manifest.json").unlink()
    for step in ("step-000018", "step-000020"):
        shutil.rmtree(place / "checkpoints" / step)
    again = Job(spec=job.spec)
    assert execute(train.main, again) == "done", training.ending(job)
    resumed = [loss for _, loss in training.curve(job)]
    assert resumed[:12] == curve[:12]
    assert resumed[12:] == pytest.approx(curve[12:], rel=1e-4)
    metrics = again.store.read_manifest(job.output_prefix).metrics
    assert metrics["heldout/kl"] == pytest.approx(product.metrics["heldout/kl"], rel=1e-3)


def test_a_batch_that_two_cannot_share_ends_both_with_the_reason(training, run_ranks):
    job = training.job("distill", "odd", resources={"processes": 2}, batch=3, micro_batch=1)
    run_ranks(TRAIN, job, 2, code=2)
    assert training.ending(job)["reason"] == "config"
    assert "must be a multiple of the number of processes (2)" in training.ending(job)["message"]


def test_a_rank_killed_with_9_ends_the_other_and_both_go_on_from_the_checkpoint(training, launch, run_ranks):
    job = training.job("distill", "lost", resources={"processes": 2}, checkpoint_every=2, tokens=40 * 128, **SETTINGS)
    process = launch(job)
    deadline = time.monotonic() + 200
    latest = training.root / "store" / job.output_prefix / "checkpoints" / "latest"
    while not latest.exists():
        assert not (job.scratch / "exit.json").exists(), training.ending(job)
        assert time.monotonic() < deadline, process.output[-4000:]
        time.sleep(0.02)
    os.kill(_rank(process.pid, "1"), signal.SIGKILL)
    assert process.wait() != 0
    assert job.store.read_manifest(job.output_prefix) is None
    done = len(training.curve(job))
    assert 2 <= done < 40
    again = training.job("distill", "lost", resources={"processes": 2}, checkpoint_every=2, tokens=40 * 128, **SETTINGS)
    run_ranks(TRAIN, again, 2)
    assert [step for step, _ in training.curve(again)] == list(range(1, 41))
    assert json.loads((again.output / "train.json").read_text())["processes"] == 2


def _rank(parent: int, rank: str) -> int:
    """The pid of a rank under the launcher."""
    psutil = pytest.importorskip("psutil")
    for child in psutil.Process(parent).children(recursive=True):
        if child.environ().get("RANK") == rank and TRAIN in child.cmdline():
            return child.pid
    raise AssertionError(f"no rank {rank} under {parent}")
