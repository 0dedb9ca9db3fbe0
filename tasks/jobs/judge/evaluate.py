"""The evaluate job: teacher and student in one run on held-out loss, bits per byte, KL, agreement and harness tasks.

All models are scored on the same windows, so the KL values of the stages are comparable. The lm-evaluation-harness
tasks, generation and speed are of the teacher and the final student. The work is split over the ranks.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from radlads.tasks.contracts.recipe.sections import EvalTask, Evaluate
from radlads.tasks.contracts.specs import EvaluateSpec
from radlads.tasks.jobs.common import Job, run_job, write_json
from radlads.tasks.jobs.data.loader import open_dataset
from radlads.tasks.jobs.judge.batching.budget import RowBudget, row_budget
from radlads.tasks.jobs.judge.divided import in_step
from radlads.tasks.jobs.judge.heldout_scores import (
    Estimate,
    Windows,
    check_finite,
    open_windows,
    score_windows,
    summarize,
)
from radlads.tasks.jobs.judge.judged_models import (
    STUDENT,
    TEACHER,
    continue_ids,
    open_teacher,
    open_tokenizer,
    opened_student,
    student_names,
)
from radlads.tasks.jobs.judge.suite.over_chance import relative_score
from radlads.tasks.jobs.judge.texts import flatten_texts, judge_texts
from radlads.tasks.jobs.judge.written.scores import flatten_writing, judge_writing
from radlads.tasks.jobs.origin import check_data, check_judged
from radlads.tasks.jobs.process_group import gather

logger = logging.getLogger("radlads")

_SAMPLES = 3
_SAMPLE_PROMPT = 24
_SAMPLE_TOKENS = 48


def main(job: Job) -> dict[str, Any] | None:
    """Write evaluate.json; returns its numbers as flat metrics."""
    spec: EvaluateSpec = job.typed
    section = spec.section
    started = time.monotonic()
    windows = open_windows(job.input("data"), section.context, section.heldout_tokens)
    check_data(open_dataset(job.input("data")).tokenizer_fingerprint, spec.teacher.tokenizer_fingerprint)
    tokenizer, names = open_tokenizer(job, spec.teacher), student_names(job)
    own = check_judged(job, names, spec.teacher, tokenizer, other_teacher=spec.other_teacher)
    teacher = open_teacher(job, spec.teacher)
    models: dict[str, dict[str, Estimate]] = {}
    tasks: dict[str, dict[str, Any]] = {}
    samples: list[dict[str, str]] = []
    written: dict[str, Any] = {}
    for number, name in enumerate(names):
        with opened_student(job, name) as student:
            budget = row_budget(job, section, (teacher, student))
            scores = _score(job, teacher, student, windows, budget, done=number, total=len(names))
            summary = summarize(scores, windows.num_bytes, windows.context)
            check_finite(name, summary["student"])
            models[TEACHER], models[name] = summary["teacher"], summary["student"]
            logger.info("%s: KL %.4f, bits per byte ×%.4f", name, *_shown(summary["student"]))
            if name == STUDENT:
                samples = sample_texts(teacher, student, tokenizer, windows)
                both = {TEACHER: teacher, STUDENT: student}
                tasks = run_tasks(job, both, tokenizer, section, budget)
                written = judge_texts(job, both, tokenizer, section, budget)
                written |= judge_writing(job, both, tokenizer, section, budget)
    if job.rank != 0:
        return None
    relative = relative_score(tasks)
    result = {
        "teacher": spec.teacher.model_dump(mode="json"),
        "other_teacher": not own,
        "windows": len(windows),
        "context": windows.context,
        "tokens": len(windows) * windows.context,
        "bytes": int(windows.num_bytes.sum()),
        "dtype": str(job.dtype).removeprefix("torch."),
        "models": models,
        "tasks": tasks,
        "relative_score": relative,
        "samples": samples,
        **written,
        "seconds": time.monotonic() - started,
        "processes": job.world_size,
    }
    write_json(job.output / "evaluate.json", result)
    numbers = flatten(models, tasks, relative) | flatten_texts(written) | flatten_writing(written)
    # Under the names that these have in training too, so that one chart shows all stages.
    same = {"heldout/kl": numbers.get("kl"), "heldout/ce": numbers.get("student/loss")}
    job.record.log(0, numbers | {name: value for name, value in same.items() if value is not None})
    return numbers | {"seconds": result["seconds"], "processes": job.world_size}


def _score(
    job: Job,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    windows: Windows,
    budget: RowBudget,
    *,
    done: int,
    total: int,
) -> np.ndarray:
    """Scores of all windows, [windows, SUMS], gathered on every rank."""
    mine = range(job.rank, len(windows), job.world_size)
    scores: dict[int, list[float]] = {}
    with in_step(teacher, student):
        own = score_windows(
            teacher,
            student,
            windows,
            batch=budget.reads(windows.context),
            mine=mine,
            progress=lambda count: job.progress(done * len(mine) + count, total * len(mine), "windows"),
        )
    for part in gather(own, job.world_size):
        scores |= part
    return np.array([scores[row] for row in range(len(windows))])


def run_tasks(
    job: Job,
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    section: Evaluate,
    budget: RowBudget,
) -> dict[str, dict[str, Any]]:
    """Task → {num_fewshot, limit, add_bos, begins_with_bos, teacher: {metric: {value, stderr}}, student: {...}}, and
    `suite` (judge_suite) for tasks of the suite. Collective."""
    if not section.all_tasks:
        return {}
    from radlads.tasks.jobs.judge.lmeval import (  # the harness takes seconds to import
        SharedHFLM,
        max_length_of,
        run_task,
    )

    # The student's config has no length limit, so the teacher's limit applies to both.
    max_length = max_length_of(models[TEACHER], tokenizer)
    results: dict[str, dict[str, Any]] = {task.name: _task_settings(task) for task in section.tasks}
    lms = {
        name: SharedHFLM(
            model,
            tokenizer,
            budget=budget,
            max_length=max_length,
            add_bos=section.add_bos,
            rank=job.rank,
            num_ranks=job.world_size,
        )
        for name, model in models.items()
    }
    for name, lm in lms.items():
        for task, commits in zip(section.tasks, _commits(job), strict=True):
            results[task.name][name] = run_task(lm, task, seed=section.seed, commits=commits)
            logger.info("%s on %s: %s", name, task.name, results[task.name][name])
    if section.suite is not None:
        from radlads.tasks.jobs.judge.suite.scores import judge_suite

        results |= judge_suite(lms, section.suite, _suite_files(job), seed=section.seed)
    for sheet in results.values():
        sheet |= {"add_bos": section.add_bos, "begins_with_bos": lms[TEACHER].begins_with_bos}
    return results


def _suite_files(job: Job) -> dict[str, str]:
    """sha256 of each file in the suite's folder."""
    spec: EvaluateSpec = job.typed
    return {file.path: file.sha256 for file in spec.pins["section.suite.path"].files}


