"""A training process killed with -9 wherever it hurts: the next attempt gives the same curve, bit for bit."""

from __future__ import annotations

import json

import pytest

from radlads.tasks.contracts.recipe.recipe import Rate
from radlads.tasks.jobs.common import Job, execute
from radlads.tasks.jobs.train import train

SETTINGS = {
    "mixer_rate": Rate(start=3e-3, final=1e-3),
    "rest_rate": Rate(start=1e-3, final=1e-4),
    "checkpoint_every": 4,
    "heldout_every": 5,
}

SCENARIOS = {  # name → the least number of steps that are on record when the process dies
    "mid-step": 9,
    "mid-save": 8,
    "mid-upload": 8,
    "before-manifest": 8,
    "before-latest": 8,
    "mid-export": 20,
    "sigterm": 10,
}

# The real program, with a hand on the trigger. Steps 1 to 20, checkpoints at 4, 8, 12, ... Each job runs in a process
# of its own, forked from one that has already imported what they need.
DRIVER = """
import json, os, signal, sys
import deepspeed
from radlads.tasks.jobs.common import run_job
from radlads.tasks.jobs.train import train
from radlads.tasks.jobs.train.engines.engine import Engine
from radlads.tasks.contracts.store.open import LocalStore

calls = []

def nth(n):
    calls.append(1)
    return len(calls) == n

def before(owner, name, when, how=signal.SIGKILL):
    original = getattr(owner, name)
    def patched(*args, **kwargs):
        if when(*args):
            os.kill(os.getpid(), how)
        return original(*args, **kwargs)
    setattr(owner, name, patched)

def arm(scenario):
    if scenario == "mid-step":  # the tenth step has its gradients, the optimizer has not moved
        before(Engine, "_scale", lambda *_: nth(10))
    elif scenario == "mid-save":  # the state of step 8 is half written
        original = LocalStore._write
        def torn(store, blocks, target):
            def halved():
                for block in blocks:
                    yield block[: len(block) // 2]
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(store, halved() if "step-000008/state" in str(target) else blocks, target)
        LocalStore._write = torn
    elif scenario == "mid-upload":  # one file of step 8 has arrived
        before(LocalStore, "put_blocks", lambda store, key, *_: "step-000008" in key and nth(2))
    elif scenario == "before-manifest":  # all files of step 8 have arrived
        before(LocalStore, "put_if_absent", lambda store, key, *_: "step-000008" in key)
    elif scenario == "before-latest":  # step 8 is committed, and nobody was told
        before(LocalStore, "put_bytes", lambda store, key, *_: key.endswith("latest") and nth(2))
    elif scenario == "mid-export":  # all is trained, the product is not committed
        before(LocalStore, "put_if_absent", lambda store, key, *_: key.endswith("distill/manifest.json"))
    elif scenario == "sigterm":
        before(Engine, "_scale", lambda *_: nth(10), signal.SIGTERM)

codes = {}
for scenario, path in json.loads(sys.argv[1]).items():
    child = os.fork()
    if child == 0:
        arm(scenario)
        sys.argv[1] = path
        run_job(train.main, cooperative=True)
    codes[scenario] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def whole(training) -> list[tuple[int, float]]:
    job = training.job("distill", "never-killed", **SETTINGS)
    assert execute(train.main, job) == "done", training.ending(job)
    return training.curve(job)


@pytest.fixture(scope="module")
def attempts(training, job_python) -> dict[str, tuple[Job, int]]:
    """Scenario → a job whose first attempt ended that way, and the exit code of its process."""
    jobs = {scenario: training.job("distill", f"killed-{scenario}", **SETTINGS) for scenario in SCENARIOS}
    paths = json.dumps({scenario: str(job.scratch / "job.json") for scenario, job in jobs.items()})
    codes = json.loads(job_python.run("-c", DRIVER, paths).splitlines()[-1])
    return {scenario: (job, codes[scenario]) for scenario, job in jobs.items()}


@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name != "sigterm"])
def test_killed_with_9_the_next_attempt_gives_the_same_curve(training, whole, attempts, scenario):
    job, code = attempts[scenario]
    assert code == -9
    assert SCENARIOS[scenario] <= len(training.curve(job)) <= 20
    assert not (job.scratch / "exit.json").exists()
    assert job.store.read_manifest(job.output_prefix) is None

    again = Job(spec=job.spec)
    assert execute(train.main, again) == "done", training.ending(job)
    assert training.curve(job) == whole
    assert again.store.read_manifest(job.output_prefix) is not None


def test_sigterm_saves_after_the_step_and_exits_as_preempted(training, whole, attempts):
    job, code = attempts["sigterm"]
    assert code == 75
    assert training.ending(job)["reason"] == "preempted"
    stopped_at = len(training.curve(job))
    assert stopped_at in (10, 11)
    assert f"step-{stopped_at:06d}" in job.store.get_bytes(f"{job.output_prefix}/checkpoints/latest").decode()
    assert execute(train.main, Job(spec=job.spec)) == "done"
    assert training.curve(job) == whole
