"""Runs a program of the data plane at the user's terminal: it reads what is typed and writes what is seen."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from radlads.tasks.contracts.job import Sheet
from radlads.tasks.contracts.parsing.files import write_private
from radlads.tasks.contracts.process_tree import end_with_me
from radlads.tasks.contracts.recipe.recipe import Resources
from radlads.tasks.launchers.local import LocalLauncher, job_environment


def run_at_terminal(program: str, request: Sheet, secrets: Mapping[str, str] | None = None) -> int:
    """Run `python -m program request.json` to its end; its exit code. Ctrl-C is the program's alone. secrets: variables
    of its environment that are written nowhere."""
    folder = Path(tempfile.mkdtemp(prefix="radlads-terminal-"))
    try:
        write_private(folder / "request.json", request.model_dump_json(indent=1))
        environment = job_environment(os.environ, LocalLauncher().resources(Resources(device="auto")))
        environment.pop("PYTHONUNBUFFERED", None)
        environment |= secrets or {}
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", program, str(folder / "request.json")],
                env=environment,
                preexec_fn=_takes_interrupts,
            )
            end_with_me(process.pid)
            code = process.wait()
        finally:
            signal.signal(signal.SIGINT, before)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 128 - code if code < 0 else code


def _takes_interrupts() -> None:
    """In the child, before the program begins: Ctrl-C, which this process ignores, is not ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
