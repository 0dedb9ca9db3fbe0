"""`radlads init`."""

from __future__ import annotations

import os
import re
import shlex
import sys
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from radlads.flows.cli.application import ERR, EXAMPLE, OUT, app, say
from radlads.tasks.contracts.errors import UserError

if TYPE_CHECKING:
    from radlads.tasks.contracts.requests.draft import Draft

_PROGRAM = "radlads.tasks.jobs.draft.draft"
_GPUS = re.compile(r"(?:(?P<count>\d+)\s*[x×*]\s*)?(?P<kind>[A-Za-z0-9. _-]*[A-Za-z][A-Za-z0-9 _-]*)")
_MEMORY = re.compile(r"(?P<size>\d+(?:\.\d+)?)\s*gi?b", re.IGNORECASE)
_EIGHT = (8, "H100", None)


@app.command(epilog=EXAMPLE.format("radlads init Qwen/Qwen3-8B --gpus 8xH100 --budget 150"))
def init(
    model: Annotated[str, typer.Argument(help="Hub id, Hugging Face folder or GGUF file of the teacher; or `demo`.")],
    hybrid: Annotated[
        bool, typer.Option("--hybrid/--pure", help="Keep a quarter of the softmax layers, or none.")
    ] = True,
    budget: Annotated[float | None, typer.Option(help="Dollars: take the largest training that they pay for.")] = None,
    gpus: Annotated[
        str | None, typer.Option(help="Machine: 8xH100, 2x48GB, cpu. This one's GPUs by default, else 8xH100.")
    ] = None,
    price: Annotated[float | None, typer.Option(help="Dollars an hour for one GPU.")] = None,
    effort: Annotated[str | None, typer.Option(help="How much to train: trial, short, usual, full.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Your text: file, folder or hub id; several times for several.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; NAME.yaml in this folder by default.")] = None,
) -> None:
    """Write a recipe for a teacher and a machine, with a reason at every choice, and print what it would cost."""
    from tempfile import TemporaryDirectory

    from radlads.tasks.contracts.parsing.files import file_errors
    from radlads.tasks.contracts.requests.draft import Draft, DraftRequest
    from radlads.tasks.launchers.program import run_program

    count, kind, memory = parse_gpus(gpus) if gpus is not None else _own_gpus() or _EIGHT
    if budget is not None and not 0 < budget < inf:
        raise UserError("--budget: give the dollars that there are, e.g. --budget 150")
    if budget is not None and effort is not None:
        raise UserError("--budget and --effort exclude each other: the budget chooses the effort")
    if budget is not None and count == 0:
        raise UserError("--budget is for rented GPUs; a CPU has no price here")
    if price is not None and not 0 <= price < inf:
        raise UserError("--price: dollars an hour for one GPU, 0 or more")
    name = recipe_name(model, hybrid)
    place = out or Path(f"{name}.yaml")
    with file_errors(str(place)):
        if place.exists():
            raise UserError(f"{place} exists already; give another file with --out")
        if not place.absolute().parent.is_dir():
            raise UserError(f"{place.absolute().parent} is no folder; make it first")
    if place.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {place}: a recipe's file ends in .yaml")
    with TemporaryDirectory(prefix="radlads-init-") as folder:
        answer = Path(folder, "draft.json")
        request = DraftRequest(
            teacher=_absolute(model),
            name=name,
            command=shlex.join(["radlads", *sys.argv[1:]]),
            hybrid=hybrid,
            budget=budget,
            effort=effort,
            data=tuple(_absolute(one) for one in data or ()),
            gpus=count,
            gpu=kind,
            gpu_memory_gib=memory,
            price=price,
            out=str(answer),
        )
        with OUT.status("looking at the teacher, and planning"):
            run_program("init", _PROGRAM, request)
        draft = Draft.model_validate_json(answer.read_bytes())
    _write(place, draft.text)
    _show(draft, place, "a CPU" if count == 0 else f"{count} × {kind or f'{memory:g} GiB'}")


