"""`radlads serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from radlads.flows.cli.application import (
    EXAMPLE,
    Device,
    StorePlace,
    WorkPlace,
    absolute_template,
    app,
    check_device,
    checked_options,
)
from radlads.tasks.contracts.errors import UserError


@app.command(epilog=EXAMPLE.format("radlads serve my-run --port 8000"))
def serve(
    model: Annotated[str, typer.Argument(metavar="RUN|FOLDER", help="A finished run, or an exported folder.")],
    stage: Annotated[str | None, typer.Option(help="The model of this stage instead of the run's last.")] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; the run's or folder's name.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; one that others reach needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: one that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key", metavar="VARIABLE", help="Variable that has the key of clients; RADLADS_API_KEY, if set."
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Requests that are answered together.")] = 32,
    max_waiting: Annotated[int, typer.Option(help="Requests that wait; further ones are refused (429).")] = 128,
    max_prompt_tokens: Annotated[int, typer.Option(help="Longest prompt.")] = 32_768,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 4096,
    chat_template: Annotated[str | None, typer.Option(help="A template file, or template:NAME.")] = None,
    device: Device = "auto",
    store: StorePlace = None,
    work: WorkPlace = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code of the tokenizer's folder.")
    ] = False,
) -> None:
    """Serve a converted model through an OpenAI-compatible API, on loopback; requests are answered together."""
    from radlads.flows.talkers import find_talkers
    from radlads.tasks.contracts.requests.serve import ServeRequest, ServingLimits
    from radlads.tasks.contracts.settings import API_KEY, serving_key
    from radlads.tasks.launchers.terminal import run_at_terminal

    check_device(device)
    limits: dict[str, Any] = {"max_batch": max_batch, "max_waiting": max_waiting}
    limits |= {"max_prompt_tokens": max_prompt_tokens, "max_new_tokens": max_new_tokens}
    key = serving_key(api_key)
    asked: dict[str, Any] = {"host": host, "port": port, "has_key": key is not None, "device": device}
    asked |= {"limits": checked_options(ServingLimits, limits), "name": name or _name_of(model)}
    asked |= {"chat_template": absolute_template(chat_template), "trust_remote_code": trust_remote_code}
    found = find_talkers(model, ("student",), stage=stage, teacher_path=None, store=store, work=work)
    if not all(talker.is_student for talker in found["talkers"]):
        raise UserError(f"{model} is no converted model; `transformers serve` and vLLM serve others")
    request = checked_options(ServeRequest, found | asked)
    secrets = {} if key is None else {API_KEY: key}
    raise typer.Exit(run_at_terminal("radlads.tasks.jobs.serve.server", request, secrets))


def _name_of(model: str) -> str:
    """A run's name, or a folder's."""
    return Path(model).absolute().name if Path(model).is_dir() else model
