"""Converts a store of the earlier layout (schema 2: runs/<run>/<stage>/ and datasets/<digest>/) to this one.

No file is downloaded: files get a second name, by a link in a folder or a server-side copy in a bucket. Digests are
computed anew, from the old specs in their current form and the new digests of their inputs, so that current runs reuse
the products. Old places are removed last, after everything was verified at its new place; an interrupted conversion can
be started again and continues. `upgrade.json` stays in the store and maps old places to new ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import InputRef
from radlads.tasks.contracts.locks.lease import run_lease
from radlads.tasks.contracts.specs import StageSpec, spec_digest
from radlads.tasks.contracts.stages import STAGES, TOKENIZE
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.errors import StoreError
from radlads.tasks.contracts.store.layout import DATASETS, RUNS, former_keys, mark_layout, product_key
from radlads.tasks.contracts.store.pointers import Pointer, read_pointer, write_history
from radlads.tasks.contracts.tracking import retag_run
from radlads.tasks.stage import stage_label
from radlads.tasks.upkeep.former import Former, move_product, read_former, spec_of_today
from radlads.tasks.upkeep.listing import stored_products

_DONE = "upgrade.json"


@dataclass(frozen=True)
class Moved:
    """A product at its new place. old: its old prefix; run: the run that points at it, empty for a dataset."""

    old: str
    old_digest: str
    run: str
    stage: str
    digest: str
    label: str
    committed: bool

    @property
    def key(self) -> str:
        """Its new prefix."""
        return product_key(self.stage, self.digest)


@dataclass
class Upgrade:
    """The result of a conversion. left: old prefix → why it was not converted."""

    moved: list[Moved] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    removed: int = 0


def upgrade_store(
    store: Store,
    work: Path,
    *,
    keep_old: bool = False,
    tracking: str = "",
    tell: Callable[[str], None] = lambda line: None,
) -> Upgrade:
    """Convert a store; does nothing if it is converted already. work: this machine's scratch, in the earlier layout.
    tracking: MLflow, whose runs of stages get the new digests. tell: called with a line for each product. Raises
    UserError if a run is active in the store, CorruptArtifact, StoreError.
    """
    with ExitStack() as leases:
        for run in sorted({key.split("/")[1] for key in former_keys(store) if key.startswith(f"{RUNS}/")}):
            leases.enter_context(run_lease(store, run, work))
        done = _Conversion(store, work, tracking, tell, _read_done(store))
        for prefix in sorted({"/".join(_prefix(key)) for key in former_keys(store)}):
            done.convert(prefix)
        _write_pointers(store, done)
        if done.moved:
            store.put_bytes(_DONE, json.dumps([vars(one) for one in done.moved.values()]).encode())
        if not keep_old:
            done.result.removed = _remove(store, done.moved.values())
    mark_layout(store)
    return done.result


def _prefix(key: str) -> tuple[str, ...]:
    """The parts of a key that name a product of the earlier layout."""
    parts = key.split("/")
    return tuple(parts[:2] if parts[0] == DATASETS else parts[:3])


class _Conversion:
    """Converts one product after the other, each after its inputs."""

    def __init__(
        self, store: Store, work: Path, tracking: str, tell: Callable[[str], None], done: Mapping[str, Moved]
    ) -> None:
        self.store, self.work, self.tracking, self.tell = store, work, tracking, tell
        self.result = Upgrade()
        self.data: dict[str, set[str]] = {}
        """Run → digests of all datasets that it made, or that its stages read."""
        self.moved = dict(done)
        self._by_digest = {one.old_digest: one for one in done.values()}
        self._former: dict[str, Former | None] = {}

    def convert(self, prefix: str) -> Moved | None:
        """Convert the product at an old prefix; None if it cannot be, with the reason in `result.left`."""
        if prefix in self.moved or prefix in self.result.left:
            return self.moved.get(prefix)
        try:
            former = self._read(prefix)
            moved = None if former is None else self._convert(former)
        except UserError as error:  # a spec that cannot be read any more, a missing input
            self.result.left[prefix] = str(error).splitlines()[0]
            self.tell(f"{prefix} was not converted: {self.result.left[prefix]}")
            return None
        if moved is None:
            self.result.left[prefix] = (
                "its spec is lost (a killed flow left it on its machine: convert the store there, with --work)"
            )
            return None
        self.moved[prefix] = moved
        self._by_digest.setdefault(moved.old_digest, moved)
        self.result.moved.append(moved)
        self.tell(f"{prefix} → {moved.key}{'' if moved.committed else ' (unfinished)'}")
        return moved

    def _read(self, prefix: str) -> Former | None:
        if prefix not in self._former:
            self._former[prefix] = read_former(self.store, prefix, self.work)
        return self._former[prefix]

    def _convert(self, former: Former) -> Moved:
        inputs = {name: self._input(former, name, ref) for name, ref in former.inputs.items()}
        spec = spec_of_today(former)
        digest = _digest(former, spec, inputs)
        key = product_key(former.stage, digest)
        committed = move_product(self.store, former, key, digest, spec, inputs)
        if self.tracking and former.mlflow_run_id is not None:
            retag_run(self.tracking, former.mlflow_run_id, digest)
        read = {ref.digest for ref in inputs.values() if f"/{TOKENIZE.name}/" in ref.uri}
        is_dataset = former.prefix.startswith(f"{DATASETS}/")
        self.data.setdefault(former.run, set()).update({digest} if is_dataset else read)
        run = "" if is_dataset else former.run
        label = stage_label(former.stage, spec)
        return Moved(former.prefix, former.digest, run, former.stage, digest, label, committed)

    def _input(self, former: Former, name: str, ref: InputRef) -> InputRef:
        """An input at its new place: looked up by its old one or, if the store was moved since, by its digest."""
        prefix = next((p for p in _places(ref.uri) if self._holds(p, ref.digest)), None)
        moved = self.convert(prefix) if prefix is not None else self._by_digest.get(ref.digest)
        if moved is None:
            raise UserError(f"its input '{name}', {ref.uri}, is not in this store or cannot be converted")
        return InputRef(uri=self.store.join(moved.key), digest=moved.digest)

    def _holds(self, prefix: str, digest: str) -> bool:
        if prefix in self.moved:
            return self.moved[prefix].old_digest == digest
        found = self._read(prefix)
        return found is not None and found.digest == digest


def _places(uri: str) -> Iterator[str]:
    """The prefix within a store that an old uri ends with."""
    parts = uri.rstrip("/").split("/")
    if len(parts) >= 2 and parts[-2] == DATASETS:
        yield "/".join(parts[-2:])
    if len(parts) >= 3 and parts[-3] == RUNS:
        yield "/".join(parts[-3:])


def _digest(former: Former, spec: StageSpec, inputs: Mapping[str, InputRef]) -> str:
    try:
        return spec_digest(former.stage, spec, dict(inputs))
    except ValueError as error:
        raise UserError(f"{error}: it was made by a version that did not pin contents") from None


def _write_pointers(store: Store, done: _Conversion) -> None:
    """One pointer per stage of each run, and one per dataset that its stages read."""
    now = datetime.now(UTC)
    order = list(STAGES)
    datasets = {one.digest: one for one in done.moved.values() if one.stage == TOKENIZE.name}
    wanted = [(one.run, one) for one in sorted(done.result.moved, key=lambda one: order.index(one.stage)) if one.run]
    wanted += [(run, datasets[d]) for run, read in done.data.items() if run for d in sorted(read) if d in datasets]
    for run, one in wanted:
        if read_pointer(store, run, one.label) is None:
            uri = store.join(one.key)
            pointer = Pointer(stage=one.stage, digest=one.digest, uri=uri, time=now, token=0)
            write_history(store, run, one.label, pointer)


def _remove(store: Store, moved: Iterable[Moved]) -> int:
    """Remove the old places of products that are complete at their new ones; returns how many. All are checked before
    any is removed."""
    there = [one for one in moved if store.list(one.old)]
    for one in there:
        if one.committed:
            store.verify(one.key, store.open_manifest(one.key))
    for one in there:
        store.delete(one.old)
    return len(there)


def _read_done(store: Store) -> dict[str, Moved]:
    """Old place → product that earlier conversions have converted, if it has not been deleted since: then it is
    converted again, before its old place is removed. Raises StoreError."""
    data = store.get_bytes(_DONE)
    try:
        rows = [Moved(**row) for row in json.loads(data)] if data else []
    except (ValueError, TypeError):
        raise StoreError(f"{store.join(_DONE)} was written by a conversion of another version") from None
    committed = {product.key: product.committed for product in stored_products(store)} if rows else {}
    return {row.old: row for row in rows if row.key in committed and (committed[row.key] or not row.committed)}
