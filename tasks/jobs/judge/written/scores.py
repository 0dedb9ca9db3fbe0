"""`evaluate.generation`: its checks, its part of evaluate.json, and its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.judging.generation import EvalGeneration
from radlads.tasks.contracts.recipe.sections import Evaluate
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.judge.batching.budget import RowBudget
from radlads.tasks.jobs.judge.heldout_scores import Estimate
from radlads.tasks.jobs.judge.judged_models import STUDENT, TEACHER
from radlads.tasks.jobs.judge.speed import judge_speed
from radlads.tasks.jobs.judge.written.instructions import instruction_prompts, judge_instructions, read_instructions
from radlads.tasks.jobs.judge.written.samples import judge_samples, sample_prompts


def check_generation(
    asked: EvalGeneration, tokenizer: PreTrainedTokenizerBase, add_bos: bool | None, positions: int | None
) -> list[str]:
    """Warnings, for the plan. positions: that the teacher was made for. Raises UserError where the job would, and for
    samples beyond these positions."""
    sample_prompts(asked, tokenizer, add_bos)
    if positions is not None and asked.longest > positions:
        raise UserError(
            f"prompt_tokens and new_tokens make {asked.longest} tokens with BOS, and the teacher was made for "
            f"{positions} positions; lower new_tokens"
        )
    if asked.instructions is None:
        return []
    questions = read_instructions(asked.instructions)
    prompts = instruction_prompts(asked.instructions, questions, tokenizer)
    longest = max(len(prompt.ids) for prompt in prompts) + asked.instructions.new_tokens
    warnings = []
    if len(questions) < asked.instructions.questions:
        warnings.append(f"evaluate.generation.instructions: the files have {len(questions)} questions, all are asked")
    if positions is not None and longest > positions:
        warnings.append(
            f"evaluate.generation.instructions: up to {longest} tokens with the answer are beyond the {positions} "
            "positions that the teacher was made for; expect failures there, or lower max_characters or new_tokens"
        )
    return warnings


def judge_writing(
    job: Job,
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    section: Evaluate,
    budget: RowBudget,
) -> dict[str, Any]:
    """{generation, speed}, as far as the section asks for them. models: teacher and student. Collective.

    generation: {settings, temperatures: [judge_samples], instructions: judge_instructions or None}.
    """
    sheet: dict[str, Any] = {}
    if section.generation is not None:
        asked = section.generation
        prompts = sample_prompts(asked, tokenizer, section.add_bos)
        sheet["generation"] = {
            "samples": asked.samples,
            "new_tokens": asked.new_tokens,
            "prompts": len({tuple(prompt.ids) for prompt in prompts}) if asked.prompts else 0,
            "prompt_tokens": asked.prompt_tokens if asked.prompts else 0,
            "temperatures": [
                judge_samples(job, models, tokenizer, asked, prompts, temperature, budget)
                for temperature in asked.temperatures
            ],
            "instructions": None
            if asked.instructions is None
            else judge_instructions(job, models, tokenizer, asked.instructions, budget.writes),
        }
    if section.speed is not None:
        sheet["speed"] = judge_speed(job, models, section.speed)
    return sheet


def flatten_writing(sheet: Mapping[str, Any]) -> dict[str, float]:
    """The numbers under their MLflow names: `nats_ratio/0.7`, `generation/0.7/student/loops`, `student/instructions`,
    `instructions_gap`, `instructions/student/json`, `speed/4096/student/prompt_seconds`."""
    flat: dict[str, float | None] = {}

    def put(key: str, estimate: Estimate) -> None:
        flat.update({key: estimate["value"], f"{key}_stderr": estimate["stderr"]})

    generation = sheet.get("generation")
    for row in generation["temperatures"] if generation else ():
        at = f"{row['temperature']:g}"
        put(f"nats_ratio/{at}", row["nats_ratio"])
        for name in (TEACHER, STUDENT):
            for key, estimate in row[name].items():
                put(f"generation/{at}/{name}/{key}", estimate)
    if generation and generation["instructions"]:
        obeyed = generation["instructions"]
        put("instructions_gap", obeyed["gap"])
        for name in (TEACHER, STUDENT):
            answers = obeyed[name]["answers"]
            flat |= {f"{name}/instructions": answers["mean"], f"{name}/instructions_stderr": answers["stderr"]}
            flat |= {f"instructions/{name}/{kind}": cell["mean"] for kind, cell in obeyed[name]["kinds"].items()}
    for row in sheet["speed"]["lengths"] if "speed" in sheet else ():
        for name in (TEACHER, STUDENT):
            flat |= {f"speed/{row['length']}/{name}/{key}": value for key, value in (row[name] or {}).items()}
    return {key: value for key, value in flat.items() if value is not None}
