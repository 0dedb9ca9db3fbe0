"""Reading a checkpoint: checkpoint.json, which slices its files hold, and any slice of the state out of them.

Version 2 divides flattened parameters over files as the ranks held them: tensors `<kind>/<parameter>/<first element>`.
Version 1 holds each tensor whole, `<kind>/<parameter>`, in the file that checkpoint.json names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.jobs.checkpoints.state_slices import KINDS, StateSlice
from radlads.tasks.jobs.strict_json import Count, FileName, SheetError, StrictSheet, read_sheet

VERSION = 2
_WHOLE = 1  # the version before
_SHOWN = 120


class CheckpointSheet(StrictSheet):
    """checkpoint.json. parameters: name → shape; in version 1 → file with the parameter and its moments."""

    version: Count
    step: Count
    adam_steps: Count
    seed: int
    world_size: Count
    parameters: dict[str, FileName | list[Count]]


@dataclass(frozen=True)
class _Piece:
    """Elements start ... start + numel of a parameter, in `file` as the tensors <kind>/<key>."""

    start: int
    numel: int
    file: Any
    key: str


class Checkpoint:
    """An open checkpoint, verified against the parameters that are trained; a context manager."""

    def __init__(
        self, folder: Path, step: int, shapes: Mapping[str, Sequence[int]], kinds: Sequence[str] = KINDS
    ) -> None:
        """shapes: parameter name → shape. kinds: what there is of each element. Raises UserError on any mismatch."""
        self._kinds = kinds
        self.sheet = _read_sheet(folder, step, shapes)
        self._step, self._stack = step, ExitStack()
        try:
            self._files = {
                path.name: self._stack.enter_context(safe_open(path, "pt"))
                for path in sorted(folder.glob("*.safetensors"))
            }
            self._pieces = self._whole(shapes) if self.sheet.version == _WHOLE else self._sliced(shapes)
        except (SafetensorError, OSError) as error:
            self._stack.close()
            raise _refused(step, f"one of its files cannot be read ({error})") from None
        except UserError:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stack.close()

    def load(self, slices: Iterable[StateSlice]) -> None:
        """Fill slices of the live state. Only what they need is read."""
        for wanted in slices:
            for piece in self._pieces[wanted.name]:
                first = max(wanted.start, piece.start)
                count = min(wanted.start + wanted.numel, piece.start + piece.numel) - first
                if count <= 0:
                    continue
                for kind in wanted.kinds:
                    stored = piece.file.get_tensor(f"{kind}/{piece.key}").view(-1)  # a map of the file, not a copy
                    target = wanted.tensors[kind].narrow(0, first - wanted.start, count)
                    target.copy_(stored.narrow(0, first - piece.start, count))

    def random_state(self, rank: int) -> Tensor | None:
        """The random state of a rank, [bytes] uint8; None if the checkpoint was written by fewer ranks."""
        if self.sheet.version == _WHOLE:
            states = self._files["random.safetensors"].get_tensor("states")
            return states[rank].clone() if rank < len(states) else None
        name = f"random/{rank}"
        found = next((file for file in self._files.values() if name in file.keys()), None)  # noqa: SIM118
        return None if found is None else found.get_tensor(name).clone()

    def _whole(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[_Piece]]:
        pieces = {}
        for name, file in self.sheet.parameters.items():
            if file not in self._files:
                raise _refused(self._step, f"it has no file {file}")
            opened = self._files[str(file)]
            for kind in self._kinds:
                self._check(opened, f"{kind}/{name}", f"{kind} of {name}", list(shapes[name]))
            pieces[name] = [_Piece(0, prod(shapes[name]), opened, name)]
        return pieces

    def _sliced(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[_Piece]]:
        pieces: dict[str, list[_Piece]] = {name: [] for name in shapes}
        for opened in self._files.values():
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                kind, _, rest = key.partition("/")
                name, _, start = rest.rpartition("/")
                if kind != "param":
                    continue
                if name not in pieces or not start.isdecimal():
                    raise _refused(self._step, f"it holds {key}, which is no part of a trained parameter")
                numel = prod(opened.get_slice(key).get_shape())
                for one in self._kinds:
                    self._check(opened, f"{one}/{rest}", f"{one} of {name} from {start}", [numel])
                pieces[name].append(_Piece(int(start), numel, opened, rest))
        for name, found in pieces.items():
            found.sort(key=lambda piece: piece.start)
            place = 0
            for piece in found:
                if piece.start != place:
                    break
                place += piece.numel
            if place != prod(shapes[name]) or sum(piece.numel for piece in found) != place:
                raise _refused(self._step, f"{name} is not whole: its {len(found)} parts do not join at {place}")
        return pieces

    def _check(self, file: Any, key: str, what: str, shape: list[int]) -> None:
        tensor = file.get_slice(key)
        if list(tensor.get_shape()) != shape or tensor.get_dtype() != "F32":
            raise _refused(
                self._step, f"{what} is {tensor.get_dtype()} {list(tensor.get_shape())}, expected F32 {shape}"
            )


def _read_sheet(folder: Path, step: int, shapes: Mapping[str, Sequence[int]]) -> CheckpointSheet:
    try:
        sheet = read_sheet(folder / "checkpoint.json", CheckpointSheet)
    except (SheetError, OSError) as error:
        raise _refused(step, f"its checkpoint.json cannot be read ({error})") from None
    if sheet.version not in (_WHOLE, VERSION) or sheet.step != step:
        raise _refused(step, f"it was written by another version ({sheet.version}), or for step {sheet.step}")
    differing = set(shapes) ^ set(sheet.parameters)
    if differing:
        raise UserError(
            f"the checkpoint of step {step} and this job do not train the same parameters "
            f"({len(differing)} differ, e.g. {ascii(min(differing))[:_SHOWN]}); delete that checkpoint"
        )
    for name, noted in sheet.parameters.items():
        if isinstance(noted, str) != (sheet.version == _WHOLE):
            raise _refused(step, f"checkpoint.json of version {sheet.version} does not describe {name} so")
        if not isinstance(noted, str) and noted != list(shapes[name]):
            raise _refused(step, f"{name} is {str(noted)[:_SHOWN]}, expected {list(shapes[name])}")
    return sheet


def _refused(step: int, fault: str) -> UserError:
    return UserError(
        f"the checkpoint of step {step} cannot be resumed: {fault}; delete it to resume from the previous one"
    )
