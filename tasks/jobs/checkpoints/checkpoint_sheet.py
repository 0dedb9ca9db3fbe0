"""Schema of checkpoint.json, and validation of the tensor shapes and types in the file headers."""

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
    """checkpoint.json. parameters: name → file with the parameter and its moments."""

    version: int
    step: Count
    adam_steps: Count
    seed: int
    world_size: Count
    parameters: dict[str, FileName]


def open_checkpoint(folder: Path, step: int, shapes: Mapping[str, Sequence[int]]) -> CheckpointSheet:
    """Read checkpoint.json and verify it against the step and the trained parameters.

    shapes: parameter name → shape. Raises UserError on any mismatch.
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
        raise _refused(step, f"one of its files cannot be read ({error})") from None
    return sheet


def _check_headers(folder: Path, step: int, files: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> None:
    with ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(folder / file, "pt")) for file in sorted(set(files.values()))}
        for name, file in files.items():
            for kind in KINDS:
                tensor = opened[file].get_slice(f"{kind}/{name}")
                if list(tensor.get_shape()) != list(shapes[name]) or tensor.get_dtype() != "F32":
                    raise _refused(
                        step,
                        f"{kind} of {name} is {tensor.get_dtype()} {list(tensor.get_shape())}, "
                        f"expected F32 {list(shapes[name])}",
                    )


def _refused(step: int, fault: str) -> UserError:
    return UserError(
        f"the checkpoint of step {step} cannot be resumed: {fault}; delete it to resume from the previous one"
    )
