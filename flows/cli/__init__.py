"""`radlads`, the command line: one file per command. Prefect is imported inside the commands, because it reads its
settings on import."""

from __future__ import annotations

import io
import os
import sys
from typing import NoReturn

from radlads.flows.cli import (  # noqa: F401 - they register commands
    chat,
    compare,
    demo,
    doctor,
    evaluate,
    export,
    init,
    logs,
    openmose,
    plan,
    recipes,
    report,
    resume,
    run,
    serve,
    services,
    status,
    stop,
    store,
    sweep,
    sync,
)
from radlads.flows.cli.application import ERR, app, parse_overrides
from radlads.flows.foreground import RunFailed
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.credentials import hide
from radlads.tasks.contracts.parsing.files import MENDABLE, explain_os_error
from radlads.tasks.contracts.store.errors import StoreError
from radlads.tasks.launchers.launcher import JobCrashed

__all__ = ["app", "main", "parse_overrides"]


def main() -> None:
    """Entry point. Exit code 2: something has to be changed before the command can succeed (UserError); 1: it failed at
    work, and the same command may succeed later. Known errors are a line each."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a narrow locale must not end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="radlads")  # also where it was started as a module, for help and completion
    except UserError as error:
        _fail(str(error).splitlines(), 2)
    except RunFailed as error:
        _fail(str(error).splitlines(), 1)
    except (JobCrashed, StoreError) as error:
        _fail(str(error).splitlines()[:1], 1)
    except BrokenPipeError:  # the reader of the output has exited, as `head` does
        _close_stdout()
        sys.exit(1)
    except OSError as error:
        _fail([explain_os_error(error)], 2 if error.errno in MENDABLE else 1)


def _fail(lines: list[str], code: int) -> NoReturn:
    for line in lines:
        ERR.print(f"error: {hide(line)}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


def _close_stdout() -> None:
    """Discard buffered output that has no reader; the interpreter would try to write it on exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
