"""Rows of benchmark files: the columns that the harness's own YAML reads, and those of common JSON-lines copies.

The copies (llm-foundry's evaluation sets) hold finished prompts, from which the harness's columns are taken out again.
"""

from __future__ import annotations

import re
from itertools import takewhile
from typing import Annotated, Any, Literal

from lm_eval.tasks.hellaswag.utils import preprocess
from pydantic import BaseModel, ConfigDict, Field, model_validator

_LETTERS = "ABCDEFGHIJ"
_Row = dict[str, Any]
_Word = Annotated[str, Field(min_length=1)]
_Choices = Annotated[list[_Word], Field(min_length=2, max_length=len(_LETTERS))]


class Columns(BaseModel):
    """One row; further columns of the file are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    def row(self) -> _Row:
        """In the harness's columns. Raises ValueError."""
        return self.model_dump()


class Lambada(Columns):
    text: _Word

    @model_validator(mode="after")
    def _has_two_words(self) -> Lambada:
        if not all(self.text.rpartition(" ")[::2]):
            raise ValueError("the text must end with a space and the word that is asked for")
        return self


class LambadaCopy(Columns):
    context: _Word
    continuation: _Word

    def row(self) -> _Row:
        word = self.continuation.strip()
        if not word or " " in word:
            raise ValueError(f"the continuation must be one word, not '{word[:40]}'")
        return {"text": f"{self.context.rstrip(' ')} {word}"}


class LabelledChoices(Columns):
    text: _Choices
    label: list[_Word]


class _Answered(Columns):
    """With choices that have labels."""

    choices: LabelledChoices
    answerKey: _Word  # noqa: N815 - the harness's name

    @model_validator(mode="after")
    def _answer_is_there(self) -> _Answered:
        if len(self.choices.label) != len(self.choices.text) or self.answerKey.lstrip() not in self.choices.label:
            raise ValueError("choices needs as many labels as texts, and answerKey must be one of them")
        return self


class ChoiceQuestion(_Answered):
    question: _Word


class QuestionStem(_Answered):
    question_stem: _Word


class Piqa(Columns):
    goal: _Word
    sol1: _Word
    sol2: _Word
    label: Literal[0, 1]


class HellaSwag(Columns):
    activity_label: _Word
    ctx_a: str
    ctx_b: str
    endings: _Choices
    label: str | int

    @model_validator(mode="after")
    def _label_is_an_ending(self) -> HellaSwag:
        if not str(self.label).isdecimal() or int(self.label) >= len(self.endings):
            raise ValueError("label must be the number of an ending, from 0")
        self.label = str(self.label)
        return self


class HellaSwagCopy(Columns):
    """Without the activity, which the harness writes before the text; the row is as its `process_docs` leaves one."""

    question: _Word
    choices: dict[str, _Word]
    answer: str

    def row(self) -> _Row:
        if self.answer not in self.choices:
            raise ValueError("answer must be the letter of a choice")
        letters = sorted(self.choices)
        choices = [preprocess(self.choices[letter]) for letter in letters]
        return {"query": preprocess(self.question).strip(), "choices": choices, "label": letters.index(self.answer)}


class WinoGrande(Columns):
    sentence: Annotated[str, Field(pattern="_")]
    option1: _Word
    option2: _Word
    answer: Literal["1", "2"]


class WinoGrandeCopy(Columns):
    context_options: Annotated[list[_Word], Field(min_length=2, max_length=2)]
    continuation: _Word
    gold: Literal[0, 1]

    def row(self) -> _Row:
        first, second = self.context_options
        # The options begin at a word, where the common text ends.
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
        start = first[:same].rfind(" ") + 1
        if "_" in first[:start] or first == second:
            raise ValueError("the two context_options must differ, and no '_' may stand before that")
        return {
            "sentence": f"{first[:start]}_ {self.continuation}",
            "option1": first[start:],
            "option2": second[start:],
            "answer": str(self.gold + 1),
        }


class BoolQ(Columns):
    passage: _Word
    question: _Word
    label: Literal[0, 1]


class Copa(Columns):
    premise: _Word
    choice1: _Word
    choice2: _Word
    question: Literal["cause", "effect"]
    label: Literal[0, 1]


class Mmlu(Columns):
    subject: _Word
    question: _Word
    choices: Annotated[list[str], Field(min_length=4, max_length=4)]
    answer: Annotated[int, Field(ge=0, lt=4)]


class Gsm8k(Columns):
    question: _Word
    answer: Annotated[str, Field(pattern="#### ")]


class _Ranked(Columns):
    """A finished prompt, its continuations and the number of the right one."""

    query: _Word
    choices: _Choices
    gold: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _gold_is_a_choice(self) -> _Ranked:
        if self.gold >= len(self.choices):
            raise ValueError(f"gold is {self.gold}, but there are {len(self.choices)} choices, counted from 0")
        return self

    def _after(self, beginning: str) -> str:
        """The query's text after its beginning."""
        if not self.query.startswith(beginning):
            raise ValueError(f"query must begin with '{beginning}'")
        return self.query.removeprefix(beginning)

    def _two(self) -> tuple[str, str]:
        if len(self.choices) != 2:
            raise ValueError(f"two choices are needed, not {len(self.choices)}")
        return self.choices[0], self.choices[1]

    def _labelled(self, choices: list[str]) -> _Row:
        labels = list(_LETTERS[: len(choices)])
        return {"choices": {"text": choices, "label": labels}, "answerKey": labels[self.gold]}


class QuestionCopy(_Ranked):
    def row(self) -> _Row:
        return {"question": self._after("Question: "), **self._labelled(self.choices)}


class QuestionStemCopy(_Ranked):
    def row(self) -> _Row:
        return {"question_stem": self.query, **self._labelled(self.choices)}


class PiqaCopy(_Ranked):
    def row(self) -> _Row:
        goal, (sol1, sol2) = self._after("Question: ").removesuffix("\n"), self._two()
        return {"goal": goal, "sol1": sol1, "sol2": sol2, "label": self.gold}


class BoolQCopy(_Ranked):
    def row(self) -> _Row:
        passage, mark, question = self._after("Passage: ").rpartition("\nQuestion: ")
        if not mark or not question.endswith("?") or sorted(self.choices) != ["no", "yes"]:
            raise ValueError("query must end with a line 'Question: …?', and choices must be no and yes")
        return {"passage": passage, "question": question[:-1], "label": int(self.choices[self.gold] == "yes")}


class CommonsenseCopy(_Ranked):
    """Its query ends with the choices; `choices` are their letters."""

    def row(self) -> _Row:
        question, mark, listed = self._after("Question: ").partition("\nChoices:\n")
        texts = re.findall(r"^[A-J]\. (.*)$", listed, re.MULTILINE)
        if not mark or len(texts) != len(self.choices):
            raise ValueError("query must end with 'Choices:' and a line for each choice, 'A. …'")
        return {"question": question, **self._labelled(texts)}


class CopaCopy(_Ranked):
    def row(self) -> _Row:
        premise, _, connector = self.query.rpartition(", ")
        if connector not in ("because", "therefore"):
            raise ValueError("query must end with ', because' or ', therefore'")
        first, second = self._two()
        question = {"because": "cause", "therefore": "effect"}[connector]
        # The harness drops the premise's last character, its full stop.
        return {
            "premise": f"{premise}.",
            "choice1": first,
            "choice2": second,
            "question": question,
            "label": self.gold,
        }
