"""`radlads export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from radlads.flows.cli.application import EXAMPLE, StorePlace, WorkPlace, app, say
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.pins.places import is_gguf

_DTYPES = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}
_DTYPES |= {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


@app.command(epilog=EXAMPLE.format("radlads export my-run --to hub:me/my-model --dtype bfloat16"))
def export(
    model: Annotated[str, typer.Argument(metavar="RUN|FOLDER", help="A finished run, or an exported folder.")],
    to: Annotated[str, typer.Option("--to", help="A new folder or FILE.gguf, s3://bucket/prefix, or hub:OWNER/NAME.")],
    stage: Annotated[str | None, typer.Option(help="The model of this stage instead of the published one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights: bfloat16 (bf16), float16, float32.")] = None,
    max_shard: Annotated[str | None, typer.Option("--max-shard", help="Largest file of weights, such as 2GB.")] = None,
    public: Annotated[bool, typer.Option("--public", help="A hub repository that is made is public.")] = False,
    store: StorePlace = None,
    work: WorkPlace = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code of the tokenizer's folder.")
    ] = False,
) -> None:
    """Write a model where others can use it: weights, code, tokenizer and card, or one GGUF file for llama.cpp."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    from radlads.flows.exports import Destination, gguf_target, published_folder
    from radlads.tasks.contracts.requests.folder import FolderExport, GgufExport
    from radlads.tasks.launchers.program import run_program

    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"--dtype {dtype}: choose bfloat16, float16 or float32 (bf16, f16, f32)")
    dtype = _DTYPES.get(dtype or "")
    if is_gguf(to):
        if max_shard is not None or public:
            raise UserError("--max-shard and --public are not for a GGUF file")
        target = gguf_target(to)
        folder = published_folder(model, stage=stage, store=store, work=work)
        name = Path(model).resolve().name if Path(model).is_dir() else model
        request = GgufExport(
            student=str(folder), out=str(target), name=name, dtype=dtype, trust_remote_code=trust_remote_code
        )
        run_program("export", "radlads.tasks.jobs.exchange.gguf", request)
        say(str(target))
        return
    size = None
    if max_shard is not None:
        try:
            size = int(TypeAdapter(ByteSize).validate_python(max_shard))
        except ValidationError as error:
            raise UserError(f"--max-shard {max_shard}: write it as 2GB or 500MB") from error
        if size < 1:
            raise UserError("--max-shard must be more than nothing")
    with Destination(to, public=public) as place:
        source = published_folder(model, stage=stage, store=store, work=work)
        place.check_card(source)
        run_program(
            "export",
            "radlads.tasks.jobs.exchange.folder",
            FolderExport(
                student=str(source),
                out=str(place.folder),
                dtype=dtype,
                max_shard_bytes=size,
                trust_remote_code=trust_remote_code,
            ),
        )
        say(place.send())
