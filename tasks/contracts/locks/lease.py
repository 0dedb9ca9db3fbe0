"""Leases: at most one process at a time makes a run, and at most one a product, on any number of machines.

`<prefix>/lease.json` names the holder and a fencing token, which grows with every new holder. The holder rewrites it
every few seconds, on condition that it has not changed since. A lease is stale if its holder is a dead process of this
machine, or if it has not changed for a fixed time, measured by the store's clock and by this process; clocks of two
machines are never compared. Before a commit a process checks that the token is still its own: one that was suspended
and lost its lease finds another token and commits nothing.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import Field, ValidationError

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import LeaseRef, Sheet
from radlads.tasks.contracts.locks.holder import Holder, this_process
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.errors import StoreError
from radlads.tasks.contracts.store.layout import lease_key, product_key, run_key

_log = logging.getLogger(__name__)
BEAT_SECONDS = 10.0
EXPIRY_SECONDS = 60.0
_POLL_SECONDS = 1.0
_PATIENCE_SECONDS = 5.0
_TAKES = 20
_LEASE_BYTES = 1 << 16
_held: set[tuple[str, str]] = set()
"""(store, owner) of the leases that this process holds. One of this process that is not listed is left over from an
earlier attempt."""


class LeaseSheet(Sheet):
    """lease.json. owner: random, new for every acquisition. beat: grows with every heartbeat. run: the run that the
    product is made for. deleting: the holder deletes the product instead of making it."""

    token: int = Field(ge=1)
    owner: str
    holder: Holder
    beat: int = 0
    released: bool = False
    run: str = ""
    deleting: bool = False


class LeaseHeld(UserError):  # noqa: N818
    """Another process holds the lease on this run or product. by: which one, since when and for which run."""

    def __init__(self, message: str, by: str = "") -> None:
        super().__init__(message)
        self.by = by


class LeaseLost(UserError):  # noqa: N818
    """Another process has taken over the run or product; this one must not write any more."""


def confirm_lease(store: Store, ref: LeaseRef) -> None:
    """Raises LeaseLost unless the lease is still the given one; StoreError if that cannot be determined."""
    found = _read(store, ref.key, patient=True)
    if found is None:
        raise LeaseLost(f"{store.join(ref.key)} was removed: another process may write there now")
    if found[0].token != ref.token or (ref.owner and found[0].owner != ref.owner):
        raise _lost(store, ref.key, found[0])


def held_by(store: Store, prefix: str) -> LeaseSheet | None:
    """The lease on a run or a product that was not released, its holder alive or dead; None if there is none."""
    found = _read(store, lease_key(prefix))
    return None if found is None or found[0].released else found[0]


def is_live(store: Store, prefix: str) -> bool:
    """Whether a lease may have a living holder: one not known to be dead, and not silent for too long."""
    record = held_by(store, prefix)
    if record is None:
        return False
    if record.holder.is_here:
        return record.holder.is_alive
    age = store.age(lease_key(prefix))
    return age is None or age < EXPIRY_SECONDS


class Lease:
    """A context manager that acquires a lease, renews it and releases it.

    prefix: of what is leased, in the store. what: its name in messages. work: the folder of this process, shown to
    others. run, deleting: as in LeaseSheet. look: called while waiting for a silent holder's lease to expire; may
    raise. Entering raises LeaseHeld.
    """

    def __init__(
        self,
        store: Store,
        prefix: str,
        work: Path,
        *,
        what: str,
        run: str = "",
        deleting: bool = False,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._what, self._key, self._look = store, what, lease_key(prefix), look
        self._mine = LeaseSheet(token=1, owner=uuid.uuid4().hex, holder=this_process(work), run=run, deleting=deleting)
        self._version = ""
        self._lost: LeaseLost | None = None
        self._failing = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease on {what}", daemon=True)

    def __enter__(self) -> Self:
        attempts = 0
        while not self._take():
            attempts += 1
            if attempts == _TAKES:
                raise StoreError(f"{self._store.join(self._key)}: other processes keep writing it; try again")
            time.sleep(_POLL_SECONDS / 10)
        _held.add((self._store.uri, self._mine.owner))
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(_PATIENCE_SECONDS)
        _held.discard((self._store.uri, self._mine.owner))
        # In an outage the lease expires, and this process is then known to be dead: no need to wait here.
        if self._lost is None and not self._failing and not self._thread.is_alive():
            try:
                self._write(released=True)
            except (LeaseLost, StoreError) as fault:
                _log.warning("the lease on %s could not be released: %s", self._what, fault)

    @property
    def ref(self) -> LeaseRef:
        """The reference for a job, which confirms the lease before it commits."""
        return LeaseRef(key=self._key, token=self._mine.token, owner=self._mine.owner)

    @property
    def is_lost(self) -> bool:
        """Whether another process is known to have taken it over."""
        return self._lost is not None

    def check(self) -> None:
        """Raises LeaseLost if a heartbeat has found another holder; does not query the store."""
        if self._lost is not None:
            raise self._lost

    def confirm(self) -> None:
        """Check the lease in the store. Raises LeaseLost, StoreError."""
        self.check()
        try:
            confirm_lease(self._store, self.ref)
        except LeaseLost as error:
            self._lost = error
            raise

    # Acquire

    def _take(self) -> bool:
        """Whether this process now holds the lease; False: try again. Raises LeaseHeld."""
        found = _read(self._store, self._key)
        if found is None:
            return self._store.put_if_absent(self._key, self._dump()) and self._seen()
        record, version = found
        if not record.released and not self._is_dead(record):
            self._wait_for_silence(record, version)
        self._mine = self._mine.model_copy(update={"token": record.token + 1})
        return self._store.replace(self._key, self._dump(), version) and self._seen()

    def _seen(self) -> bool:
        """Whether the lease just written can be read back; stores its version. On an endpoint without conditional
        writes two writers may both believe to be first; the one that is read back is."""
        found = _read(self._store, self._key)
        if found is None or found[0] != self._mine:
            return False
        self._version = found[1]
        return True

    def _is_dead(self, record: LeaseSheet) -> bool:
        if not record.holder.is_here:
            return False
        ours = record.holder.pid == self._mine.holder.pid and record.holder.started == self._mine.holder.started
        if ours:
            return (self._store.uri, record.owner) not in _held
        if not record.holder.is_alive:
            _log.warning("%s: its holder, %s, is dead; taking over", self._what, record.holder)
            return True
        return False

    def _wait_for_silence(self, record: LeaseSheet, version: str) -> None:
        """Returns once the lease is older than a living holder would leave it. Raises LeaseHeld as soon as the holder
        is seen to be alive."""
        if record.holder.is_here:
            raise self._is_held(record)
        age = self._store.age(self._key) or 0.0
        left = EXPIRY_SECONDS - age
        if left > 0:
            _log.warning(
                "%s was last held by %s; unless that process renews it, it is taken over in %.0f seconds",
                self._what,
                record.holder,
                left,
            )
        end = time.monotonic() + left
        while time.monotonic() < end:
            self._look()
            time.sleep(min(_POLL_SECONDS, max(0.0, end - time.monotonic())))
            found = _read(self._store, self._key)
            if found is not None and found[1] != version and not found[0].released:
                raise self._is_held(found[0])
            if found is None or found[1] != version:
                return

    def _is_held(self, record: LeaseSheet) -> LeaseHeld:
        doing = "deleted" if record.deleting else "made"
        by = f"{doing} by {record.holder}" + (f", for the run '{record.run}'" if record.run else "")
        return LeaseHeld(
            f"{self._what} in {self._store.uri} is being {by}: wait for it, or end it there (kill {record.holder.pid}) "
            "and start this again, which resumes from its newest checkpoint; or choose another run name",
            by,
        )

    # Renew

    def _beat(self) -> None:
        """The thread: renews the lease every few seconds. An outage does not stop it: nobody else can write then."""
        while not self._stop.wait(BEAT_SECONDS):
            try:
                self._write()
                self._failing = False
            except LeaseLost as error:
                _log.error("%s", error)
                self._lost = error
                return
            except StoreError as error:
                if not self._failing:
                    _log.warning("the lease on %s is not renewed: %s", self._what, error)
                self._failing = True

    def _write(self, *, released: bool = False) -> None:
        """Write the next beat. Raises LeaseLost if another process holds the lease, StoreError."""
        update = {"beat": self._mine.beat + 1, "released": released}
        before, self._mine = self._mine, self._mine.model_copy(update=update)
        if self._store.replace(self._key, self._dump(), self._version) and self._seen():
            return
        found = _read(self._store, self._key, patient=True)
        if found is None:
            raise LeaseLost(f"{self._store.join(self._key)} was removed while this process held it")
        if found[0].owner != before.owner:
            raise _lost(self._store, self._key, found[0])
        self._mine, self._version = found  # this process's own write, whose response was lost

    def _dump(self) -> bytes:
        return self._mine.model_dump_json(indent=1).encode() + b"\n"


def run_lease(store: Store, run: str, work: Path) -> Lease:
    """The lease on a run; it protects the run's pointers and recipe."""
    return Lease(store, run_key(run), work, what=f"the run '{run}'")