def _write(place: Path, text: str) -> None:
    """Make the file, whole or not at all. Raises UserError if there is one meanwhile."""
    from radlads.tasks.contracts.parsing.files import file_errors

    partial = place.with_name(f".{place.name}.{os.getpid()}")
    with file_errors(str(place)):
        try:
            partial.write_text(text, encoding="utf-8")
            os.link(partial, place)
        except FileExistsError as error:
            raise UserError(f"{place} was written meanwhile; give another file with --out") from error
        finally:
            partial.unlink(missing_ok=True)


def parse_gpus(text: str) -> tuple[int, str, float | None]:
    """ "8xH100" → (8, "H100", None); "2x48GB" → (2, "", 48.0); "cpu" → (0, "", None). Raises UserError."""
    word = text.strip()
    if word.lower() in ("cpu", "0", "none"):
        return 0, "", None
    match = _GPUS.fullmatch(word)
    number, kind = (match["count"], (match["kind"] or "").strip()) if match else (None, "")
    if match is None:
        raise UserError(f"--gpus '{text[:40]}': write it as 8xH100, as 2x48GB, or as cpu")
    if number is not None and not 1 <= int(number[:9]) <= 4096:
        raise UserError(f"--gpus '{text[:40]}': 1 to 4096 GPUs can be planned for")
    size = _MEMORY.fullmatch(kind)
    if size is not None and not 1 <= float(size["size"]) <= 4096:
        raise UserError(f"--gpus {text[:40]}: a GPU of {size['size']} GiB cannot be planned for")
    return int(number or 1), "" if size else kind, float(size["size"]) if size else None


def recipe_name(model: str, hybrid: bool) -> str:
    """A name for the recipe: the model's own, in lower case letters, digits, dots and dashes."""
    last = model.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
    plain = re.sub(r"[^a-z0-9.]+", "-", last.lower()).strip("-.") or "mine"
    return f"{plain[:60]}-{'hybrid' if hybrid else 'pure'}"


def _own_gpus() -> tuple[int, str, float | None] | None:
    """This machine's GPUs, all taken to be as the first one; None without."""
    import subprocess

    try:
        asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
        sizes = [float(line) / 1024 for line in done.stdout.splitlines()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return (len(sizes), "", round(sizes[0], 1)) if sizes else None


def _absolute(name: str) -> str:
    """A local path whole, since the program works elsewhere; any other name as it is."""
    path = Path(name).expanduser()
    if (name and path.exists()) or name.startswith((".", "~")):
        return str(path.resolve())
    return str(path.absolute()) if "*" in name else name


def _show(draft: Draft, place: Path, machine: str) -> None:
    from rich.markup import escape
    from rich.table import Table

    from radlads.tasks.plan_table import short_count, short_duration

    for line in draft.facts:
        say(line)
    OUT.print(f"\nwhat a {draft.kind} student of it takes on {machine}, planned:")
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    for heading in ("", "effort", "tokens", "time", "GPU h", "cost"):
        table.add_column(heading, justify="left" if heading in ("", "effort") else "right", no_wrap=True)
    table.add_column("what it is, and what a cheaper one loses", overflow="fold")
    for offer in draft.offers:
        words = offer.fault or offer.words + (f". Beside the next: {offer.loses}" if offer.loses else "")
        table.add_row(
            "→" if offer.name == draft.chosen else "",
            offer.name,
            short_count(offer.tokens),
            short_duration(offer.seconds),
            "" if offer.gpu_hours is None else f"{offer.gpu_hours:,.1f}",
            _price(offer.dollars),
            escape(words),
        )
    OUT.print(table)
    for note in draft.notes:
        ERR.print(f"[yellow]note[/]   {escape(note)}", highlight=False, soft_wrap=True)
    typed = shlex.quote(str(place))
    say(f"\nwrote {place} ({draft.chosen})")
    say(f"next   radlads plan {typed}   (reads weights and text too)   then   radlads run {typed} --run NAME")


def _price(dollars: float | None) -> str:
    if dollars is None:
        return ""
    return f"${dollars:,.0f}" if dollars >= 10 else f"${dollars:.2f}"
