"""The commands of Slurm: what is asked of them, and what they answer."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobSpec
from radlads.tasks.contracts.parsing.document import one_line
from radlads.tasks.contracts.recipe.machines import Remote, Slurm
from radlads.tasks.launchers.remote.ssh import interpreter

NODE_PROGRAM = "radlads.tasks.launchers.remote.node"
NOT_SHARED = 97
"""Exit code of a batch script that does not find the job's folder."""
GONE = "GONE"
"""Of a job that Slurm does not know any more."""
_COMMAND_SECONDS = 60.0
_OUTAGE = re.compile(r"(?i)unable to contact|connection|timed out|socket|controller")
_OURS = (
    "job-name comment nodes ntasks ntasks-per-node gpus-per-node cpus-per-task chdir output error open-mode signal "
    "requeue no-requeue export export-file wrap array parsable partition account qos time uid gid get-user-env"
).split()


class SlurmOutage(Exception):  # noqa: N818 - named after what happened
    """slurmctld does not answer; jobs go on."""


@dataclass(frozen=True)
class State:
    """A job as Slurm sees it. name: RUNNING, CANCELLED, ... reason: why it waits or ended. restarts: how often it was
    requeued. folder: its working directory."""

    name: str
    reason: str = ""
    exit_code: str = ""
    restarts: int = 0
    folder: str = ""

    @property
    def is_over(self) -> bool:
        """Whether it will not run again."""
        going = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STAGE_OUT", "SIGNALING", "STOPPED")
        return self.name not in (*going, "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESIZING", "SPECIAL_EXIT")

    def describe(self) -> str:
        """ "TIMEOUT (TimeLimit), exit code 0:15" """
        why = f" ({self.reason})" if self.reason not in ("", "None") else ""
        code = f", exit code {self.exit_code}" if self.exit_code not in ("", "0:0") else ""
        return f"{self.name}{why}{code}"


def job_name(spec: JobSpec) -> str:
    """The name under which a product's job is found again."""
    return f"radlads-{spec.stage}-{spec.digest[:12]}"


def render_script(spec: JobSpec, slurm: Slurm, remote: Remote, *, grace_seconds: float) -> str:
    """The batch script: one task a node, which runs that node's part. Signal USR1, sent before the time limit and, if
    the cluster says so, at a preemption, becomes the file `stop`, which asks the parts for a checkpoint."""
    cuda = spec.resources.device == "cuda"
    asked: list[tuple[str, object]] = [
        ("job-name", job_name(spec)),
        ("nodes", slurm.nodes),
        ("ntasks-per-node", 1),
        ("gpus-per-node", slurm.gpus_per_node if cuda else None),
        ("cpus-per-task", slurm.cpus_per_node),
        ("partition", slurm.partition),
        ("account", slurm.account),
        ("qos", slurm.qos),
        ("time", slurm.time),
        ("output", "slurm-%j.out"),
        ("open-mode", "append"),
        ("signal", f"B:USR1@{int(grace_seconds) + 30}"),
    ]
    lines = [f"#SBATCH --{name}={value}" for name, value in asked if value is not None]
    cpus = f" --cpus-per-task={slurm.cpus_per_node}" if slurm.cpus_per_node else ""
    python = "'" + interpreter(remote).replace("'", "'\\''") + "'"
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "#SBATCH --requeue",
            *(f"#SBATCH {line}" for line in slurm.extra),
            f"[ -r job.json ] || exit {NOT_SHARED}",
            "rm -f stop",
            "trap 'touch stop' USR1",
            f"srun --kill-on-bad-exit=1{cpus} {python} -P -m {NODE_PROGRAM} &",
            "step=$!",
            "while :; do  # the trap ends a wait early",
            '    wait "$step"; code=$?',
            '    kill -0 "$step" 2>/dev/null || exit "$code"',
            "done",
            "",
        ]
    )


def check_extra(extra: Sequence[str]) -> None:
    """Raises UserError for an option that the launcher sets itself."""
    for line in extra:
        name = line.removeprefix("--").partition("=")[0]
        if name in _OURS:
            raise UserError(f"resources.slurm.extra: --{name} is set by the launcher or has a key of its own")


