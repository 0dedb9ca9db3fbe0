"""What the store keeps of a run besides its products: its recipe, and the places and the flow that it was run with."""

from __future__ import annotations

import hashlib
import logging
import socket
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from radlads.tasks.contracts.errors import UserError, did_you_mean
from radlads.tasks.contracts.job import Sheet
from radlads.tasks.contracts.locks.holder import user_name
from radlads.tasks.contracts.locks.lease import Lease
from radlads.tasks.contracts.recipe.recipe import Recipe, dump_recipe
from radlads.tasks.contracts.settings import Settings, check_run_name
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.errors import StoreError
from radlads.tasks.contracts.store.layout import recipe_key, run_key, run_names

_log = logging.getLogger(__name__)
_SHEET_BYTES = 1 << 18


class PlacesSheet(Sheet):
    """places.json: of the last attempt at a run. tracking: MLflow's address without a password, or "none". judged: the
    run whose models this one evaluates; other_teacher: as its flow was called."""

    host: str
    user: str
    work: str
    tracking: str
    time: datetime
    judged: str | None = None
    other_teacher: bool = False


def places_key(run: str) -> str:
    """The key of a run's places."""
    return f"{run_key(run)}/places.json"


def keep_recipe(store: Store, run: str, recipe: Recipe, lease: Lease) -> None:
    """Write the run's resolved recipe; an earlier one is kept under a name with its digest.

    Raises LeaseLost, StoreError.
    """
    key, data = recipe_key(run), dump_recipe(recipe).encode()
    found = store.read(key)
    if found is None:
        store.put_if_absent(key, data)
    elif found[0] != data:
        digest = hashlib.sha256(found[0]).hexdigest()[:12]
        store.put_if_absent(f"{run_key(run)}/recipe-{digest}.yaml", found[0])
        lease.confirm()
        if not store.replace(key, data, found[1]):
            raise StoreError(f"{store.join(key)} was written by another process at the same time; try again")


def keep_places(store: Store, run: str, settings: Settings, **more: Any) -> None:
    """Write the run's places. more: fields of PlacesSheet. A fault of the store is logged: only `radlads resume` needs
    them."""
    sheet = PlacesSheet(
        host=socket.gethostname(),
        user=user_name(),
        work=str(settings.work),
        tracking=settings.tracking or "none",
        time=datetime.now(UTC),
        **more,
    )
    try:
        store.put_bytes(places_key(run), sheet.model_dump_json(indent=1).encode() + b"\n")
    except StoreError as error:
        _log.warning("the places of '%s' are not recorded: %s", run, error)


def read_places(store: Store, run: str) -> PlacesSheet | None:
    """The places of a run; None for a run of an earlier version. Raises StoreError."""
    found = store.read(places_key(run), limit=_SHEET_BYTES)
    try:
        return None if found is None else PlacesSheet.model_validate_json(found[0])
    except ValidationError:
        return None


def read_recipe(store: Store, run: str) -> bytes:
    """The recorded recipe. Raises UserError, which names what is near, if the store has no such run."""
    data = store.get_bytes(recipe_key(check_run_name(run)))
    if data is None:
        raise unknown_run(store, run)
    return data


def unknown_run(store: Store, run: str) -> UserError:
    """The error for a run that the store does not have."""
    known = run_names(store)
    if run in known:
        return UserError(f"the run '{run}' in {store.uri} has no recipe.yaml: it was removed, or never begun")
    near = did_you_mean(run, known) or (": `radlads runs` lists its runs" if known else ": it has no runs yet")
    return UserError(f"there is no run '{run}' in {store.uri}{near}")
