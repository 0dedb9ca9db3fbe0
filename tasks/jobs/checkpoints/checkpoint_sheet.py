"""checkpoint.json, and whether the tensors beside it are those that the job wants: shapes and types, from headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError, safe_open

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.jobs.strict_json import Count, FileName, SheetError, StrictSheet, read_sheet

VERSION = 1
KINDS = ("param", "exp_avg", "exp_avg_sq")


class CheckpointSheet(StrictSheet):
    """checkpoint.json. parameters: name → file that holds it and its moments."""

    version: int
    step: Count
    adam_steps: Count
    seed: int
    world_size: Count
    parameters: dict[str, FileName]


def open_checkpoint(folder: Path, step: int, shapes: Mapping[str, Sequence[int]]) -> CheckpointSheet:
    """Read the sheet of the checkpoint of a step and check it against the parameters that the job trains.

    shapes: parameter name → its shape. Raises UserError where this is not the state of that step and those parameters.
    """
    try:
        sheet = read_sheet(folder / "checkpoint.json", CheckpointSheet)
    except (SheetError, OSError) as error:
        raise _refused(step, f"its checkpoint.json cannot be read ({error})") from None
    if sheet.version != VERSION or sheet.step != step:
        raise _refused(step, f"it was written by another version ({sheet.version}), or for step {sheet.step}")
    differing = set(shapes) ^ set(sheet.parameters)
    if differing:
        raise UserError(
            f"the checkpoint of step {step} and this job do not train the same parameters "
            f"({len(differing)} differ, e.g. {min(differing)}); delete that checkpoint"
        )
    try:
        _check_headers(folder, step, sheet.parameters, shapes)
    except (SafetensorError, OSError) as error:
        raise _refused(step, f"a file of it cannot be read ({error})") from None
    return sheet


def _check_headers(folder: Path, step: int, files: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> None:
    with ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(folder / file, "pt")) for file in sorted(set(files.values()))}
        for name, file in files.items():
            for kind in KINDS:
                found = opened[file].get_slice(f"{kind}/{name}")
                if list(found.get_shape()) != list(shapes[name]) or found.get_dtype() != "F32":
                    raise _refused(
                        step,
                        f"{kind} of {name} is {found.get_dtype()} {list(found.get_shape())}, "
                        f"expected F32 {list(shapes[name])}",
                    )


def _refused(step: int, fault: str) -> UserError:
    return UserError(
        f"the checkpoint of step {step} cannot be continued from: {fault}; delete it to go on from the one before"
    )
