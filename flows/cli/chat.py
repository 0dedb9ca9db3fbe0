"""`radlads chat`."""

from __future__ import annotations

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


@app.command(epilog=EXAMPLE.format("radlads chat my-run --both --temperature 0"))
def chat(
    model: Annotated[str, typer.Argument(metavar="RUN|FOLDER", help="A finished run, or an exported folder.")],
    both: Annotated[bool, typer.Option("--both", help="The teacher answers, too, then the student.")] = False,
    teacher: Annotated[bool, typer.Option("--teacher", help="The run's teacher alone.")] = False,
    stage: Annotated[str | None, typer.Option(help="The model of this stage instead of the run's last.")] = None,
    teacher_path: Annotated[
        str | None, typer.Option("--teacher-path", help="Folder or hub id of the teacher, for a FOLDER.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this mass.")] = 0.95,
    top_k: Annotated[int, typer.Option(help="Sample among so many tokens; 0: all.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 512,
    seed: Annotated[int | None, typer.Option(help="Answers can be had again with the same seed.")] = None,
    chat_template: Annotated[str | None, typer.Option(help="A template file, or template:NAME.")] = None,
    device: Device = "auto",
    store: StorePlace = None,
    work: WorkPlace = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code of the tokenizer's folder.")
    ] = False,
) -> None:
    """Talk to a converted model, to its teacher, or to both; /help lists what can be typed."""
    from radlads.flows.talkers import find_talkers
    from radlads.tasks.contracts.requests.talk import Drawing, TalkRequest
    from radlads.tasks.launchers.terminal import run_at_terminal

    if both and teacher:
        raise UserError("--both and --teacher exclude each other")
    check_device(device)
    drawn: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    drawn |= {"max_new_tokens": max_new_tokens, "seed": seed}
    wanted = ("teacher",) if teacher else ("teacher", "student") if both else ("student",)
    found = find_talkers(model, wanted, stage=stage, teacher_path=teacher_path, store=store, work=work)
    request = TalkRequest(
        **found,
        trust_remote_code=trust_remote_code,
        chat_template=absolute_template(chat_template),
        system=system,
        sampling=checked_options(Drawing, drawn),
        device=device,
    )
    raise typer.Exit(run_at_terminal("radlads.tasks.jobs.talk.chat", request))
