"""What the store keeps of a sweep: `sweeps/<name>/sweep.yaml`, written before its runs; it can gain values only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.identity import identity
from radlads.tasks.contracts.job import canonical_json, first_fault
from radlads.tasks.contracts.parsing.document import DocumentError
from radlads.tasks.contracts.parsing.yaml_reader import dump_yaml, read_yaml
from radlads.tasks.contracts.recipe.recipe import Recipe, parse_recipe
from radlads.tasks.contracts.settings import check_run_name
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.errors import StoreError
from radlads.tasks.contracts.store.layout import sweep_key
from radlads.tasks.sweep.grid import Member, plain_value


class SweepRecord(BaseModel):
    """sweep.yaml. source: the recipe as it was named. members: run → its values of the grid. recipe: the resolved
    recipe of the member `recipe_of`; the others differ from it in the grid's values only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    grid: dict[str, list[Any]]
    members: dict[str, dict[str, Any]]
    recipe_of: str
    recipe: dict[str, Any]

    @property
    def asked(self) -> Recipe:
        """The recorded recipe. Raises DocumentError where this version reads it no longer."""
        return parse_recipe(self.recipe, where=f"the recipe of '{self.recipe_of}'")


def make_record(source: str, members: Sequence[Member]) -> SweepRecord:
    """The record of a sweep that starts now."""
    keys = members[0].values
    grid = {key: _distinct([member.values[key] for member in members]) for key in keys}
    return SweepRecord(
        source=source,
        grid=grid,
        members={member.name: member.values for member in members},
        recipe_of=members[0].name,
        recipe=members[0].recipe.model_dump(mode="json"),
    )


def keep_record(store: Store, sweep: str, source: str, members: Sequence[Member]) -> SweepRecord:
    """Write the record of a sweep, or add to it what it did not have yet. Raises UserError where the name is another
    sweep's, StoreError."""
    new, key = make_record(source, members), _record_key(sweep)
    if store.put_if_absent(key, _dump(new)):
        return new
    found = store.read(key)
    if found is None:
        raise StoreError(f"{store.join(key)} was written and is not there")
    old = _parse(found[0], store.join(key))
    _check_extends(old, new, members, sweep)
    record = old.model_copy(update={"grid": new.grid, "members": new.members})
    if record != old and not store.replace(key, _dump(record), found[1]):
        raise StoreError(f"{store.join(key)} was written by another process meanwhile; try again")
    return record


def read_record(store: Store, sweep: str) -> SweepRecord:
    """The record of a sweep. Raises UserError where the store has no such sweep."""
    key = _record_key(sweep)
    data = store.get_bytes(key)
    if data is None:
        raise UserError(f"there is no sweep '{sweep}' in {store.uri}")
    return _parse(data, store.join(key))


def _record_key(sweep: str) -> str:
    return f"{sweep_key(check_run_name(sweep))}/sweep.yaml"


def _check_extends(old: SweepRecord, new: SweepRecord, members: Sequence[Member], sweep: str) -> None:
    other = f"; for another sweep give another name with --run, what both have is shared (here: '{sweep}')"
    if list(old.grid) != list(new.grid):
        raise UserError(f"the sweep '{sweep}' is over {' and '.join(old.grid)}, not {' and '.join(new.grid)}{other}")
    for key, values in old.grid.items():
        gone = [value for value in values if canonical_json(value) not in map(canonical_json, new.grid[key])]
        if gone:
            raise UserError(
                f"the sweep '{sweep}' has {key}={','.join(map(plain_value, values))}; values can be added, and "
                f"{plain_value(gone[0])} is missing{other}"
            )
    now = next((member.recipe for member in members if member.name == old.recipe_of), None)
    try:
        differs = now is None or _compared(old.asked) != _compared(now)
    except DocumentError as error:
        raise UserError(f"the sweep '{sweep}' was recorded by another version ({error}){other}") from None
    if differs:
        raise UserError(f"the sweep '{sweep}' was made of a recipe with other settings{other}")


def _compared(recipe: Recipe) -> str:
    """A recipe as far as results depend on it."""
    bare = recipe.model_copy(update={"description": "", "sources": ()})
    return canonical_json(identity(bare, None))


def _distinct(values: Sequence[Any]) -> list[Any]:
    return list({canonical_json(value): value for value in values}.values())


def _dump(record: SweepRecord) -> bytes:
    return dump_yaml(record.model_dump(mode="json")).encode()


def _parse(data: bytes, where: str) -> SweepRecord:
    try:
        return SweepRecord.model_validate(read_yaml(data, where=where))
    except ValidationError as error:
        raise UserError(f"{where} is not a record of this version: {first_fault(error)}") from None
