"""Leases: one process at a time makes a run, and one a product, wherever they run.

`<prefix>/lease.json` names the holder and a fencing token, which grows with every new holder. The holder writes it
anew every few seconds, always on condition that it is still what it wrote last. A lease is stale when its holder is a
dead process of this machine, or when it has not changed for as long as the store's own clock and our own watch say;
clocks of two machines are never compared. Whoever commits checks first that the token is still the one it was given:
a process that slept through its lease finds another there and commits nothing.
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
"""Owners of this process: (store, owner). A lease of ours that is not among them was left by an earlier attempt."""


class LeaseSheet(Sheet):
    """lease.json. owner: drawn anew for every acquisition. beat: grows with every heartbeat. run: for which a product
    is made. deleting: the holder does not make the product but takes it away."""

    token: int = Field(ge=1)
    owner: str
    holder: Holder
    beat: int = 0
    released: bool = False
    run: str = ""
    deleting: bool = False


class LeaseHeld(UserError):  # noqa: N818
    """Another process makes this run or this product. by: which one, since when and for which run."""

    def __init__(self, message: str, by: str = "") -> None:
        super().__init__(message)
        self.by = by


class LeaseLost(UserError):  # noqa: N818
    """This process made the run or the product until another took it over; it must write no more."""


def confirm_lease(store: Store, ref: LeaseRef) -> None:
    """Raises LeaseLost unless the lease is still the one that was given; StoreError where that cannot be found out."""
    found = _read(store, ref.key, patient=True)
    if found is None:
        raise LeaseLost(f"{store.join(ref.key)} was removed: this process no longer knows that it alone writes there")
    if found[0].token != ref.token or (ref.owner and found[0].owner != ref.owner):
        raise _lost(store, ref.key, found[0])


def held_by(store: Store, prefix: str) -> LeaseSheet | None:
    """The lease on a run or a product that was not given back, its holder alive or not; None where there is none."""
    found = _read(store, lease_key(prefix))
    return None if found is None or found[0].released else found[0]


def is_live(store: Store, prefix: str) -> bool:
    """Whether a lease may have a living holder: one that is not seen to be dead, and not silent for too long."""
    sheet = held_by(store, prefix)
    if sheet is None:
        return False
    if sheet.holder.is_here:
        return sheet.holder.is_alive
    age = store.age(lease_key(prefix))
    return age is None or age < EXPIRY_SECONDS


class Lease:
    """What this process alone writes to: a context manager, which takes the lease, keeps it alive and gives it back.

    prefix: of what is leased, in the store. what: its name in messages. work: where this process works, for others to
    read. run, deleting: as of LeaseSheet. look: called while a silent holder is given its time; may raise. Entering
    raises LeaseHeld.
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
                raise StoreError(f"{self._store.join(self._key)}: others write it all the time; try again")
            time.sleep(_POLL_SECONDS / 10)
        _held.add((self._store.uri, self._mine.owner))
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(_PATIENCE_SECONDS)
        _held.discard((self._store.uri, self._mine.owner))
        # In an outage it grows stale by itself, and this process can be seen to be dead: no reason to hang here.
        if self._lost is None and not self._failing and not self._thread.is_alive():
            try:
                self._write(released=True)
            except (LeaseLost, StoreError) as fault:
                _log.warning("the lease on %s could not be given back: %s", self._what, fault)

    @property
    def ref(self) -> LeaseRef:
        """For a job, which confirms it before it commits."""
        return LeaseRef(key=self._key, token=self._mine.token, owner=self._mine.owner)

    @property
    def is_lost(self) -> bool:
        """Whether another process was seen to have taken it over."""
        return self._lost is not None

    def check(self) -> None:
        """Raises LeaseLost if the heartbeat found another holder; asks nobody."""
        if self._lost is not None:
            raise self._lost

    def confirm(self) -> None:
        """Ask the store. Raises LeaseLost, StoreError."""
        self.check()
        try:
            confirm_lease(self._store, self.ref)
        except LeaseLost as error:
            self._lost = error
            raise

    # Taking it

    def _take(self) -> bool:
        """Whether the lease is ours now; False to look again. Raises LeaseHeld."""
        found = _read(self._store, self._key)
        if found is None:
            return self._store.put_if_absent(self._key, self._dump()) and self._seen()
        sheet, version = found
        if not sheet.released and not self._is_dead(sheet):
            self._wait_for_silence(sheet, version)
        self._mine = self._mine.model_copy(update={"token": sheet.token + 1})
        return self._store.replace(self._key, self._dump(), version) and self._seen()

    def _seen(self) -> bool:
        """Whether what was just written is there; remembers its version. Two writers on an endpoint without conditions
        may both believe to be first: the one that is read back is."""
        found = _read(self._store, self._key)
        if found is None or found[0] != self._mine:
            return False
        self._version = found[1]
        return True

    def _is_dead(self, sheet: LeaseSheet) -> bool:
        if not sheet.holder.is_here:
            return False
        ours = sheet.holder.pid == self._mine.holder.pid and sheet.holder.started == self._mine.holder.started
        if ours:
            return (self._store.uri, sheet.owner) not in _held
        if not sheet.holder.is_alive:
            _log.warning("%s: the process that had it, %s, is dead; going on from there", self._what, sheet.holder)
            return True
        return False

    def _wait_for_silence(self, sheet: LeaseSheet, version: str) -> None:
        """Returns once the lease is older than a living holder lets it grow. Raises LeaseHeld as soon as it is seen to
        be alive."""
        if sheet.holder.is_here:
            raise self._is_held(sheet)
        age = self._store.age(self._key) or 0.0
        left = EXPIRY_SECONDS - age
        if left > 0:
            _log.warning(
                "%s was last held by %s; unless that process shows to be alive, it is taken over in %.0f seconds",
                self._what,
                sheet.holder,
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

    def _is_held(self, sheet: LeaseSheet) -> LeaseHeld:
        doing = "deleted" if sheet.deleting else "made"
        by = f"{doing} by {sheet.holder}" + (f", for the run '{sheet.run}'" if sheet.run else "")
        return LeaseHeld(
            f"{self._what} in {self._store.uri} is being {by}: wait for it, or end it there (kill {sheet.holder.pid}) "
            "and start this again, which goes on from its newest checkpoint; or choose another run name",
            by,
        )

    # Keeping it

    def _beat(self) -> None:
        """The thread: a new version every few seconds. An outage of the store is borne: nobody else can write then."""
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
        """Write the next beat. Raises LeaseLost where somebody else's is there, StoreError."""
        update = {"beat": self._mine.beat + 1, "released": released}
        before, self._mine = self._mine, self._mine.model_copy(update=update)
        if self._store.replace(self._key, self._dump(), self._version) and self._seen():
            return
        found = _read(self._store, self._key, patient=True)
        if found is None:
            raise LeaseLost(f"{self._store.join(self._key)} was removed while this process held it")
        if found[0].owner != before.owner:
            raise _lost(self._store, self._key, found[0])
        self._mine, self._version = found  # a write of ours whose answer was lost

    def _dump(self) -> bytes:
        return self._mine.model_dump_json(indent=1).encode() + b"\n"


def run_lease(store: Store, run: str, work: Path) -> Lease:
    """The lease on a run: under it its pointers and its recipe are written."""
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
    """The lease on a product: under it the product is made, its checkpoints and its job's record are written."""
    prefix, what = product_key(stage, digest), f"{stage} {digest[:12]}"
    return Lease(store, prefix, work, what=what, run=run, deleting=deleting, look=look)


def _lost(store: Store, key: str, sheet: LeaseSheet) -> LeaseLost:
    return LeaseLost(
        f"{store.join(key).rsplit('/', 1)[0]} was taken over by {sheet.holder}: this process stops and commits "
        "nothing; let that one end, or start this one again afterwards"
    )


def _read(store: Store, key: str, *, patient: bool = False) -> tuple[LeaseSheet, str] | None:
    """(lease, version). patient: where one must be, a single answer that there is none is not believed.

    Raises UserError for a file that is no lease.
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
    raise UserError(f"{store.join(key)} is not a lease: if no process works there, delete that file")
