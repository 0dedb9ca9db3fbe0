"""Runs a program of the data plane outside any run: it gets a request as JSON and returns how it ended."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from radlads.tasks.contracts.job import Sheet
from radlads.tasks.contracts.parsing.files import write_private
from radlads.tasks.contracts.recipe.recipe import Resources
from radlads.tasks.launchers.launcher import JobCrashed
from radlads.tasks.launchers.local import LocalLauncher, check_ending, job_environment, run_process
from radlads.tasks.launchers.progress import read_json

_GRACE_SECONDS = 10.0


def run_program(name: str, program: str, request: Sheet) -> None:
    """Run `python -m program request.json` on the CPU to its end, in a temporary folder.

    name: of the command, for messages. Raises JobFailed with the fault of the request; JobCrashed with the path of the
    log, which is then kept.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"radlads-{name}-"))
    log = folder / "log.txt"
    try:
        write_private(folder / "request.json", request.model_dump_json(indent=1))
        code = run_process(
            [sys.executable, "-m", program, str(folder / "request.json")],
            env=job_environment(os.environ, LocalLauncher().resources(Resources(device="cpu"))),
            cwd=folder,
            log=log,
            on_tick=lambda: None,
            grace_seconds=_GRACE_SECONDS,
        )
        check_ending(name, code, read_json(folder / "exit.json"), log, 0)
    except JobCrashed:
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
