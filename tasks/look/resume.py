"""How a run is continued: by the recipe, the places and the flow that the store has of it."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.recipe import recipe_of_data
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.layout import check_layout
from radlads.tasks.look.record import PlacesSheet, read_places, read_recipe
from radlads.tasks.look.run_state import RunState, look

_SQLITE = "sqlite:///"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class HowToResume:
    """recipe: its YAML. work, tracking: as recorded, where they are of this machine; None: the defaults. judged,
    other_teacher, pretrains: which flow, and its arguments. finished: its state, if nothing is left to do. notes: what
    is not as it was, a line each."""

    recipe: str
    work: str | None = None
    tracking: str | None = None
    judged: str | None = None
    other_teacher: bool = False
    pretrains: bool = False
    finished: RunState | None = None
    notes: tuple[str, ...] = ()


def how_to_resume(store: Store, run: str) -> HowToResume:
    """Raises UserError for a run that is at work, that the store does not have, or whose recipe this version cannot
    read; StoreError."""
    check_layout(store)
    data = read_recipe(store, run)
    state = look(store, run)
    if state.is_alive:
        raise UserError(
            f"the run '{run}' is at work, by {state.where}: look at it (radlads status {run}) or stop it first "
            f"(radlads stop {run})"
        )
    recipe = recipe_of_data(data, None, where=f"the recipe of run '{run}'")
    if state.word == "finished":
        return HowToResume(data.decode(), finished=state)
    places = read_places(store, run)
    if places is None and state.judged:
        raise UserError(
            f"the run '{run}' evaluates another run, which an earlier version did not record: continue it with "
            f"radlads evaluate RUN --run {run}"
        )
    here = places is not None and places.host == socket.gethostname()
    notes = [] if here or places is None else [f"it ran on {places.user}@{places.host}: continued here, by the store"]
    return HowToResume(
        recipe=data.decode(),
        work=places.work if places is not None and here and Path(places.work).is_dir() else None,
        tracking=_tracking(places, here),
        judged=places.judged if places is not None else None,
        other_teacher=places is not None and places.other_teacher,
        pretrains=recipe.pretrain is not None,
        notes=tuple(notes),
    )


def _tracking(places: PlacesSheet | None, here: bool) -> str | None:
    """MLflow's address, if it is good from here: a file is of one machine."""
    if places is None:
        return None
    host = urlsplit(places.tracking).hostname
    if host in _LOOPBACK:  # the services, whose port may have changed: the default finds them, or their file
        return None
    return places.tracking if here or not places.tracking.startswith(_SQLITE) else None
