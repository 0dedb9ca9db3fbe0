"""Command lines as text, endings as errors, and a real process behind the seam."""

import base64
import json
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources, JobSpec, StoreRef
from radlads.tasks.contracts.recipe.recipe import Resources
from radlads.tasks.launchers import local as launching
from radlads.tasks.launchers.devices import count_gpus, resolve_resources
from radlads.tasks.launchers.local import (
    JobCrashed,
    JobFailed,
    JobPreempted,
    Meeting,
    Progress,
    check_ending,
    job_environment,
    kernel_cache,
    launch,
    render_command,
    run_process,
)
from radlads.tasks.launchers.progress import Watcher
from radlads.tasks.launchers.remote import part

CPU = JobResources(device="cpu", processes=2, threads=3)
WORLD = base64.urlsafe_b64encode(b'{"localhost": ["0", "1"]}').decode()
LAUNCHER = (
    f"PYTHON -u -m radlads.tasks.jobs.train.engines.ranks --no_local_rank --world_info={WORLD} "
    "--master_addr=127.0.0.1 --master_port=29511"
)


def job(stage="align", scratch="/work", spec=None, resources=CPU):
    return JobSpec(
        stage=stage, run="r", recipe="x", digest="d", spec=spec or {}, output_uri="/store/runs/r/align",
        store=StoreRef(uri="/store"), resources=resources, scratch=str(scratch),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "spec", "line"),
    [
        ("plan", {}, "PYTHON -m radlads.tasks.jobs.plan.plan /work/job.json"),
        ("tokenize", {}, "PYTHON -m radlads.tasks.jobs.data.tokens /work/job.json"),
        (
            "tokenize", {"dataset": {"sources": [{"kind": "files"}, {"kind": "sample"}]}},
            f"{LAUNCHER} --module radlads.tasks.jobs.data.tokens /work/job.json",
        ),
        ("transplant", {}, "PYTHON -m radlads.tasks.jobs.transplant /work/job.json"),
        ("publish", {}, "PYTHON -m radlads.tasks.jobs.report.publish /work/job.json"),
        *(
            (stage, {}, f"{LAUNCHER} --module radlads.tasks.jobs.{module} /work/job.json")
            for stage, module in [
                ("pretrain", "train.train"), ("align", "train.train"), ("distill", "train.train"),
                ("finetune", "train.train"),
                ("evaluate", "judge.evaluate"), ("needle", "judge.needle"),
            ]
        ),
    ],
)  # fmt: skip
def test_command_lines(stage, spec, line):
    command = render_command(job(stage, spec=spec), Path("/work/job.json"), port=29511)
    assert " ".join(command).replace(sys.executable, "PYTHON") == line


def test_environment():
    base = {
        "PATH": "/bin", "HOME": "/h", "HF_TOKEN": "t", "AWS_ACCESS_KEY_ID": "k", "PREFECT_API_KEY": "secret",
        "RANK": "3", "PYTHONPATH": "/flows",
    }  # fmt: skip
    env = job_environment(base, CPU)
    assert env["PATH"] == f"{Path(sys.executable).parent}:/bin"
    assert env["OMP_NUM_THREADS"] == "3"
    assert env["DS_ACCELERATOR"] == "cpu"
    assert env["PYTHONSAFEPATH"] == "1"
    assert env["HF_TOKEN"] == "t"
    assert env["AWS_ACCESS_KEY_ID"] == "k"
    assert not {"PREFECT_API_KEY", "RANK", "PYTHONPATH"} & set(env)
    on_gpu = CPU.model_copy(update={"device": "cuda"})
    assert "DS_ACCELERATOR" not in job_environment(base, on_gpu)
    assert job_environment(base, on_gpu)["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    own = base | {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}
    assert "PYTORCH_CUDA_ALLOC_CONF" not in job_environment(own, on_gpu)
    graphs = on_gpu.model_copy(update={"cuda_graphs": "on"})
    assert "PYTORCH_CUDA_ALLOC_CONF" not in job_environment(base, graphs)


@pytest.mark.parametrize(
    ("code", "ending", "error", "words"),
    [
        (2, {"reason": "config", "message": "teacher: no such folder"}, JobFailed, "align: teacher: no such folder"),
        (3, {"reason": "out-of-memory", "message": "lower micro_batch"}, JobFailed, "lower micro_batch"),
        (4, {"reason": "nonfinite", "message": "loss is NaN at step 3"}, JobFailed, "step 3"),
        (6, {"reason": "watch", "message": "step 3: loss spike"}, JobFailed, "step 3: loss spike"),
        (143, {"reason": "preempted", "message": ""}, JobPreempted, "newest checkpoint"),
        (1, {"reason": "crash", "message": "KeyError: 'x'"}, JobCrashed, "KeyError: 'x'"),
        (247, None, JobCrashed, r"exit code 247 \(SIGKILL, as when the machine runs out of memory\)"),
        (139, None, JobCrashed, r"SIGSEGV"),
        (1, None, JobCrashed, "exit code 1 and gave no reason"),
        (0, None, JobCrashed, "exit code 0 and gave no reason"),
        (1, {"reason": "done", "message": ""}, JobCrashed, "exit code 1"),
    ],
)
def test_endings(tmp_path, code, ending, error, words):
    log = tmp_path / "log.txt"
    log.write_text("older attempt\n" + "".join(f"line {n}\n" for n in range(40)))
    with pytest.raises(error, match=words) as raised:
        check_ending("align", code, ending, log, len("older attempt\n"))
    assert isinstance(raised.value, UserError) == (error is JobFailed)
    if error is JobCrashed:
        assert "line 39" in str(raised.value)
        assert "older attempt" not in str(raised.value)


def test_a_good_end_is_silent(tmp_path):
    check_ending("align", 0, {"reason": "done"}, tmp_path / "none", 0)


def fake_program(monkeypatch, tmp_path, text):
    (tmp_path / "program.py").write_text(textwrap.dedent(text))
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "job.json")]
    monkeypatch.setattr(launching, "render_command", lambda *_, **__: command)