def _commits(job: Job) -> list[dict[str, str]]:
    """For each task: hub dataset → commit."""
    spec: EvaluateSpec = job.typed
    pins = [spec.pins.get(f"section.tasks.{index}.path") for index in range(len(spec.section.tasks))]
    return [{} if pin is None else pin.commits for pin in pins]


def _task_settings(task: EvalTask) -> dict[str, Any]:
    return {"num_fewshot": task.num_fewshot, "limit": task.limit}


@torch.no_grad()
def sample_texts(
    teacher: PreTrainedModel, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Windows
) -> list[dict[str, str]]:
    """[{prompt, teacher, student}]: greedy continuations of held-out prefixes, for inspection. Collective."""
    prompts = windows.input_ids(range(min(_SAMPLES, len(windows))))[:, :_SAMPLE_PROMPT].to(teacher.device)
    eos = tokenizer.eos_token_id
    texts = {}
    for name, model in ((TEACHER, teacher), (STUDENT, student)):
        with in_step(model):
            rows = continue_ids(
                model, prompts, do_sample=False, max_new_tokens=_SAMPLE_TOKENS, eos_token_id=eos, pad_token_id=eos
            )
        texts[name] = tokenizer.batch_decode(rows[:, prompts.shape[1] :], skip_special_tokens=True)
    starts = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    return [
        {"prompt": prompt, TEACHER: theirs, STUDENT: ours}
        for prompt, theirs, ours in zip(starts, texts[TEACHER], texts[STUDENT], strict=True)
    ]


def flatten(
    models: dict[str, dict[str, Estimate]], tasks: dict[str, dict[str, Any]], relative: dict[str, Any] | None
) -> dict[str, float]:
    """The numbers under their MLflow names: `kl`, `kl/align`, `student/bits_per_byte`, `student/<task>/acc`,
    `relative_score`, `relative_score/<task>`. relative: as relative_score returned it."""
    flat: dict[str, float] = {}

    def put(key: str, estimate: Estimate) -> None:
        if estimate["value"] is not None:
            flat[key] = estimate["value"]
        if estimate["stderr"] is not None:
            flat[f"{key}_stderr"] = estimate["stderr"]

    for name, numbers in models.items():
        for key, estimate in numbers.items():
            if name in (TEACHER, STUDENT) and key in ("loss", "bits_per_byte"):
                put(f"{name}/{key}", estimate)
            elif name == STUDENT:
                put(key, estimate)
            else:
                put(f"{key}/{name}", estimate)
    for task, results in tasks.items():
        for name in (TEACHER, STUDENT):
            for metric, estimate in results.get(name, {}).items():
                put(f"{name}/{task}/{metric}", estimate)
        if "suite" in results and results["suite"]["relative"] is not None:
            put(f"relative_score/{task}", results["suite"]["relative"])
    if relative is not None:
        put("relative_score", relative)
    return flat


def _shown(numbers: dict[str, Estimate]) -> tuple[float | None, float | None]:
    return numbers["kl"]["value"], numbers["bits_per_byte_ratio"]["value"]


if __name__ == "__main__":
    run_job(main)
