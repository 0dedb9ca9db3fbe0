"""`radlads store`: list a store, collect its garbage, upgrade a store of an earlier layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from radlads.flows.cli.application import EXAMPLE, OUT, StorePlace, app, say
from radlads.tasks.contracts.errors import UserError

if TYPE_CHECKING:
    from radlads.tasks.contracts.store.base import Store
    from radlads.tasks.upkeep.gc import Garbage
    from radlads.tasks.upkeep.listing import StoredProduct

store_app = typer.Typer(help="Runs and products: list, collect garbage, upgrade.", no_args_is_help=True)
app.add_typer(store_app, name="store")


@store_app.command("list", epilog=EXAMPLE.format("radlads store list"))
def list_store(store: StorePlace = None) -> None:
    """List the runs, the product of each of their stages, and how much of the store is shared or belongs to no run."""
    from rich.table import Table

    from radlads.tasks.contracts.store.layout import check_layout
    from radlads.tasks.upkeep.listing import stored_products, stored_runs

    place = _open(store)
    check_layout(place)
    products = {product.key: product for product in stored_products(place)}
    runs = stored_runs(place)
    table = Table("run", "stage", "product", "size", "since", box=None, header_style="bold")
    for run in runs:
        pointers = run.pointers | {f"{stage} (evaluated)": pointer for stage, pointer in run.judged.items()}
        for label, pointer in sorted(pointers.items(), key=lambda item: item[1].time):
            found = products.get(pointer.key)
            table.add_row(
                run.name,
                label,
                pointer.digest[:12],
                _state(place, pointer.key, found),
                f"{pointer.time:%Y-%m-%d %H:%M}",
            )
    OUT.print(table)
    pointed = [key for run in runs for key in set(run.keys(history=True))]
    shared = {key for key in pointed if pointed.count(key) > 1}
    total, free = sum(p.size for p in products.values()), sum(p.size for k, p in products.items() if k not in pointed)
    say(
        f"{len(runs)} runs, {len(products)} products, {_size(total)}; {len(shared)} products are shared by runs; "
        f"{_size(free)} belong to no run (radlads store gc)"
    )


@store_app.command(epilog=EXAMPLE.format("radlads store where my-run distill"))
def where(
    run: Annotated[str, typer.Argument(help="Name of the run.")],
    stage: Annotated[str, typer.Argument(help="Stage, e.g. publish, distill or tokenize-train.")] = "publish",
    store: StorePlace = None,
) -> None:
    """Print the address of a run's product."""
    from radlads.tasks.contracts.settings import check_run_name
    from radlads.tasks.contracts.store.layout import check_layout
    from radlads.tasks.contracts.store.pointers import read_pointers

    place = _open(store)
    check_layout(place)
    pointers = read_pointers(place, check_run_name(run))
    if stage not in pointers:
        known = ", ".join(sorted(pointers)) or "nothing"
        raise UserError(f"the run '{run}' in {place.uri} has no '{stage}'; it has {known}")
    if place.read_manifest(pointers[stage].key) is None:
        raise UserError(f"'{stage}' of the run '{run}' is not finished: nothing is committed at {pointers[stage].key}")
    say(place.join(pointers[stage].key))


@store_app.command(epilog=EXAMPLE.format("radlads store gc --older-than 7"))
def gc(
    keep_runs: Annotated[str, typer.Option(help="Runs whose products stay, separated by commas; or all.")] = "all",
    older_than: Annotated[float, typer.Option(metavar="DAYS", help="Only what is older than that.", min=0)] = 0.0,
    drop_history: Annotated[
        bool, typer.Option("--drop-history", help="Also products that kept runs used before their settings changed.")
    ] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Delete it; without this, it is only listed.")] = False,
    store: StorePlace = None,
) -> None:
    """List products that no run, or no kept run, points at. Nothing is deleted without --delete."""
    from radlads.tasks.contracts.settings import check_run_name
    from radlads.tasks.upkeep.gc import Wish, collect, find_garbage

    names = None if keep_runs == "all" else [check_run_name(name.strip()) for name in keep_runs.split(",")]
    wish = Wish(runs=names, history=not drop_history, older_than_days=older_than)
    place = _open(store)
    if not delete:
        found = find_garbage(place, wish)
        _show(found)
        say(f"{len(found)} products, {_size(sum(one.product.size for one in found))}; --delete deletes them")
        return
    gone = list(collect(place, wish, Path.cwd()))
    _show(gone)
    freed = [one for one in gone if not one.kept]
    say(f"deleted {len(freed)} products, {_size(sum(one.product.size for one in freed))}")


@store_app.command(epilog=EXAMPLE.format("radlads store upgrade --store s3://bucket/prefix"))
def upgrade(
    store: StorePlace = None,
    tracking: Annotated[
        str | None, typer.Option(help="MLflow whose runs are to be linked to the new places; or none.")
    ] = None,
    work: Annotated[str | None, typer.Option(help="Folder in which jobs run, the same as for these runs.")] = None,
    keep_old: Annotated[bool, typer.Option("--keep-old", help="Keep the files at the old places as well.")] = False,
) -> None:
    """Convert a store of the layout before this one (products under runs/ and datasets/). Can be repeated."""
    from radlads.tasks.contracts.settings import resolve_settings
    from radlads.tasks.contracts.store.open import find_store
    from radlads.tasks.upkeep.upgrade import upgrade_store

    settings = resolve_settings(store=store, tracking=tracking, work=work)
    done = upgrade_store(
        find_store(settings.store), settings.work, keep_old=keep_old, tracking=settings.tracking, tell=say
    )
    say(f"{len(done.moved)} products converted, {done.removed} old places removed, {len(done.left)} left as they were")
    if done.left:
        raise UserError("\n".join(f"{prefix} was left where it is: {why}" for prefix, why in done.left.items()))


def _open(store: str | None) -> Store:
    from radlads.tasks.contracts.settings import resolve_settings
    from radlads.tasks.contracts.store.open import find_store

    return find_store(resolve_settings(store=store).store)


def _state(store: Store, key: str, found: StoredProduct | None) -> str:
    """The size of what a run points at, and whether it is whole."""
    from radlads.tasks.contracts.locks.lease import is_live

    if found is None:
        return "just begun" if is_live(store, key) else "gone"
    return _size(found.size) + ("" if found.committed else ", unfinished")


def _show(found: list[Garbage]) -> None:
    from rich.table import Table

    table = Table("product", "size", "age", "of runs not kept", "", box=None, header_style="bold")
    for one in found:
        name = f"{one.product.stage}/{one.product.digest[:12]}" + ("" if one.product.committed else " (unfinished)")
        kept = f"kept: {one.kept}" if one.kept else ""
        table.add_row(name, _size(one.product.size), _age(one.age_seconds), ", ".join(one.runs), kept)
    if found:
        OUT.print(table)


def _size(size: int) -> str:
    value = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"


def _age(seconds: float) -> str:
    return f"{seconds / 86400:.0f} days" if seconds >= 2 * 86400 else f"{seconds / 3600:.1f} h"
