"""`radlads recipes`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from radlads.flows.cli.application import EXAMPLE, OUT, app

_TWIN = "tiny-"


@app.command(epilog=EXAMPLE.format("radlads recipes"))
def recipes(
    keys: Annotated[
        bool, typer.Option("--keys", help="Describe every key that a recipe may have, as Markdown, instead.")
    ] = False,
) -> None:
    """List the recipes that come with the package."""
    if keys:
        from radlads.flows.keys.page import keys_page

        sys.stdout.write(keys_page())
        return
    from rich.markup import escape
    from rich.table import Table

    from radlads.tasks.contracts.recipe.recipe import list_recipes, load_recipe

    table = Table("recipe", "description", box=None, header_style="bold")
    names = list_recipes()
    twins = [name for name in names if name.startswith(_TWIN) and name.removeprefix(_TWIN) in names]
    for name in names:
        if name not in twins:
            mark = " *" if _TWIN + name in twins else ""
            table.add_row(name + mark, escape(" ".join(load_recipe(name).description.split())))
    OUT.print(table)
    OUT.print(f"* has a twin for tests, {_TWIN}NAME: the same recipe at tiny sizes", style="dim")
