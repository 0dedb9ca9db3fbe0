"""Starts the measured programs, each in processes of its own, and reports how they ended."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import radlads
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobSpec
from radlads.tasks.launchers.local import job_environment, render_command

HERE = Path(__file__).resolve().parent
_TAIL_LINES = 25
_RAISED = re.compile(r"^(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception|Exhausted|Resources)\b.*)")


def run_product(job: JobSpec, case: dict[str, Any], limit: float | None = None) -> list[dict[str, Any]]:
    """Measurements of each rank of a training job, started as the product starts it. limit: seconds it may take.

    The command is the local launcher's own; only its module, the training program, is replaced by `product.py`, which
    runs that program's `main` and measures it. Raises UserError with the reason if it fails.
    """
    scratch = Path(job.scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "job.json").write_text(job.model_dump_json(), encoding="utf-8")
    command = render_command(
        job, scratch / "job.json", port=_free_port(), visible=os.environ.get("CUDA_VISIBLE_DEVICES")
    )
    place = command.index("--module")
    command[place : place + 2] = [str(HERE / "product.py")]
    environment = job_environment(os.environ, job.resources)
    _run(command, environment, scratch, case, scratch / "exit.json", limit)
    return read_ranks(scratch, case["gpus"])


def run_plain(job: JobSpec, case: dict[str, Any], teacher: Path, limit: float | None = None) -> list[dict[str, Any]]:
    """Measurements of each rank of the plain build on the same files. Raises UserError if it fails."""
    scratch = Path(f"{job.scratch}-plain")
    scratch.mkdir(parents=True, exist_ok=True)
    student = Path(job.inputs["student"].uri) / "model"
    data = Path(job.inputs["data"].uri)
    places = {"teacher": str(teacher), "student": str(student), "data": str(data)}
    (scratch / "places.json").write_text(json.dumps(places), encoding="utf-8")
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case['gpus']}"]
    command = [sys.executable, *ranks, str(HERE / "plain.py"), str(scratch)]
    _run(command, job_environment(os.environ, job.resources), scratch, case, scratch / "exit.json", limit)
    return read_ranks(scratch, case["gpus"])


def read_ranks(scratch: Path, gpus: int) -> list[dict[str, Any]]:
    return [json.loads((scratch / f"measured-{rank}.json").read_text(encoding="utf-8")) for rank in range(gpus)]


def _run(
    command: list[str],
    environment: dict[str, str],
    scratch: Path,
    case: dict[str, Any],
    ending: Path,
    limit: float | None,
) -> None:
    """Run a program to its end; it finds the case, and when it was launched, in case.json of its folder."""
    for stale in [ending, *scratch.glob("measured-*.json")]:
        stale.unlink(missing_ok=True)
    paths = [str(_import_folder(scratch))]
    paths += [str(Path(place).parent) for place in radlads.__path__ if Path(place).name == "radlads"]
    (scratch / "case.json").write_text(json.dumps({**case, "launched": time.time()}), encoding="utf-8")
    log = scratch / "log.txt"
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command,
            env=environment | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))},
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            raise UserError(f"it was ended after {limit:.0f} s (--timeout)\n{_end_of(log)}") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code:
        raise UserError(_why(code, log, ending))


def _import_folder(scratch: Path) -> Path:
    """A folder with links to what the ranks import: other modules beside them are called as installed packages are."""
    folder = scratch / "import"
    folder.mkdir(exist_ok=True)
    for path in (HERE, HERE.parent / "peers.py"):
        link = folder / path.name
        link.unlink(missing_ok=True)
        link.symlink_to(path)
    return folder


def _why(code: int, log: Path, ending: Path) -> str:
    if ending.is_file():
        found = json.loads(ending.read_text(encoding="utf-8"))
        if found["reason"] != "crash":
            return f"{found['reason']}: {' '.join(str(found['message']).split())[:300]}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if any("out of memory" in line.lower() for line in lines):
        return "out-of-memory"
    raised = [found[1] for line in lines if (found := _RAISED.search(line)) and "ChildFailedError" not in line]
    return f"{raised[0][:200] if raised else f'it exited with {code}'}\n{_end_of(log)}"


def _end_of(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"The end of {log}:", *lines[-_TAIL_LINES:]])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
