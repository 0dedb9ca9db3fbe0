"""RULER's question answering: a question's own documents among those of other questions (2404.06654, section 3).

The questions come from a user's file: jsonl with {context, question, answers}, a context being a text or a list of
them; rows of SQuAD (`answers: {text: [...]}`); SQuAD's own file; rows of HotpotQA ({question, answer, context: [[title,
[sentence, ...]], ...]}).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.jobs.data.ruler.draw import Draw
from radlads.tasks.jobs.data.ruler.puzzle import Puzzle
from radlads.tasks.jobs.data.text.text_files import json_rows

_ASK = "Answer the question based on the given documents. Only give me the answer and do not output any other words."


@dataclass(frozen=True)
class Question:
    """A question with the documents that answer it."""

    text: str
    answers: tuple[str, ...]
    """Any of them is right."""
    documents: tuple[str, ...]


@dataclass(frozen=True)
class Questions:
    """All questions of a file."""

    all: tuple[Question, ...]

    @cached_property
    def documents(self) -> tuple[str, ...]:
        """Different documents, in order."""
        return tuple(dict.fromkeys(document for question in self.all for document in question.documents))


def build_qa(questions: Questions, number: int, draw: Draw, units: int) -> Puzzle:
    """units: documents in all, the question's own among them."""
    question = questions.all[number]
    own = set(question.documents)
    others = [document for document in questions.documents if document not in own]
    documents = [*question.documents, *draw.rng.sample(others, units - len(question.documents))]
    draw.rng.shuffle(documents)
    context = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(documents, start=1))
    prompt = f"{_ASK}\n\nThe following are given documents.\n\n{context}\n\n{_ASK}\n\nQuestion: {question.text}"
    return Puzzle(prompt, " Answer:", question.answers, f" {question.answers[0]}")


def read_questions(path: Path) -> Questions:
    """The questions of a file; those without an answer are left out. Raises UserError with file and line."""
    found = [
        question
        for line, row in json_rows(path)
        for question in _questions_of(row, f"{path}, line {line}")
        if question.answers and question.documents
    ]
    if not found:
        raise UserError(f"{path}: contains no question with an answer")
    return Questions(tuple(dict.fromkeys(found)))


def _questions_of(row: dict[str, Any], where: str) -> Iterator[Question]:
    if isinstance(row.get("data"), list):  # SQuAD's own file
        try:
            for paragraph in (p for article in row["data"] for p in article["paragraphs"]):
                for one in paragraph["qas"]:
                    yield _question({**one, "context": paragraph["context"]}, where)
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}: not SQuAD's form (data, paragraphs, context, qas)") from error
    else:
        yield _question(row, where)


def _question(row: dict[str, Any], where: str) -> Question:
    given = row.get("answers", row.get("answer"))
    given = given.get("text") if isinstance(given, dict) else given
    answers: Any = [one.get("text") if isinstance(one, dict) else one for one in _listed(given)]
    documents: Any = [_document(one) for one in _listed(row.get("context"))]
    question = row.get("question")
    if not isinstance(question, str) or given is None or not _are_texts(answers) or not _are_texts(documents):
        raise UserError(
            f"{where}: not a question; expected {{context: text or texts, question: text, answers: [text, ...]}}, "
            "SQuAD's rows or HotpotQA's"
        )
    return Question(question.strip(), _different(answers), _different(documents))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _document(value: Any) -> Any:
    """The text of a document, which HotpotQA gives as [title, sentences]."""
    titled = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and _are_texts(value[1])
    return f"{value[0]}\n{''.join(value[1])}" if titled else value


def _different(texts: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)
