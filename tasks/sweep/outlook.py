"""What a whole sweep is about to do, said before it does it: what is shared, what is new, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from radlads.tasks.announce import Outlook, cost_of, counts_of
from radlads.tasks.contracts.stages import PLAN


def describe_sweep(found: Mapping[str, Sequence[Outlook]]) -> list[str]:
    """A line a stage, and one for all of them.

    found: member → what happens to each of its stages while no other member has run. A product that several members ask
    for is counted, and paid for, once.
    """
    stages: dict[str, dict[str, list[Outlook]]] = {}
    for outlooks in found.values():
        for one in outlooks:
            if one.label != PLAN.name:  # each member has its own, made already
                stages.setdefault(one.label, {}).setdefault(one.product, []).append(one)
    lines = [_stage_line(label, list(products.values()), len(found)) for label, products in stages.items()]
    asked = [group for products in stages.values() for group in products.values()]
    once = [group[0] for group in asked]
    lines.append(f"in all: {_number(len(found), 'member')}, {counts_of(once)}{_to_go(once, ' to go')}")
    saved = [one for group in asked for one in group[1:]]
    cost = cost_of(saved)
    if cost not in ("", "0 s"):
        lines.append(f"made one by one they would take about {cost} more: members share what they ask for alike")
    return lines


def _stage_line(label: str, products: Sequence[Sequence[Outlook]], members: int) -> str:
    once = [group[0] for group in products]
    users = sum(map(len, products))
    if len(products) == 1:
        shared = f"one for all {members} members" if users == members > 1 else f"one for {_number(users, 'member')}"
    elif len(products) == users:
        shared = f"{users}, one a member"
    else:
        shared = f"{len(products)} for {_number(users, 'member')}"
    kinds = {one.what for one in once}
    what = next(iter(kinds)) if len(kinds) == 1 else counts_of(once)
    return f"{label}: {shared}: {what}{_to_go(once, '')}"


def _to_go(outlooks: Sequence[Outlook], ending: str) -> str:
    cost = cost_of(outlooks)
    return f"; about {cost}{ending}" if cost else ""


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}"
