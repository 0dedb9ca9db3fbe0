"""`radlads sync`."""

from __future__ import annotations

from typing import Annotated

import typer

from radlads.flows.cli.application import EXAMPLE, StorePlace, TrackingPlace, app, say
from radlads.tasks.contracts.errors import UserError


@app.command(epilog=EXAMPLE.format("radlads sync my-run"))
def sync(
    name: Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")],
    store: StorePlace = None,
    tracking: TrackingPlace = None,
) -> None:
    """Send MLflow the numbers of a run that it lacks after an outage; a run does this by itself when it ends."""
    from radlads.flows import services
    from radlads.tasks.contracts.settings import check_run_name, resolve_settings
    from radlads.tasks.contracts.store.open import find_store
    from radlads.tasks.mirror import sync_run

    check_run_name(name)
    services.use_services(resolve_settings().home)
    settings = resolve_settings(store=store, tracking=tracking)
    if not settings.tracking:
        raise UserError("no MLflow is configured: --tracking is 'none'")
    stages = sync_run(find_store(settings.store), settings.tracking, name)
    say(f"MLflow has all of {name}: {', '.join(stages)}")
