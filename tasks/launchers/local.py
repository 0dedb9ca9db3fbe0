"""Starts, monitors and stops a job's process, and reports how it ended. Only this module reads the environment."""

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
from dataclasses import dataclass
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
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.launchers.devices import count_cores, count_gpus, resolve_resources, visible_gpus
from radlads.tasks.launchers.gpu_lock import hold_gpus
from radlads.tasks.launchers.launcher import JobCrashed, JobFailed, JobPreempted, Launcher
from radlads.tasks.launchers.progress import Progress, Watcher, log_end, read_json
from radlads.tasks.launchers.stopping import REQUEST, Stopper

_log = logging.getLogger(__name__)
FINAL = {"config", "out-of-memory", "disk-full", "nonfinite", "watch"}
"""Reasons of exit.json that a retry does not change."""
_DISK_FULL = 5
"""The exit code of a job that ran out of disk space, perhaps even for exit.json."""
ATTEMPT = "=== attempt"
"""Start of the first line that every attempt writes to the log."""
LOOPBACK = "127.0.0.1"
_LEFTOVER_SECONDS = 10.0
_SUPERVISOR = "radlads.tasks.launchers.supervise"
_RANKS = "radlads.tasks.jobs.train.engines.ranks"


class LocalLauncher(Launcher):
    """Jobs are processes of this machine, each under a supervisor, which ends its job if this process dies."""

    def run(
        self, spec: JobSpec, *, on_progress: Callable[[Progress], None] | None = None, grace_seconds: float = 60.0
    ) -> None:
        """As `launch`."""
        launch(spec, on_progress=on_progress, grace_seconds=grace_seconds)

    def resources(self, requested: Resources) -> JobResources:
        """Resolve a recipe's resources for this machine. Raises UserError if they exceed it."""
        num_gpus = count_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
        return resolve_resources(requested, num_gpus=num_gpus, num_cores=count_cores())

    def check(self, store: Store, work: Path) -> None:
        """Jobs see what this process sees."""

    def hold_devices(self, resources: JobResources, purpose: str) -> AbstractContextManager[None]:
        """Wait for exclusive use of the GPUs that a job computes on; does nothing for a job on the CPU."""
        if resources.device == "cpu":
            return nullcontext()
        return hold_gpus(resources.processes, os.environ.get("CUDA_VISIBLE_DEVICES"), purpose)


def launch(
    spec: JobSpec, *, on_progress: Callable[[Progress], None] | None = None, grace_seconds: float = 60.0
) -> None:
    """Run a job to its end in its scratch folder. The caller checks that the product exists.

    on_progress: called about once a second while there is new progress. grace_seconds: time for a stopped job to save a
    checkpoint. Raises JobFailed (final), JobPreempted or JobCrashed (can be retried), RunStopped.
    """
    scratch = Path(spec.scratch)
    job, job_json = job_id(scratch), scratch / "job.json"
    command = render_command(spec, job_json, port=free_port(), visible=os.environ.get("CUDA_VISIBLE_DEVICES"))

    def work(log: Path, on_tick: Callable[[], None]) -> int:
        return run_process(
            command,
            env=kernel_cache(spec) | job_environment(os.environ, spec.resources) | {MARK: new_mark(job)},
            cwd=scratch,
            log=log,
            on_tick=on_tick,
            grace_seconds=grace_seconds,
        )

    REQUEST.check()
    _end_former_attempts(spec.stage, job, scratch, grace_seconds)
    attempt(spec, " ".join(command), on_progress, work)


