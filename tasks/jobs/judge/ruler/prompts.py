"""RULER's prompts as a model reads them: a function of the recipe's section and the tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial

from transformers import PreTrainedTokenizerBase

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.judging.needle import Needle
from radlads.tasks.contracts.recipe.judging.ruler import Ruler, RulerTask
from radlads.tasks.jobs.data.ruler.puzzle import Puzzle
from radlads.tasks.jobs.data.ruler.qa import read_questions
from radlads.tasks.jobs.data.ruler.tasks import TASKS, Material, make_puzzle, make_qa_puzzles
from radlads.tasks.jobs.data.text.chat import open_chat_template
from radlads.tasks.jobs.data.text.recall import load_filler
from radlads.tasks.jobs.data.text.token_encoder import TokenEncoder, prompt_frame, text_ids
from radlads.tasks.jobs.judge.generation import Prompt
from radlads.tasks.jobs.process_group import gather
from radlads.tasks.jobs.sources import expand_paths, resolve_file

Encode = Callable[[Puzzle], list[int]]


@dataclass(frozen=True)
class RulerTrial:
    """One prompt of a task at a length."""

    task: RulerTask
    length: int
    answers: tuple[str, ...]
    prompt: Prompt


def make_ruler_trials(
    section: Needle, tokenizer: PreTrainedTokenizerBase, *, threads: int = 1, rank: int = 0, ranks: int = 1
) -> list[RulerTrial]:
    """All prompts that the section `ruler` asks for, shortest lengths first; none without it. Prompt and answer are at
    most as long as the length. Each rank makes its share, by threads. Collective. Raises UserError."""
    asked = section.ruler
    if asked is None:
        return []
    kinds = [(length, task) for length in sorted(set(asked.lengths)) for task in asked.judged]
    material, encode = _material(section, asked), _encoder(section, asked, tokenizer)
    make = partial(_trials, asked, material, encode, samples=asked.samples)
    mine = range(rank, len(kinds), ranks)
    tokenizer("", split_special_tokens=True)  # a tokenizer changes at its first call alone, which threads must not see
    with ThreadPoolExecutor(threads if tokenizer.is_fast else 1) as pool:  # which lets other threads run as it encodes
        longest_first = mine[::-1]
        own = dict(zip(longest_first, pool.map(lambda index: make(*kinds[index]), longest_first), strict=True))
    made: dict[int, list[RulerTrial]] = {}
    for part in gather(own, ranks):
        made |= part
    return [trial for index in range(len(kinds)) for trial in made[index]]


def check_ruler(section: Needle, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> list[str]:
    """Warnings, for the plan. positions: that the teacher was made for. Raises UserError where the job would: files,
    and prompts at the shortest and the longest length, one of each task, of qa all."""
    asked = section.ruler
    if asked is None:
        return []
    material, encode = _material(section, asked), _encoder(section, asked, tokenizer)
    for length in {min(asked.lengths), max(asked.lengths)}:
        for task in asked.judged:
            all_or_one = asked.samples if TASKS[task].group == "qa" else 1
            _trials(asked, material, encode, length, task, samples=all_or_one)
    why = "; ".join(f"{task}: {reason}" for task, reason in asked.left_out.items())
    warnings = [f"needle.ruler judges {len(asked.judged)} of 13 tasks ({why})"] if why and not asked.tasks else []
    beyond = [length for length in asked.lengths if positions is not None and length > positions]
    if beyond:
        warnings.append(
            f"needle.ruler.lengths {beyond} are beyond the {positions} positions that the teacher was made for; expect "
            "failures there"
        )
    return warnings


def _trials(
    asked: Ruler, material: Material, encode: Encode, length: int, task: RulerTask, *, samples: int
) -> list[RulerTrial]:
    """The prompts of a task at a length."""
    encoded = lru_cache(maxsize=16)(encode)  # what fits is asked for again
    new_tokens, seed = TASKS[task].new_tokens, f"ruler:{asked.seed}:{task}:{length}"

    def cost(puzzle: Puzzle) -> int:
        return len(encoded(puzzle)) + new_tokens

    if TASKS[task].group == "qa":
        puzzles = make_qa_puzzles(task, count=samples, length=length, cost=cost, seed=seed, material=material)
    else:
        puzzles, guess = [], None
        for i in range(samples):
            found = make_puzzle(
                task, length=length, cost=cost, seed=f"{seed}:{i}", half="judging", material=material, guess=guess
            )
            guess = guess or found.units  # prompts of a task and length are of nearly equal size
            puzzles.append(found.puzzle)
    return [RulerTrial(task, length, one.answers, Prompt(encoded(one), length, new_tokens)) for one in puzzles]


def _encoder(section: Needle, asked: Ruler, tokenizer: PreTrainedTokenizerBase) -> Encode:
    """Puzzle → ids of its prompt and the beginning of the answer."""
    if not asked.chat:
        frame = prompt_frame(tokenizer, section.add_bos)
        return lambda puzzle: [*frame.before, *text_ids(tokenizer, [puzzle.text])[0]]
    if not tokenizer.chat_template:
        raise UserError("chat is on, but the tokenizer has no chat template; set chat: false")
    template = open_chat_template(TokenEncoder(tokenizer), None)

    def encode(puzzle: Puzzle) -> list[int]:
        _, ids = template.prompt_ids(puzzle.prompt, add_bos=section.add_bos)
        return [*ids, *text_ids(tokenizer, [puzzle.prefix.lstrip()])[0]]

    return encode


def _material(section: Needle, asked: Ruler) -> Material:
    """Essays, where a task needs them, and questions. Raises UserError if a file is missing or damaged."""
    names, separator = asked.haystack, asked.haystack_separator
    if not names:
        names, separator = section.haystack, section.haystack_separator
    essays: list[str] = []
    needing = [task for task in asked.judged if TASKS[task].needs_essays]
    if needing:
        if not names:
            raise UserError(
                f"{', '.join(needing)} hide needles in essays, and there are none; name text files in "
                "needle.ruler.haystack (or needle.haystack), or list other tasks in needle.ruler.tasks"
            )
        essays = load_filler([resolve_file(name) for name in expand_paths(names)], separator)
    files: dict[RulerTask, str | None] = {"qa_1": asked.squad, "qa_2": asked.hotpotqa}
    questions = {
        task: read_questions(resolve_file(expand_paths([name])[0]))
        for task, name in files.items()
        if name is not None and task in asked.judged
    }
    return Material(essays, questions)
