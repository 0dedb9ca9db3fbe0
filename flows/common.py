"""What the flows share."""

from __future__ import annotations

import functools
import logging
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Cancelled, Failed

from radlads.tasks.disk import explain_disk
from radlads.tasks.job import UserError
from radlads.tasks.launch import JobCrashed
from radlads.tasks.stopping import REQUEST, RunStopped
from radlads.tasks.store import StoreError

_P = ParamSpec("_P")
_R = TypeVar("_R")
_EXPLAINED = (UserError, StoreError, JobCrashed)


class _NoTraceback(logging.Filter):
    """Keeps Prefect's engine from adding a traceback to an error that explains itself: the state's message has it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is logged."""
        return not (record.exc_info and isinstance(record.exc_info[1], _EXPLAINED))


class SaidOnce(logging.Filter):
    """Keeps Prefect's engine from saying one failure for the task, for its retry and for the flow, each time whole.

    The first says it, what follows only names the state. by_caller: whoever called the flow says how it ended.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_caller = False
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is logged; it may be shortened."""
        text = record.getMessage()
        if text.startswith(_RETRIED) and isinstance(record.args, tuple) and isinstance(record.args[1], State):
            record.msg, record.args = "%s\ntrying again %s", (record.args[1].message, record.args[-1])
            return True
        if not text.startswith(_ENDED):
            return True
        if self.by_caller:
            return False
        name, _, message = text.removeprefix(_ENDED).partition("(")
        if message in self._said:
            record.msg, record.args = f"{_ENDED}{name}", ()
        elif name != "Completed":
            self._said.add(message)
        return True


_ENDED = "Finished in state "
_RETRIED = "Task run failed with state:"
ENDINGS = SaidOnce()
for _name in ("prefect.flow_runs", "prefect.engine"):
    logging.getLogger(_name).addFilter(_NoTraceback())
for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).addFilter(ENDINGS)


def explain_errors(flow_function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorates a flow's function: what we know how to explain becomes the message of the run's state, without a
    traceback in the log."""

    @functools.wraps(flow_function)
    def explained(*args: _P.args, **kwargs: _P.kwargs) -> Any:
        REQUEST.running = True
        try:
            REQUEST.check()
            return flow_function(*args, **kwargs)
        except RunStopped as error:
            return Cancelled(message=str(error), data=error)
        except _EXPLAINED as error:
            return Failed(message=str(error), data=error)
        except OSError as error:
            told = explain_disk(error, Path.cwd())
            if told is None:
                raise
            return Failed(message=str(told), data=told)
        finally:
            REQUEST.running = False

    return explained


def run_identity() -> str:
    """What a run's default name is made from: the same whenever the orchestrator retries it."""
    return str(flow_run.id or uuid.uuid4().hex)
