"""A rank's part of a checkpoint: safetensors files that go from memory to the store, and the sheet that lists them.

The names carry a mark that is new for each save, so that no remnant of another attempt is mistaken for a part. A rank
writes its sheet, `part-<mark>-<rank>.json`, after its files were verified; the first rank waits for all sheets before
it commits. A sheet may also say why there is no part, so that nobody waits for it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence

from pydantic import ValidationError
from torch import Tensor

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import FileEntry, Sheet
from radlads.tasks.contracts.parsing.credentials import hide
from radlads.tasks.contracts.store.errors import StoreError
from radlads.tasks.contracts.store.files import Block
from radlads.tasks.contracts.store.open import Store
from radlads.tasks.jobs.checkpoints.state_slices import StateSlice

_POLL_SECONDS = 0.2
# Longer than any upload. A rank that died is noticed by the launcher, which ends the others.
_PATIENCE_SECONDS = 3 * 3600.0


class PartSheet(Sheet):
    """part-<mark>-<rank>.json. files: with their paths in the checkpoint. fault: why there are none; mendable: by the
    user, so that another attempt would fail as well."""

    files: tuple[FileEntry, ...] = ()
    fault: str = ""
    mendable: bool = False


class PartWriter:
    """Writes one rank's part of one checkpoint. prefix: of the checkpoint in the store. mark: of this save."""

    def __init__(self, store: Store, prefix: str, mark: str, rank: int) -> None:
        self.store, self.prefix, self.mark, self.rank = store, prefix, mark, rank

    def write(self, files: Sequence[Sequence[StateSlice]], copies: Iterable[Tensor], random: Tensor) -> list[FileEntry]:
        """Upload a file for each of `files`, whose numbers are in `copies`; the random state goes into the first.

        Raises CorruptArtifact, StoreError.
        """
        entries = []
        for number, (file, copied) in enumerate(zip(files, copies, strict=True)):
            extra = {f"random/{self.rank}": random} if number == 0 else {}
            blocks: list[Block] = [_header(file, extra), _view(copied), *(_view(tensor) for tensor in extra.values())]
            entries.append(self.put(f"state-{self.mark}-{self.rank:05d}-{number:05d}.safetensors", blocks))
        return entries

    def put(self, name: str, blocks: Sequence[Block]) -> FileEntry:
        """Upload one file of the checkpoint."""
        entry = self.store.put_blocks(f"{self.prefix}/{name}", blocks)
        return entry.model_copy(update={"path": name})

    def announce(self, files: Sequence[FileEntry]) -> None:
        """Tell the first rank that this part is complete."""
        self._put_sheet(PartSheet(files=tuple(files)))

    def give_up(self, error: BaseException) -> None:
        """Tell the first rank that there will be no part. Raises nothing: the error itself is what is reported."""
        fault = hide(" ".join(f"{type(error).__name__}: {error}".split()))[:500]
        try:
            self._put_sheet(PartSheet(fault=fault, mendable=isinstance(error, UserError)))
        except (StoreError, OSError):  # then the launcher ends the first rank, once this one has exited
            return

    def others(self, ranks: int) -> list[FileEntry]:
        """The files of all other ranks, waiting for them. Raises StoreError, UserError for a rank that gave up."""
        return [entry for rank in range(ranks) if rank != self.rank for entry in self._part_of(rank)]

    def _part_of(self, rank: int) -> tuple[FileEntry, ...]:
        key, began = self._sheet_key(rank), time.monotonic()
        while (data := self.store.get_bytes(key)) is None:
            if time.monotonic() - began > _PATIENCE_SECONDS:
                raise StoreError(f"{self.store.join(key)}: rank {rank} has not written its part of the checkpoint")
            time.sleep(_POLL_SECONDS)
        try:
            sheet = PartSheet.model_validate_json(data)
        except ValidationError as error:
            raise StoreError(f"{self.store.join(key)} cannot be read: {error.errors()[0]['msg']}") from None
        if sheet.fault:
            raise (UserError if sheet.mendable else StoreError)(
                f"rank {rank} could not write its part of the checkpoint: {sheet.fault}"
            )
        return sheet.files

    def _put_sheet(self, sheet: PartSheet) -> None:
        self.store.put_bytes(self._sheet_key(self.rank), sheet.model_dump_json().encode())

    def _sheet_key(self, rank: int) -> str:
        return f"{self.prefix}/part-{self.mark}-{rank:05d}.json"


def _header(file: Sequence[StateSlice], extra: dict[str, Tensor]) -> bytes:
    """The header of a safetensors file: `<kind>/<parameter>/<first element>` [elements] F32, and bytes by name.

    safetensors' own writer needs all tensors of a file in memory a second time.
    """
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for piece in file:
        for kind in piece.kinds:
            end = place + 4 * piece.numel
            described[f"{kind}/{piece.name}/{piece.start}"] = _tensor("F32", piece.numel, place, end)
            place = end
    for name, tensor in extra.items():
        described[name] = _tensor("U8", tensor.numel(), place, place + tensor.numel())
        place += tensor.numel()
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _tensor(dtype: str, numel: int, begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": [numel], "data_offsets": [begin, end]}


def _view(tensor: Tensor) -> memoryview:
    return tensor.numpy().data
