"""Two processes under the real DeepSpeed launcher: the same training as one, and a fault of one ends both."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

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


def launch(job: Job) -> subprocess.Popen[bytes]:
    """Start the job as the control plane does; its output is log.txt."""
    folder = Path(sys.executable).parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = render_command(job.spec, Path("job.json"), port=port)
    environment = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
    }
    with (job.scratch / "log.txt").open("wb") as log:
        return subprocess.Popen(
            command,
            cwd=job.scratch,
            env=environment,
            stdout=log,
            stderr=log,
        )


def log_of(job: Job) -> str:
    return (job.scratch / "log.txt").read_text()[-4000:]


@pytest.fixture(scope="module")
def whole(training) -> list[float]:
    """The curve of one process."""
    job = training.job("distill", "alone", **SETTINGS)
    assert execute(train.main, job) == "done", training.ending(job)
    return [loss for _, loss in training.curve(job)]


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_two_processes_train_as_one_does_and_one_continues_what_two_began(training, whole, run_ranks, zero_stage):
    resources = {"processes": 2, "zero_stage": zero_stage}
    job = training.job("distill", f"two-{zero_stage}", resources=resources, micro_batch=1, **SETTINGS)
    if zero_stage == 1:
        assert launch(job).wait(timeout=300) == 0, log_of(job)
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


def test_a_batch_that_two_cannot_share_ends_both_with_the_reason(training):
    job = training.job("distill", "odd", resources={"processes": 2}, batch=3, micro_batch=1)
    assert launch(job).wait(timeout=300) == 2, log_of(job)
    assert training.ending(job)["reason"] == "config"
    assert "must be a multiple of the number of processes (2)" in training.ending(job)["message"]


def test_a_rank_killed_with_9_ends_the_other_and_both_go_on_from_the_checkpoint(training, run_ranks):
    job = training.job("distill", "lost", resources={"processes": 2}, checkpoint_every=2, tokens=40 * 128, **SETTINGS)
    process = launch(job)
    deadline = time.monotonic() + 200
    latest = training.root / "store" / job.output_prefix / "checkpoints" / "latest"
    while not latest.exists():
        assert process.poll() is None, log_of(job)
        assert time.monotonic() < deadline, log_of(job)
        time.sleep(0.02)
    os.kill(_rank(process.pid, "1"), signal.SIGKILL)
    assert process.wait(timeout=120) != 0
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
