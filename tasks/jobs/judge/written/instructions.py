"""Questions with constraints, out of a user's files or made of chats, and how often a model's answers obey."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.judging.generation import EvalInstructions
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.data.text.chat import open_chat_template
from radlads.tasks.jobs.data.text.documents import RowReader
from radlads.tasks.jobs.data.text.text_files import json_rows, no_field
from radlads.tasks.jobs.data.text.token_encoder import TokenEncoder
from radlads.tasks.jobs.judge.batching.budget import Rows
from radlads.tasks.jobs.judge.generation import Prompt, answer_prompts
from radlads.tasks.jobs.judge.heldout_scores import mean_of
from radlads.tasks.jobs.judge.judged_models import STUDENT, TEACHER
from radlads.tasks.jobs.judge.needle_grid import rate
from radlads.tasks.jobs.judge.written.constraints import CONSTRAINTS, Constraint, draw_constraints, read_constraint
from radlads.tasks.jobs.sources import expand_paths, resolve_file

_BUCKET = 64  # prompts of nearly the same length are answered together
_EXAMPLES, _SHOWN = 5, 300


@dataclass(frozen=True)
class Instruction:
    """What a user asks, constraints included, and what the answer must obey."""

    text: str
    constraints: tuple[Constraint, ...]


def read_instructions(section: EvalInstructions) -> list[Instruction]:
    """The first questions of the files, a pure function of section and files. Raises UserError, with file and line."""
    found = list(islice(_instructions(section), section.questions))
    if len(found) < 2:
        raise UserError(
            f"usable questions in the files: {len(found)}; at least two are needed, rows with "
            f"`prompt` and `constraints`, or with '{section.messages_field}' whose first user message has at most "
            f"{section.max_characters} characters"
        )
    return found


def _instructions(section: EvalInstructions) -> Iterator[Instruction]:
    chats = RowReader(messages_field=section.messages_field)
    made = 0
    for name in expand_paths(section.paths):
        for line, row in json_rows(resolve_file(name)):
            where = f"{name}, line {line}"
            if "constraints" in row:
                yield _own(row, where)
                continue
            if section.messages_field not in row:
                raise UserError(no_field(where, section.messages_field, row))
            for chat in chats.documents(iter([(line, row)]), name, "line"):
                said = next((m["content"].strip() for m in chat.messages or () if m["role"] == "user"), "")
                if 0 < len(said) <= section.max_characters:
                    drawn = draw_constraints(said, made, random.Random(f"instructions:{section.seed}:{made}"))
                    made += 1
                    yield Instruction(f"{said}\n\n{' '.join(one.text for one in drawn)}", drawn)


def _own(row: Mapping[str, Any], where: str) -> Instruction:
    text, constraints = row.get("prompt"), row["constraints"]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: a row with `constraints` needs a `prompt`, the user's message, which asks for them")
    if not isinstance(constraints, list) or not constraints:
        raise UserError(f"{where}: `constraints` is a list of {{kind, value}} with at least one entry")
    return Instruction(text, tuple(read_constraint(one, where) for one in constraints))


def instruction_prompts(
    section: EvalInstructions, instructions: Sequence[Instruction], tokenizer: PreTrainedTokenizerBase
) -> list[Prompt]:
    """Each question as a user message in the tokenizer's chat template. Raises UserError without one."""
    if not tokenizer.chat_template:
        raise UserError(
            "instructions need a chat template, and the teacher's tokenizer has none; leave `instructions` out, or add "
            "a chat_template to that tokenizer"
        )
    template = open_chat_template(TokenEncoder(tokenizer), None)
    rows = [template.prompt_ids(one.text)[1] for one in instructions]
    return [Prompt(ids, -(-len(ids) // _BUCKET) * _BUCKET, section.new_tokens) for ids in rows]


def judge_instructions(
    job: Job,
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    section: EvalInstructions,
    rows: Rows,
) -> dict[str, Any]:
    """{questions, new_tokens, teacher, student, gap, examples} of greedy answers. Collective.

    Of a model: {answers, kinds: {kind: …}}, each {mean, stderr, trials}: the share of answers that obey all of their
    constraints, and of constraints of a kind that are obeyed. gap: student's answers less the teacher's, {value,
    stderr}, paired by question. Raises UserError where an answer does not fit in memory.
    """
    asked = read_instructions(section)
    prompts = instruction_prompts(section, asked, tokenizer)
    answers: dict[str, list[str]] = {}
    for name, model in models.items():

        def progress(count: int, done: int = len(answers) * len(prompts)) -> None:
            job.progress(done + count, 2 * len(prompts), "instructions")

        texts = answer_prompts(job, model, tokenizer, prompts, rows, progress)
        answers[name] = [text for text in texts if text is not None]
        if len(answers[name]) < len(texts):
            raise UserError("evaluate.generation.instructions: an answer does not fit in memory; lower max_characters")
    obeyed = {name: [[c.holds(text) for c in one.constraints] for one, text in zip(asked, own, strict=True)]
              for name, own in answers.items()}  # fmt: skip
    whole = {name: np.array([all(hits) for hits in own], dtype=np.float64) for name, own in obeyed.items()}
    return {
        "questions": len(asked),
        "new_tokens": section.new_tokens,
        **{name: {"answers": rate(whole[name].tolist()), "kinds": _by_kind(asked, obeyed[name])} for name in models},
        "gap": mean_of(whole[STUDENT] - whole[TEACHER]),
        "examples": [
            {"prompt": one.text[:_SHOWN], "constraints": [c.kind for c in one.constraints]}
            | {name: {"answer": own[i][:_SHOWN], "obeys": obeyed[name][i]} for name, own in answers.items()}
            for i, one in enumerate(asked[:_EXAMPLES])
        ],
    }


def _by_kind(asked: Sequence[Instruction], obeyed: Sequence[Sequence[bool]]) -> dict[str, Any]:
    hits: dict[str, list[float]] = {kind: [] for kind in CONSTRAINTS}
    for one, held in zip(asked, obeyed, strict=True):
        for constraint, hit in zip(one.constraints, held, strict=True):
            hits[constraint.kind].append(float(hit))
    return {kind: rate(own) for kind, own in hits.items() if own}