def submit(script: str, spec: JobSpec, environment: dict[str, str], *, test_only: bool = False) -> str:
    """Submit a batch script; returns the job's id. test_only: have Slurm only check it. Raises UserError with Slurm's
    reason, SlurmOutage."""
    mode = ["--test-only"] if test_only else ["--parsable", f"--chdir={spec.scratch}"]
    answer = _call(["sbatch", *mode, f"--comment={spec.output_uri}"], script=script, environment=environment)
    return answer.strip().partition(";")[0]


def find_job(spec: JobSpec) -> str | None:
    """The id of this user's job that makes a product of this store and has not ended; None if there is none. Raises
    SlurmOutage."""
    answer = _call(["squeue", "--me", "--noheader", "--format=%i|%k", f"--name={job_name(spec)}"])
    for line in answer.splitlines():
        number, _, comment = line.strip().partition("|")
        if comment == spec.output_uri:
            return number
    return None


def state_of(job: str) -> State:
    """A job's state: from slurmctld, which forgets jobs some minutes after their end; then from the accounting. Raises
    SlurmOutage."""
    try:
        answer = _call(["scontrol", "--oneliner", "show", "job", job])
    except UserError:
        return _accounted(job)
    fields = dict(re.findall(r"(?:^|\s)([A-Z][A-Za-z:/]*)=(.*?)(?=\s[A-Z][A-Za-z:/]*=|$)", answer.strip()))
    return State(
        fields.get("JobState", GONE),
        fields.get("Reason", ""),
        fields.get("ExitCode", ""),
        int(fields.get("Restarts", "0")),
        fields.get("WorkDir", ""),
    )


def _accounted(job: str) -> State:
    try:
        words = ["--allocations", "--noheader", "--parsable2", "--format=State,ExitCode"]
        answer = _call(["sacct", *words, f"--jobs={job}"])
    except UserError:  # no accounting
        return State(GONE)
    found = [line.split("|") for line in answer.splitlines() if "|" in line]
    return State(found[-1][0].split()[0], exit_code=found[-1][1]) if found else State(GONE)


def cancel(job: str) -> None:
    """End a job; it gets the cluster's KillWait. One that has ended is left alone. Raises SlurmOutage."""
    try:
        _call(["scancel", job])
    except UserError:
        return


def has_accounting() -> bool:
    """Whether this Slurm keeps records of ended jobs. Raises UserError if there is no Slurm, SlurmOutage."""
    answer = _call(["scontrol", "show", "config"])
    found = re.search(r"^AccountingStorageType\s*=\s*(\S+)", answer, re.MULTILINE)
    return found is not None and not found[1].endswith("/none")


def node_addresses(names: str) -> list[str]:
    """The addresses of nodes, in order. names: as in SLURM_JOB_NODELIST. Raises UserError, SlurmOutage."""
    addresses = []
    for name in _call(["scontrol", "show", "hostnames", names]).split():
        found = re.search(r"\bNodeAddr=(\S+)", _call(["scontrol", "--oneliner", "show", "node", name]))
        addresses.append(found[1] if found else name)
    return addresses


def _call(command: list[str], *, script: str | None = None, environment: dict[str, str] | None = None) -> str:
    """The answer of a command. Raises UserError, one line, if it refuses; SlurmOutage if slurmctld is not there."""
    try:
        done = subprocess.run(
            command,
            input=script,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise UserError(
            f"there is no `{command[0]}` on this machine: launcher `slurm` needs Slurm's commands where the flow runs"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmOutage(f"{command[0]} gave no answer within {_COMMAND_SECONDS:.0f} seconds") from None
    if done.returncode == 0:
        return done.stdout or done.stderr
    said = one_line((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1], 300)
    if _OUTAGE.search(said):
        raise SlurmOutage(said)
    raise UserError(f"Slurm refuses the job: {said}" if command[0] == "sbatch" else said)