def test_launch_runs_the_job_in_its_scratch(tmp_path, monkeypatch):
    fake_program(monkeypatch, tmp_path, """
        import json, os, sys, time
        spec = json.load(open(sys.argv[1]))
        assert os.getcwd() == spec["scratch"] and not os.path.exists("exit.json")
        row, event = '{"step": 7, "time": 1, "loss": 0.5, "bad": null}', '{"step": 7, "time": 2, "event": {"to": 1}}'
        open("metrics.jsonl", "w").write(row + "\\n" + event + "\\n" + '{"torn')
        open("progress.json", "w").write('{"done": 7, "total": 10, "unit": "steps", "events": ["a spike"]}')
        time.sleep(1.5)
        open("progress.json", "w").write('{"done": 10, "total": 10, "unit": "steps"}')
        print("hello")
        open("exit.json", "w").write('{"reason": "done", "message": ""}')
    """)  # fmt: skip
    (tmp_path / "exit.json").write_text('{"reason": "crash"}')
    seen = []
    launch(job(scratch=tmp_path), on_progress=seen.append)
    assert seen == [
        Progress(done, 10, "steps", {"step": 7, "loss": 0.5}, events) for done, events in ((7, ("a spike",)), (10, ()))
    ]
    first, *rest = (tmp_path / "log.txt").read_text().splitlines()
    assert first.startswith("=== attempt 20")
    assert rest == ["hello"]
    assert JobSpec.model_validate_json((tmp_path / "job.json").read_text()) == job(scratch=tmp_path)


def test_death_by_signal_behind_exit_zero_is_a_failure(tmp_path, monkeypatch):
    """DeepSpeed's runner returns 0 when its launcher dies by a signal."""
    fake_program(monkeypatch, tmp_path, """
        import subprocess, sys
        subprocess.run([sys.executable, "-c", "import os; print('boom', flush=True); os.kill(os.getpid(), 9)"])
        sys.exit(0)
    """)  # fmt: skip
    with pytest.raises(JobCrashed, match="boom"):
        launch(job(scratch=tmp_path))


