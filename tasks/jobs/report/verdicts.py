"""Verdicts on the metrics of a run: targets reached or missed, regressions, and missing measurements."""

from __future__ import annotations

import itertools
from typing import Any

from radlads.tasks.contracts.stages import STAGES, STUDENT_STAGES, TRANSPLANT
from radlads.tasks.jobs.report.judged.suite_report import suite_verdicts
from radlads.tasks.jobs.report.judged.writing_report import writing_verdicts
from radlads.tasks.jobs.report.number_format import percent
from radlads.tasks.jobs.report.report_blocks import Verdict
from radlads.tasks.jobs.report.retrieval.blocks import left_out
from radlads.tasks.jobs.report.retrieval.gate import recall_gate

# Targets of a working conversion, relative to the teacher.
BITS_PER_BYTE_RATIO = 1.03
NEEDLE_RATIO = 0.90
# Minimum needle score of the teacher for a meaningful ratio.
_TEACHER_RETRIEVES = 0.5
# Stages that must bring the student nearer to its teacher.
_TOWARD_TEACHER = tuple(
    name for name in STUDENT_STAGES if name == TRANSPLANT.name or (STAGES[name].trains and STAGES[name].needs_teacher)
)


def judge(
    evaluation: dict[str, Any] | None,
    needle: dict[str, Any] | None,
    *,
    needle_metrics: dict[str, Any],
    final_stage: str,
) -> list[Verdict]:
    """The verdicts: the recall gate first, then warnings. final_stage: the stage that made the student."""
    verdicts = [
        *recall_gate(needle),
        *_judge_text(evaluation, final_stage),
        *_judge_needle(needle, needle_metrics),
    ]
    order = {"warning": 0, "good": 1, "note": 2}
    return sorted(verdicts, key=lambda verdict: order[verdict.level])


def _judge_text(evaluation: dict[str, Any] | None, final_stage: str) -> list[Verdict]:
    if evaluation is None:
        return [Verdict("warning", "The student was not evaluated; its quality is unknown.")]
    student = evaluation["models"]["student"]
    ratio = student["bits_per_byte_ratio"]["value"]
    distance = f"{percent(abs(ratio - 1))} {'above' if ratio >= 1 else 'below'} the teacher's"
    target = f"the target is at most {percent(BITS_PER_BYTE_RATIO - 1, 0)} above"
    verdicts = [
        Verdict("good", f"The student's bits per byte on held-out text are {distance}; {target}.")
        if ratio <= BITS_PER_BYTE_RATIO
        else Verdict("warning", f"The student predicts text worse: its bits per byte are {distance}; {target}.")
    ]
    if evaluation.get("other_teacher"):
        verdicts.append(
            Verdict("warning", "The student was compared with a different teacher than the one it was converted from.")
        )
    verdicts += _judge_stages(evaluation["models"], final_stage)
    if not evaluation["tasks"]:
        verdicts.append(Verdict("note", "No harness task was run; losses alone can hide errors that generation shows."))
    verdicts += [*suite_verdicts(evaluation), *writing_verdicts(evaluation)]
    verdicts += [verdict for name, task in evaluation["tasks"].items() for verdict in _judge_task(name, task)]
    return verdicts


def _judge_stages(models: dict[str, Any], final_stage: str) -> list[Verdict]:
    """Each stage that learns from the teacher must bring the student nearer to it; what follows leaves it, and says how
    far."""
    verdicts = []
    kl = {name: numbers["kl"] for name, numbers in models.items() if name != "teacher"}
    kl.setdefault(final_stage, kl["student"])
    present = [name for name in _TOWARD_TEACHER if name in kl]
    for before, after in itertools.pairwise(present):
        if kl[after]["value"] > kl[before]["value"]:
            verdicts.append(
                Verdict(
                    "warning",
                    f"{after} increased the KL to the teacher: {kl[before]['value']:.4f} → {kl[after]['value']:.4f}.",
                )
            )
    if present and STAGES[present[-1]].matches_logits:
        nearest = kl[present[-1]]
        change = kl["student"]["value"] - nearest["value"]
        error = (kl["student"]["stderr"] or 0) + (nearest["stderr"] or 0)
        if change > 2 * error:
            verdicts.append(
                Verdict(
                    "note",
                    f"After {present[-1]} the student moved away from its teacher: KL {nearest['value']:.4f} → "
                    f"{kl['student']['value']:.4f}. Finetuning follows the data, not the teacher.",
                )
            )
    return verdicts


def _judge_task(name: str, task: dict[str, Any]) -> list[Verdict]:
    verdicts = []
    for metric, theirs in task.get("teacher", {}).items():
        ours = task["student"].get(metric)
        if not metric.startswith(("acc", "exact_match")) or ours is None:
            continue
        error = 2 * ((theirs["stderr"] or 0) ** 2 + (ours["stderr"] or 0) ** 2) ** 0.5
        drop = theirs["value"] - ours["value"]
        if drop > max(error, 0.01):
            verdicts.append(
                Verdict(
                    "warning",
                    f"On {name} ({metric}) the student is {percent(drop)} behind its teacher: "
                    f"{percent(ours['value'])}, teacher {percent(theirs['value'])}.",
                )
            )
    return verdicts


def _judge_needle(needle: dict[str, Any] | None, metrics: dict[str, Any]) -> list[Verdict]:
    if needle is None:
        return [Verdict("note", "Retrieval was not measured (no needle stage).")]
    verdicts = []
    models = needle["models"]
    reached = models["teacher"]["at_training_length"]
    ratio = metrics.get("needle_at_training_length_ratio")
    if reached is None:
        verdicts.append(Verdict("note", "No needle was asked for within the training length."))
    elif reached["mean"] < _TEACHER_RETRIEVES or ratio is None:
        verdicts.append(
            Verdict(
                "note",
                f"The teacher itself finds {percent(reached['mean'], 0)} of the needles, too few to compare the "
                "retrieval of the student.",
            )
        )
    else:
        share = f"{percent(ratio, 0)} of its teacher's needles at the training length ({reached['length']} tokens)"
        if ratio >= NEEDLE_RATIO:
            verdicts.append(Verdict("good", f"The student finds {share}; the target is {percent(NEEDLE_RATIO, 0)}."))
        else:
            verdicts.append(
                Verdict(
                    "warning",
                    f"The student retrieves too little: only {share}; the target is {percent(NEEDLE_RATIO, 0)}. "
                    f"Softmax layers (`student.attention_layers`) and training text that needs recall improve it.",
                )
            )
    for name, numbers in models.items():
        if numbers["not_run"]:
            lengths = ", ".join(map(str, numbers["not_run"]))
            verdicts.append(
                Verdict("note", f"The {name} was not run at {lengths} tokens; the means exclude these lengths.")
            )
    ruler = needle.get("ruler")
    if ruler and ruler["left_out"]:
        verdicts.append(Verdict("note", f"RULER: {left_out(ruler)}."))
    return verdicts