def attempt(
    spec: JobSpec,
    how: str,
    on_progress: Callable[[Progress], None] | None,
    work: Callable[[Path, Callable[[], None]], int],
) -> None:
    """One attempt at a job, wherever it runs. how: it is started, for the log. work: (log, on_tick) → exit code; it
    runs the job, calls on_tick about once a second, and leaves exit.json, metrics.jsonl and the log's new lines in the
    scratch folder. Raises as `launch`."""
    REQUEST.check()
    scratch = Path(spec.scratch)
    private_folder(scratch)
    for stale in ("exit.json", "progress.json"):
        (scratch / stale).unlink(missing_ok=True)
    write_private(scratch / "job.json", spec.model_dump_json(indent=1))
    log = scratch / "log.txt"
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"{ATTEMPT} {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC: {how}\n")
    begin = log.stat().st_size
    watcher = Watcher(scratch, on_progress)
    code = work(log, watcher.look)
    watcher.look()
    ending = read_json(scratch / "exit.json")
    if REQUEST.asked_at is not None and (ending or {}).get("reason") != "done":
        REQUEST.where.append(_where(spec.stage, watcher.last, (ending or {}).get("reason") == "preempted"))
        REQUEST.check()
    check_ending(spec.stage, code, ending, log, begin)


def _where(stage: str, last: Progress | None, orderly: bool) -> str:
    at = f" at {last.done:,.0f} of {last.total:,.0f} {last.unit}" if last is not None else ""
    return f"{stage}{at}" if orderly else f"{stage}{at}, killed before it could save that"


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of a job on several hosts meet. address, port: of the first host. slots: the number of ranks of
    each host. node: which of the hosts this one is. interface: the network interface of this host's ranks."""

    address: str
    port: int
    slots: tuple[int, ...]
    node: int
    interface: str


def render_command(
    spec: JobSpec, job_json: Path, *, port: int, visible: str | None = None, meeting: Meeting | None = None
) -> list[str]:
    """The command line of a job, or of one host's part in it. port: a free port for the rendezvous of the ranks, where
    meeting names none. visible: CUDA_VISIBLE_DEVICES, of which a job uses the first.

    Programs are started as modules of this interpreter: the shebang line of an installed script cannot contain a path
    with a space. DeepSpeed's runner is not used: on one machine it only starts the launcher, ignores which GPUs are
    visible, and returns 0 if the launcher dies by a signal.
    """
    module = f"radlads.tasks.jobs.{stage_info(spec.stage).program}"
    if not has_ranks(spec):
        return [sys.executable, "-m", module, str(job_json)]
    meeting = meeting or Meeting(LOOPBACK, port, (spec.resources.processes,), 0, "lo")
    devices = [str(rank) for rank in range(meeting.slots[meeting.node])]
    if spec.resources.device == "cuda":
        devices = list(visible_gpus(visible) or devices)[: len(devices)]
    names = [f"host{node}" for node in range(len(meeting.slots))] if len(meeting.slots) > 1 else ["localhost"]
    hosts = {name: [str(rank) for rank in range(count)] for name, count in zip(names, meeting.slots, strict=True)}
    world = base64.urlsafe_b64encode(json.dumps(hosts | {names[meeting.node]: devices}).encode()).decode()
    launcher = [sys.executable, "-u", "-m", _RANKS, "--no_local_rank", f"--world_info={world}"]
    node = [f"--node_rank={meeting.node}"] if len(names) > 1 else []
    where = [f"--master_addr={meeting.address}", f"--master_port={meeting.port}"]
    return [*launcher, *node, *where, "--module", module, str(job_json)]


def has_ranks(spec: JobSpec) -> bool:
    """Whether a job is started as ranks, one a device: a distributed stage, or tokenizing that samples a teacher."""
    sources = spec.spec.get("dataset", {}).get("sources", ()) if spec.stage == TOKENIZE.name else ()
    return stage_info(spec.stage).distributed or any(source.get("kind") == "sample" for source in sources)


