"""Starts a job's process, watches it, stops it, and says how it ended. The one place that reads the environment."""

from __future__ import annotations

import base64
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from radlads.tasks.contracts.disk import describe_full
from radlads.tasks.contracts.job import JobResources, JobSpec
from radlads.tasks.contracts.parsing.credentials import child_environment
from radlads.tasks.contracts.parsing.files import private_folder, write_private
from radlads.tasks.contracts.process_tree import MARK, end_leftovers, job_id, new_mark
from radlads.tasks.contracts.recipe.recipe import Resources
from radlads.tasks.contracts.stages import TOKENIZE, stage_info
from radlads.tasks.launchers.devices import count_cores, count_gpus, resolve_resources, visible_gpus
from radlads.tasks.launchers.gpu_lock import hold_gpus
from radlads.tasks.launchers.launcher import JobCrashed, JobFailed, JobPreempted, Launcher
from radlads.tasks.launchers.progress import Progress, Watcher, log_end, read_json
from radlads.tasks.launchers.stopping import REQUEST, Stopper

_log = logging.getLogger(__name__)
_FINAL = {"config", "out-of-memory", "disk-full", "nonfinite"}
_DISK_FULL = 5
"""The exit code of a job that found no room, perhaps not even for exit.json."""
ATTEMPT = "=== attempt"
"""How the log of every attempt at a stage begins."""
_LEFTOVER_SECONDS = 10.0
_SUPERVISOR = "radlads.tasks.launchers.supervise"


class LocalLauncher(Launcher):
    """Jobs are processes of this machine, each under a supervisor that outlives this process only to end it."""

    def run(
        self, spec: JobSpec, *, on_progress: Callable[[Progress], None] | None = None, grace_seconds: float = 60.0
    ) -> None:
        """As `launch`."""
        launch(spec, on_progress=on_progress, grace_seconds=grace_seconds)

    def resources(self, asked: Resources) -> JobResources:
        """A recipe's resources on this machine. Raises UserError for more than it has."""
        num_gpus = count_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
        return resolve_resources(asked, num_gpus=num_gpus, num_cores=count_cores())

    def hold_devices(self, resources: JobResources, purpose: str) -> AbstractContextManager[None]:
        """Wait for the GPUs that a job computes on and have them alone; on a CPU there is nothing to wait for."""
        if resources.device == "cpu":
            return nullcontext()
        return hold_gpus(resources.processes, os.environ.get("CUDA_VISIBLE_DEVICES"), purpose)


def launch(
    spec: JobSpec, *, on_progress: Callable[[Progress], None] | None = None, grace_seconds: float = 60.0
) -> None:
    """Run a job to its end in its scratch folder. Whether there is a product is for the caller to check.

    on_progress: called about once a second while there is something new. grace_seconds: what a job that is stopped
    gets to save a checkpoint. Raises JobFailed (final), JobPreempted or JobCrashed (may be tried again), RunStopped.
    """
    REQUEST.check()
    scratch = Path(spec.scratch)
    private_folder(scratch)
    for stale in ("exit.json", "progress.json"):
        (scratch / stale).unlink(missing_ok=True)
    job_json = scratch / "job.json"
    write_private(job_json, spec.model_dump_json(indent=1))
    log = scratch / "log.txt"
    command = render_command(spec, job_json, port=_free_port(), visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
    job = job_id(scratch)
    _end_former_attempts(spec.stage, job, scratch, grace_seconds)
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"{ATTEMPT} {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC: {' '.join(command)}\n")
    begin = log.stat().st_size
    watcher = Watcher(scratch, on_progress)
    code = run_process(
        command,
        env=job_environment(os.environ, spec.resources) | {MARK: new_mark(job)},
        cwd=scratch,
        log=log,
        on_tick=watcher.look,
        grace_seconds=grace_seconds,
    )
    watcher.look()
    ending = read_json(scratch / "exit.json")
    if REQUEST.asked_at is not None and (ending or {}).get("reason") != "done":
        REQUEST.where.append(_where(spec.stage, watcher.last, (ending or {}).get("reason") == "preempted"))
        REQUEST.check()
    check_ending(spec.stage, code, ending, log, begin)


def _where(stage: str, last: Progress | None, orderly: bool) -> str:
    at = f" at {last.done:,.0f} of {last.total:,.0f} {last.unit}" if last is not None else ""
    return f"{stage}{at}" if orderly else f"{stage}{at}, killed before it could save that"