def test_an_error_in_the_flow_stops_the_job(tmp_path):
    class Cancelled(BaseException):
        pass

    def tick():
        if (tmp_path / "pid").exists():
            raise Cancelled

    with pytest.raises(Cancelled):
        run_process(
            ["sh", "-c", f"echo $$ > {tmp_path}/pid; sleep 1000"], env={"PATH": "/bin:/usr/bin"}, cwd=tmp_path,
            log=tmp_path / "log.txt", on_tick=tick, grace_seconds=5,
        )  # fmt: skip
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_two_jobs_at_once_in_threads(tmp_path):
    codes = {}

    def one(number):
        codes[number] = run_process(
            ["sh", "-c", f"exit {number}"], env={"PATH": "/bin"}, cwd=tmp_path, log=tmp_path / f"log{number}",
            on_tick=lambda: None, grace_seconds=1,
        )  # fmt: skip

    threads = [threading.Thread(target=one, args=(number,)) for number in (0, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == {0: 0, 5: 5}


@pytest.mark.parametrize(
    ("visible", "count"), [("", 0), ("0", 1), ("0,1, 2", 3), ("-1", 0), ("0,-1,1", 1), ("GPU-abc,MIG-def", 2)]
)
def test_visible_devices(visible, count):
    assert count_gpus(visible) == count


def test_resources():
    def resolve(num_gpus=0, **wanted):
        return resolve_resources(Resources(**wanted), num_gpus=num_gpus, num_cores=8)

    assert resolve() == JobResources(device="cpu", processes=1, threads=8)
    assert resolve(num_gpus=4) == JobResources(device="cuda", processes=4, threads=2)
    assert resolve(num_gpus=4, processes=2, threads=1, zero_stage=2).processes == 2
    assert resolve(num_gpus=4, device="cpu", processes=2) == JobResources(device="cpu", processes=2, threads=4)
    with pytest.raises(UserError, match="has no visible GPU"):
        resolve(device="cuda")
    with pytest.raises(UserError, match="has 1 visible GPU"):
        resolve(num_gpus=1, processes=2)


def test_progress_of_a_job_that_writes_nonsense(tmp_path):
    (tmp_path / "progress.json").write_text("{")
    watcher = Watcher(tmp_path, lambda progress: pytest.fail("reported"))
    watcher.look()
    (tmp_path / "progress.json").write_text(json.dumps([1]))
    watcher.look()


def test_gpus_that_are_visible_are_the_ones_used():
    gpus = JobResources(device="cuda", processes=2, threads=1)
    command = render_command(job(resources=gpus), Path("/work/job.json"), port=1, visible="3,GPU-ab,5")
    world = next(part.removeprefix("--world_info=") for part in command if part.startswith("--world_info="))
    assert json.loads(base64.urlsafe_b64decode(world)) == {"localhost": ["3", "GPU-ab"]}


@pytest.mark.slow
def test_a_launched_job_in_a_checkout_whose_path_has_a_space(tmp_path, monkeypatch):
    """DeepSpeed's launcher, a rank of it, and its reason all the way back."""
    checkout = tmp_path / "my checkout é"
    checkout.mkdir()
    (checkout / "venv").symlink_to(Path(sys.executable).parent.parent, target_is_directory=True)
    monkeypatch.setattr(sys, "executable", str(checkout / "venv" / "bin" / "python"))
    resources = JobResources(device="cpu", processes=1, threads=1)
    asked = job(scratch=checkout / "work", resources=resources, spec={"section": 1})
    with pytest.raises(JobFailed, match=r"align: job\.json: spec: objective: Field required"):
        launch(asked)
    log = (checkout / "work" / "log.txt").read_text()
    assert f"spawned with command: ['{checkout}/venv/bin/python', '-u', '-m', 'radlads.tasks.jobs.train.train'" in log


def test_a_job_that_cannot_be_started_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "render_command", lambda *_, **__: [str(tmp_path / "no such program")])
    with pytest.raises(JobCrashed, match="no such program: No such file or directory"):
        launch(job(scratch=tmp_path))


def test_a_supervisor_that_does_not_start_says_why(tmp_path, monkeypatch):
    fake_program(monkeypatch, tmp_path, "")
    monkeypatch.setattr(launching, "_SUPERVISOR", "radlads.tasks.none_such")
    with pytest.raises(JobCrashed, match="No module named"):
        launch(job(scratch=tmp_path))


def test_compiled_kernels_stay_in_the_work_folder():
    assert kernel_cache(job()) == {}
    spec = job().model_copy(update={"content_cache": "/work/content.json"})
    assert kernel_cache(spec) == {"TRITON_CACHE_DIR": "/work/triton"}


def test_compiled_kernels_stay_in_the_work_folder_of_each_host(tmp_path, monkeypatch):
    spec = job(scratch=tmp_path / "host-b").model_copy(update={"content_cache": str(tmp_path / "content-host-b.json")})
    seen = {}
    monkeypatch.setattr(part, "run_process", lambda command, *, env, **options: seen.update(env) or 0)
    meeting = Meeting("10.0.0.1", 29500, (1, 1), 1, "eth0")
    part.HostPart(spec, meeting, {"PATH": "/bin"}, threads=1).run(lambda: None, 1.0)
    assert seen["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
    own = {"PATH": "/bin", "TRITON_CACHE_DIR": "/own"}
    part.HostPart(spec, meeting, own, threads=1).run(lambda: None, 1.0)
    assert seen["TRITON_CACHE_DIR"] == "/own"
