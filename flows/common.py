"""Code shared by the flows."""

from __future__ import annotations

import functools
import inspect
import logging
import secrets
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import httpx
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import PrefectException
from prefect.logging.handlers import APILogHandler
from prefect.runtime import flow_run
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_SERVER_API_AUTH_STRING,
    PREFECT_SERVER_CORS_ALLOWED_ORIGINS,
    temporary_settings,
)
from prefect.states import Cancelled, Failed

from radlads.tasks.contracts.disk import explain_disk
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.credentials import hide
from radlads.tasks.contracts.parsing.document import one_line
from radlads.tasks.contracts.store.open import StoreError
from radlads.tasks.launchers.launcher import JobCrashed
from radlads.tasks.launchers.stopping import REQUEST, RunStopped

_P = ParamSpec("_P")
_R = TypeVar("_R")
_EXPLAINED = (UserError, StoreError, JobCrashed)


class _NoTraceback(logging.Filter):
    """Drops the traceback that Prefect's engine adds to an error whose message, kept in the state, is sufficient."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is logged."""
        return not (record.exc_info and isinstance(record.exc_info[1], _EXPLAINED))


class SaidOnce(logging.Filter):
    """Shortens the messages by which Prefect's engine reports one failure for the task, for its retry and for the flow.
    The first message stays whole, later ones only name the state. by_caller: the flow's caller reports how it ended.
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
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # that it creates the tables of a new database


class _RunsLog(APILogHandler):
    """Sends what the pipeline logs to the log of the run in Prefect's pages; what other threads log has no run."""

    def emit(self, record: logging.LogRecord) -> None:
        """As Handler.emit."""
        if FlowRunContext.get() is not None or TaskRunContext.get() is not None:
            super().emit(record)


def _log_to_page() -> None:
    """Prefect's engine removes handlers when it sets up logging, so a flow adds this one as it begins."""
    logger = logging.getLogger("prefect.radlads")
    if not any(isinstance(handler, _RunsLog) for handler in logger.handlers):
        logger.addHandler(_RunsLog())


def explain_errors(flow_function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorates a flow's function: an error with a known explanation becomes the message of the run's state, without a
    traceback in the log."""

    @functools.wraps(flow_function)
    def explained(*args: _P.args, **kwargs: _P.kwargs) -> Any:
        try:
            _log_to_page()
            with REQUEST.flow():
                REQUEST.check()
                return flow_function(*args, **kwargs)
        except RunStopped as error:
            return Cancelled(message=str(error), data=error)
        except _EXPLAINED as error:
            return Failed(message=hide(str(error)), data=error)
        except Exception as error:
            disk = explain_disk(error, Path.cwd()) if isinstance(error, OSError) else None
            if disk is not None:
                return Failed(message=hide(str(disk)), data=disk)
            explanation = hide(str(error))
            if explanation == str(error):
                raise
            raise RuntimeError(f"{type(error).__name__}: {explanation}") from None  # Prefect keeps what is raised here

    # Prefect would look up the names of types in this module.
    explained.__signature__ = inspect.signature(flow_function, eval_str=True)  # type: ignore[attr-defined]
    return explained


@contextmanager
def orchestrator() -> Iterator[None]:
    """Prefect for the duration of a run. If no server is configured, a temporary one is started; it requires a
    password, too.

    Raises UserError, one line, if the server cannot be reached or refuses access. A flow's own error is in its state.
    """
    word = f"radlads:{secrets.token_urlsafe(24)}"
    own = {PREFECT_API_AUTH_STRING: word, PREFECT_SERVER_API_AUTH_STRING: word, PREFECT_SERVER_CORS_ALLOWED_ORIGINS: ""}
    try:
        with temporary_settings(own) if PREFECT_API_URL.value() is None else nullcontext():
            yield
    except (httpx.HTTPError, PrefectException, RuntimeError) as error:
        where = PREFECT_API_URL.value() or "its own database"
        raise UserError(
            f"Prefect at {where}: {one_line(hide(str(error)), 200)}; start the services (radlads services up), set "
            "PREFECT_API_AUTH_STRING to the server's password, or unset PREFECT_API_URL to do without a server"
        ) from None


def run_identity() -> str:
    """The id that a run's default name is made from; it stays the same when the orchestrator retries the run."""
    return str(flow_run.id or uuid.uuid4().hex)
