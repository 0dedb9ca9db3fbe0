"""A request to stop a run, left in the store by whoever cannot reach its process: runs/<run>/stop.json.

It names the lease that the run has, so that it stops this attempt and no later one. The run looks for it every few
seconds, does what Ctrl-C does, and deletes it.
"""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from radlads.tasks.contracts.job import Sheet
from radlads.tasks.contracts.locks.holder import user_name
from radlads.tasks.contracts.locks.lease import Lease, LeaseSheet
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.errors import StoreError
from radlads.tasks.contracts.store.layout import run_key
from radlads.tasks.launchers.stopping import REQUEST

_log = logging.getLogger("prefect.radlads")
LOOK_SECONDS = 5.0
_REQUEST_BYTES = 1 << 16


class StopSheet(Sheet):
    """stop.json. token, owner: of the lease of the run that is to stop. by: who asked."""

    token: int
    owner: str
    by: str
    time: datetime


def stop_key(run: str) -> str:
    """The key of the request to stop a run."""
    return f"{run_key(run)}/stop.json"


def leave_request(store: Store, run: str, lease: LeaseSheet, host: str) -> None:
    """Ask the holder of this lease to stop. Raises StoreError."""
    sheet = StopSheet(token=lease.token, owner=lease.owner, by=f"{user_name()}@{host}", time=datetime.now(UTC))
    store.put_bytes(stop_key(run), sheet.model_dump_json(indent=1).encode() + b"\n")


def read_request(store: Store, run: str) -> StopSheet | None:
    """The request to stop a run, of this attempt or of an earlier one. Raises StoreError."""
    found = store.read(stop_key(run), limit=_REQUEST_BYTES)
    try:
        return None if found is None else StopSheet.model_validate_json(found[0])
    except ValidationError:
        return None


class StopWatch:
    """A context manager around a run that looks for the request, from a thread. An outage of the store only delays it.

    lease: on the run, held.
    """

    def __init__(self, store: Store, run: str, lease: Lease) -> None:
        self._store, self._run, self._lease = store, run, lease
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"stop requests of {run}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ended.set()

    def _work(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            with suppress(StoreError):
                found = read_request(self._store, self._run)
                if found is not None and (found.token, found.owner) == (self._lease.ref.token, self._lease.ref.owner):
                    _log.warning("%s asked to stop this run", found.by)
                    if REQUEST.asked_at is None:  # a second one would kill the job before it has saved
                        REQUEST.ask()
                    self._store.delete(stop_key(self._run))
                    return
