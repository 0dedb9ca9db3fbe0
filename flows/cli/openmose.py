"""`radlads import-openmose` and `radlads export-openmose`: weights under OpenMOSE's names, read and written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from radlads.flows.cli.application import EXAMPLE, app
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.files import file_errors

_PROGRAM = "radlads.tasks.jobs.exchange.openmose"

Out = Annotated[Path, typer.Option(help="Folder to create; it must not exist yet.")]


@app.command(epilog=EXAMPLE.format("radlads import-openmose weights --teacher Qwen/Qwen3-8B --out student"))
def import_openmose(
    weights: Annotated[Path, typer.Argument(help="Folder of safetensors under OpenMOSE's names.")],
    teacher: Annotated[str, typer.Option(help="Folder or hub id of the model that they were converted from.")],
    out: Out,
    revision: Annotated[str | None, typer.Option(help="Commit of a teacher of the hub.")] = None,
    variant: Annotated[
        str | None,
        typer.Option(help="The author's name of the mixer (hxa079, hxa07b, ...), if the tensor names do not show it."),
    ] = None,
    rope: Annotated[
        bool | None, typer.Option("--rope/--no-rope", help="Whether its mixers rotate; as published by default.")
    ] = None,
    attention_rope: Annotated[
        bool | None, typer.Option("--attention-rope/--no-attention-rope", help="Likewise, its attention layers.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code of the teacher's tokenizer.")
    ] = False,
) -> None:
    """Convert a checkpoint of RWKVInside or RWKV-Infer into an exported student."""
    from radlads.tasks.contracts.pins.places import is_gguf, resolve_teacher_path
    from radlads.tasks.contracts.requests.openmose import OpenMoseImport
    from radlads.tasks.launchers.program import run_program

    _check_places(weights, out)
    place = resolve_teacher_path(teacher)
    if is_gguf(place):
        raise UserError(
            "--teacher must be the Hugging Face folder or hub id of the model; a GGUF file is not read here"
        )
    request = OpenMoseImport(
        weights=str(weights.absolute()),
        teacher=str(Path(place).absolute()) if Path(place).is_dir() else teacher,
        revision=revision,
        trust_remote_code=trust_remote_code,
        out=str(out.absolute()),
        architecture=variant,
        rope=rope,
        attention_rope=attention_rope,
    )
    run_program("import-openmose", _PROGRAM, request)


@app.command(epilog=EXAMPLE.format("radlads export-openmose student --out weights"))
def export_openmose(
    student: Annotated[Path, typer.Argument(help="Folder of an exported student.")],
    out: Out,
    marker: Annotated[
        bool, typer.Option("--marker", help="Add the published layer_architecture to every converted layer.")
    ] = False,
) -> None:
    """Write a student's weights under OpenMOSE's names, as safetensors."""
    from radlads.tasks.contracts.requests.openmose import OpenMoseExport
    from radlads.tasks.launchers.program import run_program

    _check_places(student, out)
    request = OpenMoseExport(student=str(student.absolute()), out=str(out.absolute()), marker=marker)
    run_program("export-openmose", _PROGRAM, request)


def _check_places(source: Path, out: Path) -> None:
    with file_errors(str(source)):
        if not source.is_dir():
            raise UserError(f"{source} is not a folder")
    with file_errors(str(out)):
        if out.exists():
            raise UserError(f"{out} exists already; name a new folder")