def job_environment(base: Mapping[str, str], resources: JobResources, interface: str = "lo") -> dict[str, str]:
    """The environment of a job: this process's, without the orchestrator's variables or any that change results.

    interface: the network interface of the ranks."""
    dropped = ("PREFECT_", "RADLADS_")
    ranks = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH"}
    env = {key: value for key, value in base.items() if not key.startswith(dropped) and key not in ranks}
    # Kernel compilers call ninja by name; in a virtual environment that is not activated it is found only here.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), base.get("PATH", os.defpath)])
    env |= child_environment()
    # By default the ranks listen on every interface. "=": the name in full, where NCCL would match its beginning.
    env.setdefault("GLOO_SOCKET_IFNAME", interface)
    env.setdefault("NCCL_SOCKET_IFNAME", "lo" if interface == "lo" else f"={interface}")
    env |= {
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(resources.threads),
        "TOKENIZERS_PARALLELISM": "false",
        # The harness's bootstrap forks the job, and waits for ever for a child that takes SIGTERM as the job does.
        "DISABLE_MULTIPROC": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
    }
    if resources.device == "cpu":
        env["DS_ACCELERATOR"] = "cpu"
        # glibc returns large tensors to the kernel at every free and faults them in again at every use, which makes
        # training on a CPU take 1.5 times as long. Keep the pages; the peak is the same.
        env |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    elif resources.cuda_graphs == "off" and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & env.keys():
        # Else memory is lost between blocks of other sizes, and passes near the limit give memory back and ask again.
        # With graphs, which have memory of their own, it was not tried.
        env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return env


def kernel_cache(spec: JobSpec) -> dict[str, str]:
    """The folder of compiled Triton kernels, unless the user has set one: in the work folder, so that all stages and
    attempts share it wherever the home folder is."""
    return {"TRITON_CACHE_DIR": str(Path(spec.content_cache).parent / "triton")} if spec.content_cache else {}


def run_process(
    command: list[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    log: Path,
    on_tick: Callable[[], None],
    grace_seconds: float,
) -> int:
    """Run a command under the supervisor until it ends; returns its exit code. Tests replace this function.

    on_tick is called about once a second. A user's stop request (stopping.py) is passed on to the command. Any
    exception here, for example from a cancelled flow, first stops the command and its descendants.
    """
    supervisor = [sys.executable, "-m", _SUPERVISOR, "--parent", str(os.getpid())]
    options = ["--grace", str(grace_seconds), "--log", str(log), "--"]
    # A session of its own: Ctrl-C and signals to the flow's process group must reach the job through this process only.
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
    """End the processes of earlier attempts: otherwise two trainings would write the same files."""
    try:
        ended = end_leftovers(job, seconds=grace_seconds + _LEFTOVER_SECONDS)
    except BlockingIOError as error:
        raise JobFailed(f"{stage}: {scratch} is in use: {error}; wait until it ends, or stop it") from None
    if ended:
        _log.warning("%s: ended %d processes of an earlier attempt in %s", stage, ended, scratch)


def check_ending(stage: str, code: int, ending: dict[str, Any] | None, log: Path, begin: int) -> None:
    """Raise the error that an exit code and exit.json report, if any. begin: byte offset of this attempt's log."""
    reason = (ending or {}).get("reason")
    message = str((ending or {}).get("message", ""))
    if code == 0 and reason == "done":
        return
    if reason in FINAL:
        raise JobFailed(f"{stage}: {message}")
    if code == _DISK_FULL and reason is None:
        raise JobFailed(f"{stage}: {describe_full(log.parent)}")
    if reason == "preempted":
        raise JobPreempted(f"{stage} was stopped before it finished; a retry continues from its newest checkpoint")
    what = message if reason == "crash" else f"ended with {describe_code(code)} and gave no reason"
    tail = "\n".join(log_end(log, begin))
    raise JobCrashed(f"{stage} crashed: {what}\nThe end of {log}:\n{tail}")


def describe_code(code: int) -> str:
    """ "exit code 137 (SIGKILL, as when the machine runs out of memory)" """
    # DeepSpeed's launcher returns a rank's negative code as one byte; other launchers add 128 to the signal.
    number = 256 - code if code > 192 else code - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"exit code {code}"
    hint = ", as when the machine runs out of memory" if name == "SIGKILL" else ""
    return f"exit code {code} ({name}{hint})"


def free_port(address: str = LOOPBACK) -> int:
    """A port of an address of this machine that nobody listens on now."""
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        return int(probe.getsockname()[1])
