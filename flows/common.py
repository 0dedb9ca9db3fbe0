"""What the flows share."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from prefect.runtime import flow_run
from prefect.states import Failed

from radlads.tasks.job import UserError
from radlads.tasks.launch import JobCrashed
from radlads.tasks.store import StoreError

_P = ParamSpec("_P")
_R = TypeVar("_R")


def explain_errors(flow_function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorates a flow's function: what we know how to explain becomes the message of the run's state, without a
    traceback in the log."""

    @functools.wraps(flow_function)
    def explained(*args: _P.args, **kwargs: _P.kwargs) -> Any:
        try:
            return flow_function(*args, **kwargs)
        except (UserError, StoreError, JobCrashed) as error:
            return Failed(message=str(error), data=error)

    return explained


def run_identity() -> str:
    """What a run's default name is made from: the same whenever the orchestrator retries it."""
    return str(flow_run.id or uuid.uuid4().hex)