def render_command(spec: JobSpec, job_json: Path, *, port: int, visible: str | None = None) -> list[str]:
    """The command line of a job. port: free on this machine, for the ranks to meet. visible: CUDA_VISIBLE_DEVICES, of
    which a job takes the first ones.

    Everything is a module of this interpreter: a script beside it names its interpreter in a first line that cannot
    hold a space. DeepSpeed's runner is left out: for one machine it only starts the launcher, ignoring which GPUs are
    visible, and returns 0 when that one dies by a signal.
    """
    stage = stage_info(spec.stage)
    module = f"radlads.tasks.jobs.{stage.program}"
    sources = spec.spec.get("dataset", {}).get("sources", ()) if stage.name == TOKENIZE.name else ()
    samples = any(source.get("kind") == "sample" for source in sources)
    if not stage.distributed and not samples:
        return [sys.executable, "-m", module, str(job_json)]
    devices = [str(rank) for rank in range(spec.resources.processes)]
    if spec.resources.device == "cuda":
        devices = list(visible_gpus(visible) or devices)[: spec.resources.processes]
    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    launcher = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--no_local_rank", f"--world_info={world}"]
    meeting = ["--master_addr=127.0.0.1", f"--master_port={port}"]
    return [*launcher, *meeting, "--module", module, str(job_json)]


def job_environment(base: Mapping[str, str], resources: JobResources) -> dict[str, str]:
    """The environment of a job: ours without the orchestrator's, and nothing that changes what is computed."""
    dropped = ("PREFECT_", "RADLADS_")
    ranks = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH"}
    env = {key: value for key, value in base.items() if not key.startswith(dropped) and key not in ranks}
    # Compilers of kernels call ninja by name; a virtual environment that is not activated has them only here.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), base.get("PATH", os.defpath)])
    env |= child_environment()
    for library in ("GLOO", "NCCL"):  # one machine's ranks; by default they listen where other machines reach them
        env.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    env |= {
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(resources.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
    }
    if resources.device == "cpu":
        env["DS_ACCELERATOR"] = "cpu"
        # glibc gives large tensors back to the kernel at every free and faults them in again at every use: training
        # on a CPU takes half as long again. Keep the pages; the peak is the same.
        env |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    return env


def run_process(
    command: list[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    log: Path,
    on_tick: Callable[[], None],
    grace_seconds: float,
) -> int:
    """Run a command under the supervisor until it ends; its exit code. The seam that tests replace.

    on_tick is called about once a second. A person's wish to stop (stopping.py) is passed on to the command. Whatever
    is raised in here, by a cancelled flow for one, stops the command and everything below it first.
    """
    supervisor = [sys.executable, "-m", _SUPERVISOR, "--parent", str(os.getpid())]
    options = ["--grace", str(grace_seconds), "--log", str(log), "--"]
    # A session of its own: Ctrl-C and whoever stops the flow's process group reach the job through us, in order.
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [*supervisor, *options, *command],
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    stopper = Stopper(lambda: process.send_signal(signal.SIGTERM))
    try:
        while True:
            try:
                return process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                on_tick()
                stopper.look()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait()


def _end_former_attempts(stage: str, job: str, scratch: Path, grace_seconds: float) -> None:
    """A retry beside what a former attempt left would train twice, into the same files."""
    try:
        ended = end_leftovers(job, seconds=grace_seconds + _LEFTOVER_SECONDS)
    except BlockingIOError as error:
        raise JobFailed(f"{stage}: {scratch} is in use: {error}; wait for its end, or stop it") from None
    if ended:
        _log.warning("%s: ended %d processes that a former attempt had left in %s", stage, ended, scratch)


def check_ending(stage: str, code: int, ending: dict[str, Any] | None, log: Path, begin: int) -> None:
    """Turn an exit code and exit.json into silence or the right error. begin: where this attempt's log starts."""
    reason = (ending or {}).get("reason")
    message = str((ending or {}).get("message", ""))
    if code == 0 and reason == "done":
        return
    if reason in _FINAL:
        raise JobFailed(f"{stage}: {message}")
    if code == _DISK_FULL and reason is None:
        raise JobFailed(f"{stage}: {describe_full(log.parent)}")
    if reason == "preempted":
        raise JobPreempted(f"{stage} was stopped before its end; a retry continues from its newest checkpoint")
    what = message if reason == "crash" else f"ended with {_describe(code)} and did not say why"
    tail = "\n".join(log_end(log, begin))
    raise JobCrashed(f"{stage} crashed: {what}\nThe end of {log}:\n{tail}")


def _describe(code: int) -> str:
    # DeepSpeed's launcher passes a rank's negative code on as one byte; a shell-like one adds 128 to the signal.
    number = 256 - code if code > 192 else code - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"exit code {code}"
    hint = ", as when the machine runs out of memory" if name == "SIGKILL" else ""
    return f"exit code {code} ({name}{hint})"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
