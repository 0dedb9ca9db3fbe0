"""Jobs of a Slurm cluster: two nodes of Debian's own slurmctld and slurmd on this machine.

`make drill` cancels, requeues and kills; here is one job, and what is refused before it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources, StoreRef
from radlads.tasks.contracts.locks.lease import LeaseLost, product_lease
from radlads.tasks.contracts.recipe.recipe import Rate, Resources
from radlads.tasks.contracts.store.open import open_store
from radlads.tasks.jobs.common import execute
from radlads.tasks.jobs.train import train
from radlads.tasks.launchers.registry import find_launcher
from radlads.tasks.launchers.remote.slurm_commands import State, render_script, state_of

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import slurm_lab  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))
NEEDS_SLURM = pytest.mark.skipif(bool(slurm_lab.why_no_slurm()), reason=str(slurm_lab.why_no_slurm()))
SETTINGS = {
    "mixer_rate": Rate(start=3e-3, final=1e-3),
    "rest_rate": Rate(start=1e-3, final=1e-4),
    "tokens": 4 * 128,
    "checkpoint_every": 3,
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_lab.slurm_cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


@pytest.fixture
def in_cluster(cluster, monkeypatch):
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)


def asked(**slurm) -> Resources:
    return Resources(launcher="slurm", device="cpu", threads=1, slurm={"nodes": 2} | slurm)


@NEEDS_SLURM
@pytest.mark.slow
def test_two_nodes_train_as_one_process_does(training, in_cluster):
    alone = training.job("distill", "before-slurm", **SETTINGS)
    assert execute(train.main, alone) == "done", training.ending(alone)
    job = training.job("distill", "slurm", resources={"processes": 2}, **SETTINGS | {"micro_batch": 1})
    seen = []
    find_launcher(asked()).run(job.spec, on_progress=seen.append, grace_seconds=10)
    assert training.ending(job)["reason"] == "done"
    assert (seen[-1].done, seen[-1].unit) == (4, "steps")
    one, two = training.curve(alone), training.curve(job)
    assert [step for step, _ in two] == [step for step, _ in one] == [1, 2, 3, 4]
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-4)
    log = (job.scratch / "log.txt").read_text()
    assert f"as Slurm job radlads-distill-{job.spec.digest[:12]}" in log
    assert "INFO distill[0] step 4/4" in log
    assert "nnodes=2" in (job.scratch / "node-1" / "log.txt").read_text()
    assert not list(job.scratch.glob("host-*"))


@NEEDS_SLURM
def test_what_slurm_refuses_is_said_before_a_job_is_submitted(tmp_path, in_cluster, caplog):
    store = open_store(training_store(tmp_path))
    find_launcher(asked(time="1:00:00", extra=("--exclusive",))).check(store, tmp_path)
    assert "this Slurm keeps no accounting" in caplog.text
    for words, resources in {
        r"Slurm refuses the job: .*[Ii]nvalid partition name": asked(partition="nope"),
        r"Slurm refuses the job: .*node configuration is not available": asked(nodes=7),
    }.items():
        with pytest.raises(UserError, match=words) as raised:
            find_launcher(resources).check(store, tmp_path)
        assert len(str(raised.value).splitlines()) == 1
    assert state_of("99999") == State("GONE")


def training_store(folder: Path) -> StoreRef:
    return StoreRef(uri=str(folder / "store"))


def test_without_slurm_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"there is no `scontrol` on this machine: launcher `slurm` needs"):
        find_launcher(asked()).check(open_store(training_store(tmp_path)), tmp_path)


def test_a_controller_that_is_away_is_named(tmp_path, monkeypatch):
    fake = tmp_path / "scontrol"
    fake.write_text("#!/bin/sh\necho 'slurm_load_ctl_conf error: Unable to contact slurm controller' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(UserError, match=r"Slurm cannot be reached: .*Unable to contact slurm controller"):
        find_launcher(asked()).check(open_store(training_store(tmp_path)), tmp_path)


def test_a_job_that_slurmctld_has_forgotten_is_looked_up_in_the_accounting(tmp_path, monkeypatch):
    for name, text in {
        "scontrol": "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
        "sacct": "echo 'CANCELLED by 1000|0:15'",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert state_of("7") == State("CANCELLED", exit_code="0:15")


def test_the_batch_script(training):
    job = training.job("distill", "script", resources={"device": "cuda", "processes": 16})
    resources = Resources(
        launcher="slurm", gpu_memory_gib=80, remote={"python": "/opt/it's/python"},
        slurm={
            "nodes": 2, "gpus_per_node": 8, "cpus_per_node": 64, "partition": "gpu", "account": "a", "qos": "high",
            "time": "1-12", "extra": ["--constraint=h100", "--exclusive"],
        },
    )  # fmt: skip
    script = render_script(job.spec, resources.slurm, resources.remote, grace_seconds=60)
    head = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert head == [
        f"job-name=radlads-distill-{job.spec.digest[:12]}", "nodes=2", "ntasks-per-node=1", "gpus-per-node=8",
        "cpus-per-task=64", "partition=gpu", "account=a", "qos=high", "time=1-12", "output=slurm-%j.out",
        "open-mode=append", "signal=B:USR1@90", "requeue", "constraint=h100", "exclusive",
    ]  # fmt: skip
    assert "srun --kill-on-bad-exit=1 --cpus-per-task=64 '/opt/it'\\''s/python' -P -m radlads" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert find_launcher(resources).resources(resources) == JobResources(
        device="cuda", processes=16, threads=1, gpu_memory_gib=80
    )


@pytest.mark.parametrize(
    "slurm",
    [
        {"partition": "a b"}, {"account": "$(id)"}, {"qos": "x\ny"}, {"time": "1; id"}, {"extra": ["--a=b c"]},
        {"extra": ["--a=`id`"]}, {"extra": ["-p x"]}, {"extra": ["--a\n#SBATCH --b"]}, {"nodes": 0},
    ],
)  # fmt: skip
def test_what_could_be_more_than_a_word_is_refused(slurm):
    with pytest.raises(ValueError, match=re.escape(f"slurm.{next(iter(slurm))}")):
        asked(**slurm)


def test_options_of_the_launcher_are_refused_among_the_extra_ones():
    with pytest.raises(UserError, match=r"resources\.slurm\.extra: --output is set by the launcher"):
        find_launcher(asked(extra=("--output=x",)))


def test_a_job_follows_the_lease_of_the_flow_that_adopts_it_and_no_other(training):
    """The first flow has died; another one has the lease now."""
    job = training.job("distill", "adopted", **SETTINGS)
    with product_lease(job.store, "distill", job.spec.digest, job.scratch) as first:
        pass
    job.spec = job.spec.model_copy(update={"lease": first.ref})
    file = job.scratch / "job.json"
    file.write_text(job.spec.model_dump_json())
    with product_lease(job.store, "distill", job.spec.digest, job.scratch) as second:
        with pytest.raises(LeaseLost):
            job.confirm_lease()
        file.write_text(job.spec.model_copy(update={"lease": second.ref}).model_dump_json())
        job.confirm_lease()
        assert job.spec.lease == second.ref
    with product_lease(job.store, "distill", job.spec.digest, job.scratch), pytest.raises(LeaseLost):
        job.confirm_lease()
