"""`radlads resume`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from radlads.flows.cli.application import (
    ERR,
    EXAMPLE,
    OUT,
    ApproveOver,
    RunName,
    StorePlace,
    TrackingPlace,
    WorkPlace,
    app,
    say,
)


@app.command(epilog=EXAMPLE.format("radlads resume my-run"))
def resume(
    run: RunName,
    store: StorePlace = None,
    tracking: TrackingPlace = None,
    work: WorkPlace = None,
    approve_over: ApproveOver = None,
) -> None:
    """Continue a run that stopped, failed or died, by its recipe, its changes and its places."""
    from radlads.flows import services
    from radlads.flows.foreground import command_line, run_in_foreground
    from radlads.flows.run_view import plain_line
    from radlads.tasks.contracts.parsing.files import private_folder, write_private
    from radlads.tasks.contracts.settings import resolve_settings
    from radlads.tasks.contracts.store.open import find_store
    from radlads.tasks.look.resume import how_to_resume

    asked = resolve_settings(store=store, tracking=tracking, work=work)
    place = find_store(asked.store)
    how = how_to_resume(place, run)
    if how.finished is not None:
        say(f"{plain_line(how.finished)}: there is nothing left to do")
        return
    for line in how.notes:
        ERR.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
    work = work or how.work
    given = tracking is not None
    services.use_services(asked.home)
    settings = resolve_settings(store=store, tracking=tracking if given else how.tracking, work=work)
    file = Path(private_folder(asked.home / "resumed"), f"{run}.yaml")
    write_private(file, how.recipe)
    places = [("--store", store), ("--tracking", tracking and (settings.tracking or "none")), ("--work", work)]
    places.append(("--approve-over", None if approve_over is None else f"{approve_over:g}"))
    again = command_line("resume", run, options=places)
    parameters: dict[str, Any] = {"recipe": str(file), "run": run, "store": store, "work": work}
    parameters |= {"tracking": settings.tracking or "none", "approve_over": approve_over}
    with ERR.status("starting Prefect"):
        from radlads.flows.closing import say_end
        from radlads.flows.common import orchestrator
        from radlads.flows.convert import radlads
        from radlads.flows.evaluate import radlads_evaluate
        from radlads.flows.live_view import LiveTable
        from radlads.flows.pretrain import radlads_pretrain
    flow: Any = radlads_pretrain if how.pretrains else radlads
    if how.judged is not None:
        flow = radlads_evaluate
        parameters |= {"judged_run": how.judged, "other_teacher": how.other_teacher}
    with orchestrator():
        made = run_in_foreground(flow, parameters, again, err=ERR, shown=LiveTable(ERR, place, run))
    say_end(OUT, say, place, run, made)