def product_lease(
    store: Store,
    stage: str,
    digest: str,
    work: Path,
    *,
    run: str = "",
    deleting: bool = False,
    look: Callable[[], None] = lambda: None,
) -> Lease:
    """The lease on a product; it protects the product, its checkpoints and its job's record."""
    prefix, what = product_key(stage, digest), f"{stage} {digest[:12]}"
    return Lease(store, prefix, work, what=what, run=run, deleting=deleting, look=look)


def _lost(store: Store, key: str, record: LeaseSheet) -> LeaseLost:
    return LeaseLost(
        f"{store.join(key).rsplit('/', 1)[0]} was taken over by {record.holder}: this process stops and commits "
        "nothing; wait for that one to end, then start this one again if needed"
    )


def _read(store: Store, key: str, *, patient: bool = False) -> tuple[LeaseSheet, str] | None:
    """(lease, version). patient: a lease must exist; a single response that it does not is not trusted. Raises
    UserError for a file that is not a lease.
    """
    seen = b""
    for attempt in range(4):
        time.sleep(0.3 * attempt)
        found = store.read(key, limit=_LEASE_BYTES)
        if found is None:
            if not patient or attempt == 3:
                return None
            continue
        try:
            return LeaseSheet.model_validate_json(found[0]), found[1]
        except ValidationError:
            if found[0] == seen:
                break
            seen = found[0]
    raise UserError(f"{store.join(key)} is not a valid lease: if no process works there, delete that file")
