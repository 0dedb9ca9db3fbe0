"""The program of `radlads init`: looks at a teacher, drafts a recipe for it and a machine, and plans what it costs.

`python -m radlads.tasks.jobs.draft.draft request.json`; the draft is written to the request's `out`, how it ended to
`exit.json` beside the request.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter

from radlads.tasks.contracts.errors import UserError, first_line
from radlads.tasks.contracts.recipe.recipe import Recipe, recipe_of_data
from radlads.tasks.contracts.requests.draft import Draft, DraftRequest, Offer
from radlads.tasks.contracts.specs import PlanReport
from radlads.tasks.contracts.stages import ALIGN, DISTILL, FINETUNE
from radlads.tasks.jobs.draft.fit import fit_to_machine
from radlads.tasks.jobs.draft.machine import Machine, machine_of
from radlads.tasks.jobs.draft.protocols import Effort, efforts
from radlads.tasks.jobs.draft.stages_text import Fit, sizes_of
from radlads.tasks.jobs.draft.subject import Candidate, find_candidate
from radlads.tasks.jobs.draft.texts import source_text
from radlads.tasks.jobs.draft.write import write_recipe
from radlads.tasks.jobs.exchange.outside_run import run_request
from radlads.tasks.jobs.plan.memory import NetworkSizes
from radlads.tasks.jobs.plan.plan import make_plan
from radlads.tasks.jobs.plan.sizes import count_networks, describe_device
from radlads.tasks.jobs.plan.subject import SIZES_ONLY

_USUAL = "usual"
_MOST_GROWTH = 1.5
"""Of a batch over its source's, without a note."""


def draft(request: DraftRequest) -> Draft:
    """Draft the recipe. Raises UserError if the teacher cannot be converted, nothing fits, the budget is too small."""
    machine = machine_of(request)
    for place in request.data:
        source_text(place)  # its faults are reported before the teacher is looked at
    teacher = find_candidate(request.teacher)
    known = efforts(teacher.parameters)
    counted: dict[int, NetworkSizes] = {}
    made = {effort.name: _offer(request, teacher, effort, machine, counted) for effort in known}
    chosen = choose(request, [offer for offer, _, _ in made.values()])
    _, text, report = made[chosen]
    effort = next(effort for effort in known if effort.name == chosen)
    notes = [*machine.notes, *_larger_batches(teacher, effort, machine.resources.processes)]
    if report is not None:
        notes += [line for line in (*report.warnings, *report.advice) if line != SIZES_ONLY]
    return Draft(
        text=text,
        facts=teacher.facts(),
        notes=tuple(notes),
        offers=tuple(offer for offer, _, _ in made.values()),
        chosen=chosen,
        kind="hybrid" if request.hybrid else "pure",
    )


def _offer(
    request: DraftRequest, teacher: Candidate, effort: Effort, machine: Machine, counted: dict[int, NetworkSizes]
) -> tuple[Offer, str, PlanReport | None]:
    """The offer, its recipe's text, its plan. counted: longest context → the networks, which are slow to count."""
    offer = Offer(name=effort.name, tokens=effort.tokens, words=effort.words, loses=effort.loses)
    resources = machine.resources
    first = _parsed(write_recipe(request, teacher, machine, effort, Fit()))
    try:
        longest = max(getattr(first, stage).longest_context for stage in first.training_stages)
        networks = counted.get(longest) or count_networks(first, teacher.config)
        counted[longest] = networks
        fit = fit_to_machine(first, networks, resources, describe_device(resources))
        text = write_recipe(request, teacher, machine, effort, fit)
        recipe = _parsed(text)
        changes = {"zero_stage": recipe.resources.zero_stage, "offload_optimizer": recipe.resources.offload_optimizer}
        fitted = resources.model_copy(update=changes)
        report = make_plan(recipe, fitted, preview=True, sizes_only=True, networks=networks)
    except UserError as error:
        return offer.model_copy(update={"fault": first_line(error)}), "", None
    if report.misfits:
        return offer.model_copy(update={"fault": report.misfits[0]}), "", None
    seconds = [row["seconds"] for row in report.stages.values()]
    found = {
        "seconds": None if any(value is None for value in seconds) else sum(seconds),
        "gpu_hours": report.gpu_hours,
        "dollars": report.dollars,
    }
    times = {name: None if value is None else value * machine.slower for name, value in found.items()}
    return offer.model_copy(update=times), text, report


def _larger_batches(teacher: Candidate, effort: Effort, processes: int) -> list[str]:
    """A note where a row for every GPU makes batches that the rates are not of."""
    usual, here = sizes_of(teacher, effort, 1), sizes_of(teacher, effort, processes)
    batches = [
        (ALIGN.name, usual.align_batch, here.align_batch),
        (DISTILL.name, usual.distill_batch, here.distill_batch),
    ]
    if effort.finetune:
        batches.append((FINETUNE.name, usual.finetune_batch, here.finetune_batch))
    grown = [f"{here} for {usual} in {stage}" for stage, usual, here in batches if here > _MOST_GROWTH * usual]
    if not grown:
        return []
    return [
        f"every step has a row for each of {processes} GPUs, so batches are {', '.join(grown)}: fewer steps, at rates "
        "that are of the smaller batches; fewer GPUs keep to the source"
    ]


def choose(request: DraftRequest, offers: Sequence[Offer]) -> str:
    """The name of the offer that was asked for, else the largest within the budget, else the usual one. Raises
    UserError."""
    possible = [offer for offer in offers if not offer.fault]
    if not possible:
        raise UserError(offers[0].fault)
    if request.effort is not None:
        asked = next((offer for offer in offers if offer.name == request.effort), None)
        if asked is None:
            raise UserError(f"--effort {request.effort}: for this teacher choose {', '.join(o.name for o in offers)}")
        if asked.fault:
            raise UserError(asked.fault)
        return asked.name
    if request.budget is None:
        return next((offer.name for offer in possible if offer.name == _USUAL), possible[-1].name)
    within = [offer for offer in possible if offer.dollars is not None and offer.dollars <= request.budget]
    if not within:
        least = min((offer.dollars, offer.name) for offer in possible if offer.dollars is not None)
        raise UserError(
            f"${request.budget:,.2f} is not enough: the least that makes sense for this teacher on this machine "
            f"({least[1]}) is planned at ${least[0]:,.2f}; choose a smaller teacher, or cheaper GPUs (--gpus, --price)"
        )
    return within[-1].name


def _parsed(text: str) -> Recipe:
    return recipe_of_data(text.encode(), None, where="the drafted recipe")


def perform(request: DraftRequest) -> None:
    """Write the draft. Raises UserError."""
    Path(request.out).write_text(draft(request).model_dump_json(indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Read the request, draft, write exit.json, exit."""
    run_request(TypeAdapter(DraftRequest), perform)


if __name__ == "__main__":
    main()
