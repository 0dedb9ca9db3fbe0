"""How a program outside any run gets its request and tells its end: a request in JSON, `exit.json` beside it."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from pydantic import TypeAdapter

from radlads.tasks.contracts.job import ExitReason
from radlads.tasks.contracts.parsing.credentials import HidingFormatter
from radlads.tasks.jobs.exit_reasons import EXIT_CODES, Preempted, explain, write_ending
from radlads.tasks.jobs.process_group import follow_launcher, quiet_libraries

logger = logging.getLogger("radlads")


def run_request(kinds: TypeAdapter[Any], perform: Callable[[Any], None]) -> NoReturn:
    """Read the request that the command line names, perform it, write exit.json, exit."""
    follow_launcher()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(HidingFormatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    quiet_libraries()
    path = Path(sys.argv[1])
    reason: ExitReason = "done"
    message = ""
    try:
        perform(kinds.validate_json(path.read_bytes()))
    except (Exception, Preempted, KeyboardInterrupt) as error:  # outermost handler: every exit is recorded
        reason, message = explain(error, path.parent)
        if reason == "crash":
            logger.exception("it failed")
    write_ending(path.parent, 0, reason, message)
    sys.exit(EXIT_CODES[reason])


@contextmanager
def made_whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` if nothing is raised, and vanishes otherwise."""
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
