"""Probe data of `choose: recall` with `probe`: RULER's needles with their answers, for scoring without generation."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.choice import NeedleProbe, RecallProbe
from radlads.tasks.contracts.recipe.judging.ruler import OneNeedle
from radlads.tasks.jobs.data.ruler.puzzle import Puzzle
from radlads.tasks.jobs.data.ruler.tasks import TASKS, Material, make_puzzle
from radlads.tasks.jobs.data.text.chat import open_chat_template
from radlads.tasks.jobs.data.text.recall import Quiz, load_filler
from radlads.tasks.jobs.data.text.token_encoder import TokenEncoder, prompt_frame
from radlads.tasks.jobs.sources import expand_paths, resolve_file


def make_needles(
    section: RecallProbe, probe: NeedleProbe, tokenizer: PreTrainedTokenizerBase, *, add_bos: bool
) -> dict[int, list[Quiz]]:
    """Length → quizzes, `section.documents` in total: all lengths of one task, then of the next. A quiz has at most its
    length of tokens, BOS and answer included. Pure function of its arguments. Raises UserError."""
    essays: list[str] = []
    if any(TASKS[task].needs_essays for task in probe.tasks):
        essays = load_filler(
            [resolve_file(name) for name in expand_paths(section.haystack)], section.haystack_separator
        )
    encode = lru_cache(maxsize=16)(_encoder(probe, tokenizer, add_bos))  # what fits is asked for again
    guesses: dict[tuple[OneNeedle, int], int] = {}
    quizzes: dict[int, list[Quiz]] = {}
    for number in range(section.documents):
        turn, step = divmod(number, len(section.lengths))
        task, length = probe.tasks[turn % len(probe.tasks)], section.lengths[step]
        found = make_puzzle(
            task,
            length=length,
            cost=lambda puzzle: len(encode(puzzle).ids),
            seed=f"probe:{section.seed}:{number}",
            half="training",
            material=Material(essays),
            guess=guesses.get((task, length)),
        )
        guesses.setdefault((task, length), found.units)
        quizzes.setdefault(length, []).append(encode(found.puzzle))
    return quizzes


def _encoder(probe: NeedleProbe, tokenizer: PreTrainedTokenizerBase, add_bos: bool) -> Callable[[Puzzle], Quiz]:
    """Puzzle → its prompt and answers as the model reads them."""
    encoder = TokenEncoder(tokenizer)
    if probe.chat and not tokenizer.chat_template:
        raise UserError("attention_layers.probe.chat is on, but the tokenizer has no chat template; set chat: false")
    if not tokenizer.is_fast:
        raise UserError(
            "attention_layers.probe needs a fast tokenizer (tokenizer.json), which reports token positions; remove "
            "probe"
        )
    template = open_chat_template(encoder, None) if probe.chat else None
    frame = prompt_frame(tokenizer, add_bos)

    def encode(puzzle: Puzzle) -> Quiz:
        if template is None:
            before, shown = list(frame.before), puzzle.text
        else:
            _, before = template.prompt_ids(puzzle.prompt, add_bos=add_bos)
            shown = puzzle.prefix.lstrip()
        text = shown + puzzle.reply
        ((ids, spans),) = encoder.encode_texts([text], offsets=True)
        answers, at = [0] * len(ids), len(shown)
        for number, answer in enumerate(puzzle.answers, start=1):
            start = text.index(answer, at)
            at = start + len(answer)
            for place, (first, end) in enumerate(spans if spans is not None else ()):
                if first < at and end > start:
                    answers[place] = number
        return Quiz(text, [*before, *ids], [*[0] * len(before), *answers])

    return encode
