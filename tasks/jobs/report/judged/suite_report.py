"""The benchmarks of `evaluate.suite` in reports: a table of scores over chance, a row of the summary, verdicts."""

from __future__ import annotations

from typing import Any

from radlads.tasks.contracts.stages import EVALUATE
from radlads.tasks.jobs.report.number_format import count, measured, percent, plain, prompt_note, ratio
from radlads.tasks.jobs.report.products import Products
from radlads.tasks.jobs.report.report_blocks import Table, Verdict

_SOURCE = "source"


def suite_table(products: Products) -> Table | None:
    """Teacher and student on every benchmark, and the mean; None without any."""
    evaluation, judged = products.evaluation, products.of_stage(EVALUATE.name)
    if evaluation is None or judged is None or evaluation.get("relative_score") is None:
        return None
    tasks = {name: task for name, task in evaluation["tasks"].items() if "suite" in task}
    rows = []
    for name, task in tasks.items():
        scored = task["suite"]
        metric = scored["metric"]
        rows.append(
            (
                f"{name}, {metric}",
                measured(task["teacher"][metric]),
                measured(task["student"][metric]),
                plain(scored["chance"]),
                ratio(scored["relative"]),
                str(task["num_fewshot"]),
                count(scored["items"]) if task["limit"] is None else f"{count(scored['items'])} (limited)",
                judged.short,
            )
        )
    mean = evaluation["relative_score"]
    if mean["value"] is not None:
        rows.append((f"mean of {len(mean['tasks'])}", "", "", "", ratio(mean), "", "", judged.short))
    header = ("benchmark", "teacher", "student", "chance", "over chance", "few-shot", "items", _SOURCE)
    return Table(header, rows, _caption(tasks, mean), words=(_SOURCE,))


def _caption(tasks: dict[str, dict[str, Any]], mean: dict[str, Any]) -> str:
    parts = ["Over chance: (student − chance) / (teacher − chance), its error from scores paired by item."]
    if mean["left_out"]:
        parts.append(_left_out(mean))
    parts += [f"{name}: {note}." for name, task in tasks.items() for note in task["suite"]["notes"]]
    parts.append(prompt_note(next(iter(tasks.values()))))
    return " ".join(parts)


def _left_out(mean: dict[str, Any]) -> str:
    return f"Not in the mean, as the teacher is not above chance by two standard errors: {', '.join(mean['left_out'])}."


def suite_row(evaluation: dict[str, Any], source: str) -> list[tuple[str, str, str, str, str]]:
    """The mean in the table of teacher and student; none where no benchmark counts."""
    mean = evaluation.get("relative_score")
    if mean is None or mean["value"] is None:
        return []
    return [(f"{len(mean['tasks'])} benchmarks, over chance", "1", measured(mean), ratio(mean), source)]


def suite_verdicts(evaluation: dict[str, Any]) -> list[Verdict]:
    """The mean, and which benchmarks say nothing."""
    mean = evaluation.get("relative_score")
    if mean is None:
        return []
    verdicts = []
    if mean["value"] is not None:
        share = f"{percent(mean['value'])} ± {100 * mean['stderr']:.1f}"
        text = f"Over chance, the student keeps {share} of its teacher's scores on {len(mean['tasks'])} benchmarks."
        verdicts.append(Verdict("note", text))
    if mean["left_out"]:
        verdicts.append(Verdict("note", _left_out(mean)))
    return verdicts
