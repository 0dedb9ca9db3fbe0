"""What the store keeps of a sweep: `sweeps/<name>/sweep.yaml`, written before its runs. It can gain values, and lose
those whose runs have made no product but a plan: a mistake in a grid does not use up the name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.identity import identity
from radlads.tasks.contracts.job import canonical_json, first_fault
from radlads.tasks.contracts.locks.lease import is_live
from radlads.tasks.contracts.parsing.document import DocumentError
from radlads.tasks.contracts.parsing.yaml_reader import dump_yaml, read_yaml
from radlads.tasks.contracts.recipe.recipe import Recipe, load_recipe, parse_recipe
from radlads.tasks.contracts.settings import check_run_name
from radlads.tasks.contracts.stages import PLAN
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.errors import StoreError
from radlads.tasks.contracts.store.layout import pointers_key, run_key, sweep_key
from radlads.tasks.contracts.store.pointers import pointer_key
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
    """Write the record of a sweep, or change it to the present grid. Raises UserError where the name is another
    sweep's, StoreError."""
    key = _record_key(sweep)
    record, found = check_record(store, sweep, source, members)
    data = _dump(record)
    if found is not None and found[0] == data:
        return record
    if not (store.put_if_absent(key, data) if found is None else store.replace(key, data, found[1])):
        raise StoreError(f"{store.join(key)} was written by another process meanwhile; try again")
    return record


def check_record(
    store: Store, sweep: str, source: str, members: Sequence[Member]
) -> tuple[SweepRecord, tuple[bytes, str] | None]:
    """The record that keep_record would write, and content and version of the file that it replaces. Raises as
    keep_record."""
    new, key = make_record(source, members), _record_key(sweep)
    found = store.read(key)
    if found is None:
        return new, None
    old = _parse(found[0], store.join(key))
    begun = _begun(store, old)
    if begun.members:
        _check_extends(begun, new, sweep)
        _check_recipe(old, source, members[0], sweep)
        if old.recipe_of in new.members:
            return old.model_copy(update={"grid": new.grid, "members": new.members}), found
    return new, found


def read_record(store: Store, sweep: str) -> SweepRecord:
    """The record of a sweep. Raises UserError where the store has no such sweep."""
    key = _record_key(sweep)
    data = store.get_bytes(key)
    if data is None:
        raise UserError(f"there is no sweep '{sweep}' in {store.uri}")
    return _parse(data, store.join(key))


def _record_key(sweep: str) -> str:
    return f"{sweep_key(check_run_name(sweep))}/sweep.yaml"


def _begun(store: Store, record: SweepRecord) -> SweepRecord:
    """A record without the members that have made nothing but a plan, and are not at work."""
    members = {name: values for name, values in record.members.items() if _has_begun(store, name)}
    kept = {key: {canonical_json(values[key]) for values in members.values()} for key in record.grid}
    grid = {key: [one for one in values if canonical_json(one) in kept[key]] for key, values in record.grid.items()}
    return record.model_copy(update={"grid": grid, "members": members})


def _has_begun(store: Store, run: str) -> bool:
    return bool(set(store.list(pointers_key(run))) - {pointer_key(run, PLAN.name)}) or is_live(store, run_key(run))


def _check_extends(old: SweepRecord, new: SweepRecord, sweep: str) -> None:
    other = _other_name(sweep)
    if list(old.grid) != list(new.grid):
        raise UserError(f"the sweep '{sweep}' is over {' and '.join(old.grid)}, not {' and '.join(new.grid)}{other}")
    for key, values in old.grid.items():
        gone = [value for value in values if canonical_json(value) not in map(canonical_json, new.grid[key])]
        if gone:
            raise UserError(
                f"the sweep '{sweep}' has {key}={','.join(map(plain_value, values))}; values can be added, and "
                f"{plain_value(gone[0])} is missing{other}"
            )


def _check_recipe(old: SweepRecord, source: str, member: Member, sweep: str) -> None:
    """Compares the recorded recipe with what the recorded member's would be now; it may be a member no longer."""
    try:
        now = load_recipe(source, {**member.overrides, **old.members[old.recipe_of]})
        differs = _compared(old.asked) != _compared(now)
    except DocumentError as error:
        raise UserError(f"the sweep '{sweep}' was recorded by another version ({error}){_other_name(sweep)}") from None
    if differs:
        raise UserError(f"the sweep '{sweep}' was made of a recipe with other settings{_other_name(sweep)}")


def _other_name(sweep: str) -> str:
    return f"; for another sweep give another name with --run, what both have is shared (here: '{sweep}')"


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
