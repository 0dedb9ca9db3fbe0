"""The members of a sweep side by side: what each was made with, how it ended, its scores, and what it took."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from radlads.tasks.contracts.job import Manifest
from radlads.tasks.contracts.parsing.document import one_line
from radlads.tasks.contracts.stages import PLAN, PUBLISH, STAGES
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.layout import sweep_key
from radlads.tasks.contracts.store.pointers import Pointer, read_pointers
from radlads.tasks.look.results import gpu_hours_of, hours_of, last_loss, scores_of
from radlads.tasks.pipeline import plans_of
from radlads.tasks.sweep.grid import plain_value, short_keys
from radlads.tasks.sweep.record import SweepRecord

_LONGEST_REASON = 160
_HOURS, _DOLLARS = "hours", "dollars"


@dataclass
class MemberRow:
    """A member. status: done, failed, unfinished or not started; reason: why it failed, one line. scores: heading →
    number. hours, dollars: what the jobs took whose products this member made, and others may have reused."""

    member: str
    values: dict[str, Any]
    status: str
    reason: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    hours: float | None = None
    dollars: float | None = None


@dataclass
class SweepTable:
    """All rows. better: heading of a score → whether more of it is better; None where that is not known."""

    sweep: str
    rows: list[MemberRow]
    better: dict[str, bool | None]

    def best(self, heading: str) -> float | None:
        """The best of a column; None where that says nothing: no direction, one number, or all alike."""
        numbers = [row.scores[heading] for row in self.rows if row.status == "done" and heading in row.scores]
        direction = self.better.get(heading)
        if direction is None or len(set(numbers)) < 2:
            return None
        return max(numbers) if direction else min(numbers)

    def markdown(self) -> str:
        """The table, aligned, the best of each column in bold."""
        tails = short_keys(self.rows[0].values)
        spent = [name for name in (_HOURS, _DOLLARS) if any(getattr(row, name) is not None for row in self.rows)]
        header = ["run", *tails.values(), "status", *self.better, *spent]
        best = {heading: self.best(heading) for heading in self.better}
        lines = []
        for row in self.rows:
            cells = [row.member, *(plain_value(row.values[key]) for key in tails), _status(row)]
            for heading, top in best.items():
                number = row.scores.get(heading)
                text = "" if number is None else _number(number)
                is_best = number is not None and row.status == "done" and number == top
                cells.append(f"**{text}**" if is_best else text)
            cells += [_number(value) if (value := getattr(row, name)) is not None else "" for name in spent]
            lines.append(cells)
        return _aligned(header, lines)

    def as_json(self) -> str:
        """The same for programs."""
        rows = [
            vars(row) | {"best": [h for h in row.scores if row.status == "done" and row.scores[h] == self.best(h)]}
            for row in self.rows
        ]
        return json.dumps({"sweep": self.sweep, "rows": rows, "more_is_better": self.better}, indent=1) + "\n"


def make_table(store: Store, sweep: str, record: SweepRecord, failures: Mapping[str, str]) -> SweepTable:
    """What the store knows of a sweep's members. failures: member → why it ended. Raises StoreError."""
    better: dict[str, bool | None] = {}
    rows = [_row(store, member, values, failures.get(member, ""), better) for member, values in record.members.items()]
    return SweepTable(sweep=sweep, rows=rows, better=better)


def keep_table(store: Store, table: SweepTable) -> None:
    """Write table.md and table.json. Raises StoreError."""
    store.put_bytes(f"{sweep_key(table.sweep)}/table.md", f"# Sweep {table.sweep}\n\n{table.markdown()}\n".encode())
    store.put_bytes(f"{sweep_key(table.sweep)}/table.json", table.as_json().encode())


def kept_failures(store: Store, sweep: str) -> dict[str, str]:
    """Member → why it failed, as far as the last table says."""
    with suppress(ValueError, KeyError, TypeError):  # of another version, or altered: the next table replaces it
        rows = json.loads(store.get_bytes(f"{sweep_key(sweep)}/table.json") or "")["rows"]
        return {row["member"]: row["reason"] for row in rows if row["reason"]}
    return {}


def _row(store: Store, member: str, values: dict[str, Any], failure: str, better: dict[str, bool | None]) -> MemberRow:
    pointers = read_pointers(store, member)
    made = {label: store.read_manifest(pointer.key) for label, pointer in pointers.items()}
    found = {label: manifest for label, manifest in made.items() if manifest is not None}
    status, reason = "done", ""
    if PUBLISH.name not in found:
        reason = failure or _why_it_ended(store, pointers, found)
        status = "failed" if reason else "unfinished" if set(found) - {PLAN.name} else "not started"
    row = MemberRow(member, values, status, one_line(reason, _LONGEST_REASON))
    for score in scores_of(found) or last_loss(found if status == "done" else {}):
        row.scores[score.heading] = score.value
        better.setdefault(score.heading, score.more_is_better)
    own = [manifest for manifest in found.values() if manifest.run == member]
    row.hours = hours_of(own)
    row.dollars = _dollars(store, member, own)
    return row


def _why_it_ended(store: Store, pointers: Mapping[str, Pointer], made: Mapping[str, Manifest]) -> str:
    """What the job said that left a stage unfinished; "" where none did."""
    order = list(STAGES)
    for label in sorted(set(pointers) - set(made), key=lambda label: order.index(pointers[label].stage)):
        with suppress(ValueError, AttributeError):  # none, or only half written
            ending = json.loads(store.get_bytes(f"{pointers[label].key}/job/exit.json") or "{}")
            if ending.get("reason") not in (None, "done", "preempted"):
                return f"{label}: {ending.get('message') or ending['reason']}"
    return ""


def _dollars(store: Store, member: str, own: Sequence[Manifest]) -> float | None:
    """What the member's own jobs on GPUs cost, as its report says it; None without a price or a GPU."""
    plan = next(plans_of(store, member), None)
    price = None if plan is None else plan[0].recipe.resources.dollars_per_gpu_hour
    if plan is None or price is None:
        return None
    hours = gpu_hours_of(own, plan[1].stages)
    return None if hours is None else hours * price


def _status(row: MemberRow) -> str:
    return f"{row.status}: {row.reason}" if row.reason else row.status


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    header, *rows = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[index]) for row in (header, *rows)) for index in range(len(header))]
    rule = ["-" * width for width in widths]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (header, rule, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
