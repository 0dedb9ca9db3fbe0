"""`evaluate.generation` in reports: what teacher and student write, and how they obey."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from radlads.tasks.contracts.stages import EVALUATE
from radlads.tasks.jobs.report.number_format import count, measured, percent, rate_of, ratio, share, times
from radlads.tasks.jobs.report.products import Products
from radlads.tasks.jobs.report.report_blocks import Block, Code, Heading, Level, Table, Verdict

NATS_RATIO = 1.05
"""Target: the teacher's nats per token of the student's samples, over those of its own."""
_TOO_PREDICTABLE = 0.95
_CLEAR = 0.02  # a difference of shares that is worth a warning, where it is beyond two standard errors
_SOURCE = "source"
_MEASURES = {
    "nats": ("teacher's nats per token", measured),
    "distinct_1": ("distinct-1", measured),
    "distinct_2": ("distinct-2", measured),
    "distinct_4": ("distinct-4", measured),
    "repeated": ("tokens in repeated 4-grams", share),
    "loops": ("samples that end in a loop", share),
    "stopped": ("samples that end with EOS", share),
    "length": ("tokens of a sample", measured),
}

Row = tuple[str, str, str, str, str]


def _sheet(products: Products) -> tuple[dict[str, Any], str] | None:
    """(`generation` of evaluate.json, its source)."""
    evaluation, judged = products.evaluation, products.of_stage(EVALUATE.name)
    if evaluation is None or judged is None or "generation" not in evaluation:
        return None
    return evaluation["generation"], judged.short


def samples_table(products: Products) -> Table | None:
    """Every measure at every temperature; None without samples."""
    found = _sheet(products)
    if found is None:
        return None
    sheet, source = found
    rows: list[Row] = []
    for row in sheet["temperatures"]:
        for key, (label, shown) in _MEASURES.items():
            beside = ratio(row["nats_ratio"]) if key == "nats" else ""
            at = f"{row['temperature']:g}: {label}"
            rows.append((at, shown(row["teacher"][key]), shown(row["student"][key]), beside, source))
    start = f"{count(sheet['prompts'])} beginnings of documents" if sheet["prompts"] else "BOS alone"
    caption = (
        f"{count(sheet['samples'])} samples of each model and temperature, to {start}, at most "
        f"{count(sheet['new_tokens'])} tokens. ± is one standard error over samples; the ratio is paired by prompt."
    )
    header = ("temperature: samples", "teacher", "student", "student / teacher", _SOURCE)
    return Table(header, rows, caption, words=(_SOURCE,))


def instructions_table(products: Products) -> Table | None:
    """Answers that obey, by kind of constraint; None where none was asked."""
    found = _sheet(products)
    if found is None or found[0]["instructions"] is None:
        return None
    sheet, source = found[0]["instructions"], found[1]
    theirs, ours = sheet["teacher"], sheet["student"]
    cells = [("all constraints of an answer", theirs["answers"], ours["answers"])]
    cells += [(kind.replace("_", " "), cell, ours["kinds"][kind]) for kind, cell in theirs["kinds"].items()]
    rows = [
        (label, rate_of(one), rate_of(two), times(one, two), count(one["trials"]), source) for label, one, two in cells
    ]
    caption = (
        f"Greedy answers to {count(sheet['questions'])} questions in the chat template, at most "
        f"{count(sheet['new_tokens'])} tokens, checked by program. Student less teacher, paired by question: "
        f"{_points(sheet['gap'])}."
    )
    header = ("constraint obeyed", "teacher", "student", "student / teacher", "answers", _SOURCE)
    return Table(header, rows, caption, words=(_SOURCE,))


def writing_rows(evaluation: Mapping[str, Any], source: str) -> list[Row]:
    """Rows of the table of teacher and student."""
    sheet = evaluation.get("generation")
    if sheet is None:
        return []
    rows = [
        (
            f"teacher's nats per token of samples, temperature {row['temperature']:g}",
            measured(row["teacher"]["nats"]),
            measured(row["student"]["nats"]),
            ratio(row["nats_ratio"]),
            source,
        )
        for row in sheet["temperatures"]
    ]
    if sheet["instructions"] is not None:
        theirs, ours = (sheet["instructions"][name]["answers"] for name in ("teacher", "student"))
        rows.append(
            ("answers that obey their constraints", rate_of(theirs), rate_of(ours), times(theirs, ours), source)
        )
    return rows


def writing_blocks(products: Products) -> list[Block]:
    """The section of the report; empty without samples."""
    tables = [table for table in (samples_table(products), instructions_table(products)) if table is not None]
    found = _sheet(products)
    if found is None:
        return []
    examples = [
        f"temperature {row['temperature']:g}\nprompt   {one['prompt']!r}\nteacher  {one['teacher']!r}\n"
        f"student  {one['student']!r}"
        for row in found[0]["temperatures"]
        for one in row["examples"]
    ]
    return [Heading("What they write"), *tables, Code("\n\n".join(examples), folded="Samples")]


def writing_verdicts(evaluation: Mapping[str, Any]) -> list[Verdict]:
    """Whether the student writes as its teacher would, runs into loops, and obeys."""
    sheet = evaluation.get("generation")
    if sheet is None:
        return []
    verdicts = [verdict for row in sheet["temperatures"] for verdict in (*_nats_verdict(row), *_loops_verdict(row))]
    if sheet["instructions"] is not None:
        obeyed = sheet["instructions"]
        gap, error = obeyed["gap"]["value"], obeyed["gap"]["stderr"]
        theirs, ours = (percent(obeyed[name]["answers"]["mean"]) for name in ("teacher", "student"))
        level: Level = "warning" if gap < -max(2 * error, _CLEAR) else "note"
        text = f"The student obeys all constraints in {ours} of its answers, its teacher in {theirs}"
        verdicts.append(Verdict(level, f"{text} ({_points(obeyed['gap'])})."))
    return verdicts


def _nats_verdict(row: Mapping[str, Any]) -> list[Verdict]:
    beside = row["nats_ratio"]
    if beside["value"] is None:
        return []
    at = f"at temperature {row['temperature']:g}"
    text = f"The student's samples {at} cost the teacher {ratio(beside)} the nats of its own"
    if beside["value"] < _TOO_PREDICTABLE:
        return [Verdict("note", f"{text}: more predictable text, as repetitions are.")]
    level: Level = "good" if beside["value"] <= NATS_RATIO else "warning"
    return [Verdict(level, f"{text}; the target is at most {NATS_RATIO}.")]


def _loops_verdict(row: Mapping[str, Any]) -> list[Verdict]:
    theirs, ours = row["teacher"]["loops"], row["student"]["loops"]
    if ours["value"] - theirs["value"] <= max(2 * math.hypot(ours["stderr"], theirs["stderr"]), _CLEAR):
        return []
    text = (
        f"{percent(ours['value'])} of the student's samples end in a loop, of its teacher's {percent(theirs['value'])}"
    )
    return [Verdict("warning", f"At temperature {row['temperature']:g} {text}.")]


def _points(gap: Mapping[str, float]) -> str:
    return f"{100 * gap['value']:+.1f} ± {100 * gap['stderr']:.1f} points"
