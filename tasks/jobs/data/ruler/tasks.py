"""The thirteen tasks of RULER: their sizes, how a prompt is made to fit a length, and how a reply is scored."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.judging.ruler import RulerTask
from radlads.tasks.jobs.data.ruler.draw import Draw, Half
from radlads.tasks.jobs.data.ruler.niah import Niah, build_niah
from radlads.tasks.jobs.data.ruler.puzzle import Fitted, Puzzle, fit
from radlads.tasks.jobs.data.ruler.qa import Questions, build_qa
from radlads.tasks.jobs.data.ruler.tracing import LEAST_NOISE, build_tracing
from radlads.tasks.jobs.data.ruler.words import COMMON, LEAST_CODED, LONG, SCARCE, build_common, build_frequent

Group = Literal["single", "multikey", "multi", "tracing", "aggregation", "qa"]
GROUPS: dict[Group, str] = {
    "single": "single needles",
    "multikey": "needles among other keys",
    "multi": "several values or queries",
    "tracing": "variable tracking",
    "aggregation": "common and frequent words",
    "qa": "question answering",
}
"""Group of tasks → its name in reports."""


@dataclass(frozen=True)
class TaskKind:
    """What is fixed of a task."""

    group: Group
    new_tokens: int
    """Generated for an answer."""
    niah: Niah | None = None

    @property
    def needs_essays(self) -> bool:
        return self.niah is not None and self.niah.haystack == "essays"


TASKS: dict[RulerTask, TaskKind] = {
    "niah_single_1": TaskKind("single", 128, Niah("noise")),
    "niah_single_2": TaskKind("single", 128, Niah("essays")),
    "niah_single_3": TaskKind("single", 128, Niah("essays", value="uuids")),
    "niah_multikey_1": TaskKind("multikey", 128, Niah("essays", keys=4)),
    "niah_multikey_2": TaskKind("multikey", 128, Niah("needles")),
    "niah_multikey_3": TaskKind("multikey", 128, Niah("needles", key="uuids", value="uuids")),
    "niah_multivalue": TaskKind("multi", 128, Niah("essays", values=4)),
    "niah_multiquery": TaskKind("multi", 128, Niah("essays", keys=4, queries=4)),
    "vt": TaskKind("tracing", 30),
    "cwe": TaskKind("aggregation", 120),
    "fwe": TaskKind("aggregation", 50),
    "qa_1": TaskKind("qa", 32),
    "qa_2": TaskKind("qa", 32),
}


_MOST_REPEATED = 0.9  # of a length, by the ten common words alone


@dataclass(frozen=True)
class Material:
    """Texts that prompts are made of."""

    essays: Sequence[str] = ()
    """Sentences, in order."""
    questions: dict[RulerTask, Questions] | None = None


def make_puzzle(
    task: RulerTask,
    *,
    length: int,
    cost: Callable[[Puzzle], int],
    seed: str,
    half: Half,
    material: Material,
    guess: int | None = None,
) -> Fitted:
    """A prompt of a task other than qa that costs at most `length` tokens, and not much less; a function of its
    arguments. cost: tokens of prompt and answer. guess: of its units. Raises UserError if the length is too short, or
    the haystack."""
    niah, form = TASKS[task].niah, length

    def build(units: int) -> Puzzle:
        draw = Draw(seed, half)
        if niah is not None:
            return build_niah(niah, draw, units, material.essays)
        return _BUILDERS[task](draw, units, form)

    least = niah.needles if niah is not None else _LEAST[task]
    if task == "cwe" and length >= LONG and cost(build(least)) > _MOST_REPEATED * length:
        form = LONG - 1  # a tokenizer with many tokens a word: the lists of shorter lengths
    if task == "cwe" and form < LONG and cost(build(least)) > length:
        form = SCARCE
    most = len(material.essays) if TASKS[task].needs_essays else None
    if most is not None and most < least:
        raise UserError(f"{task} hides needles in essays; give text files in `haystack`, or leave the task out")
    found = fit(build, cost, length, least=least, most=most, guess=guess)
    return _checked(task, found, most, "sentences of the haystack")


def make_qa_puzzles(
    task: RulerTask, *, count: int, length: int, cost: Callable[[Puzzle], int], seed: str, material: Material
) -> list[Puzzle]:
    """Prompts of qa_1 or qa_2, each with another question: the first `count`, in an order by the seed, whose own
    documents fit in `length` tokens. Raises UserError if there are fewer, or too few documents to fill the length."""
    questions = (material.questions or {})[task]
    most = len(questions.documents)

    def fitted() -> Iterator[Fitted]:
        for number in Draw(seed, "judging").rng.sample(range(len(questions.all)), len(questions.all)):

            def build(units: int, number: int = number) -> Puzzle:
                return build_qa(questions, number, Draw(f"{seed}:{number}", "judging"), units)

            yield fit(build, cost, length, least=len(questions.all[number].documents), most=most)

    found: list[Puzzle] = []
    for one in fitted():
        if one.cost <= length:
            found.append(_checked(task, one, most, "documents of its questions").puzzle)
        if len(found) == count:
            return found
    raise UserError(
        f"{task}: only {len(found)} of {len(questions.all)} questions fit with their documents in {length} tokens, and "
        f"{count} samples are asked for; use longer lengths or fewer samples, or leave the task out"
    )


def score(task: RulerTask, reply: str, answers: Sequence[str]) -> float:
    """RULER's string match, letter case aside: the share of the answers that the reply contains; of qa: whether it
    contains any."""
    text = re.sub(r"[\x00-\x1f]", "\n", reply).strip().lower()
    found = [answer.lower() in text for answer in answers]
    return float(any(found)) if TASKS[task].group == "qa" else sum(found) / len(found)


def _checked(task: RulerTask, fitted: Fitted, most: int | None, what: str) -> Fitted:
    if fitted.cost > fitted.room:
        raise UserError(
            f"{task} does not fit in {fitted.room} tokens: its shortest prompt and answer take {fitted.cost}; use "
            "longer lengths, or leave the task out"
        )
    if fitted.units == most and not fitted.is_full:
        raise UserError(
            f"{task}: all {most} {what} fill only {fitted.cost} of {fitted.room} tokens; give more text, or use "
            "shorter lengths"
        )
    return fitted


_BUILDERS: dict[RulerTask, Callable[[Draw, int, int], Puzzle]] = {
    "vt": build_tracing,
    "cwe": build_common,
    "fwe": build_frequent,
}
_LEAST: dict[RulerTask, int] = {"vt": LEAST_NOISE, "cwe": COMMON + 1, "fwe": LEAST_CODED}
