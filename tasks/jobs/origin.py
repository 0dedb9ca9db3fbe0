"""The teacher a student was converted from, recorded in its config, and checks of later inputs against it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.pins.content import hash_of
from radlads.tasks.contracts.specs import TeacherRef, TrainSpec, foreign_teacher
from radlads.tasks.contracts.stages import PRETRAIN
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.sources import load_tokenizer

_KEY = "converted_from"


@dataclass(frozen=True)
class Origin:
    """Fingerprints of a student's teacher and tokenizer."""

    teacher: str
    tokenizer: str

    def is_from(self, teacher: TeacherRef) -> bool:
        """Whether teacher and tokenizer are these."""
        return (self.teacher, self.tokenizer) == (teacher.fingerprint, teacher.tokenizer_fingerprint)


def write_origin(config: PreTrainedConfig, teacher: TeacherRef) -> None:
    """Record the teacher and its tokenizer in the config of a student converted from it."""
    setattr(config, _KEY, {"teacher": teacher.fingerprint, "tokenizer": teacher.tokenizer_fingerprint})


def read_origin(config: PreTrainedConfig | dict[str, Any]) -> Origin | None:
    """The origin in a student's config; None if an older version wrote it, which recorded none."""
    found = config.get(_KEY) if isinstance(config, dict) else getattr(config, _KEY, None)
    return Origin(found["teacher"], found["tokenizer"]) if isinstance(found, dict) else None


def check_training(spec: TrainSpec, config: PreTrainedConfig, data_fingerprint: str) -> None:
    """Raises UserError unless student, teacher and dataset of a training job belong together.

    config: the student's. data_fingerprint: of the tokenizer that the dataset was made with.
    """
    if spec.objective == PRETRAIN.name:
        check_data(data_fingerprint, spec.pins["section.tokenizer"].content)
        return
    made_from = _known(read_origin(config))
    if spec.teacher is not None and not made_from.is_from(spec.teacher):
        raise UserError(
            f"the student was converted from another teacher ({made_from.teacher[:20]}) than the one that it is to "
            f"learn from ({spec.teacher.fingerprint[:20]}); choose a new run name"
        )
    check_data(data_fingerprint, made_from.tokenizer)


def check_data(found: str, expected: str) -> None:
    """Raises UserError where a dataset was made with another tokenizer than the model has. Both are fingerprints."""
    if found != expected:
        raise UserError(
            f"the dataset was made with another tokenizer ({found[:20]}) than the model's ({expected[:20]}); "
            "tokenize with the teacher's own tokenizer"
        )


def check_judged(
    job: Job,
    names: Sequence[str],
    teacher: TeacherRef,
    tokenizer: PreTrainedTokenizerBase,
    *,
    other_teacher: bool,
) -> bool:
    """Check that the students, inputs of an evaluation job, were all converted from this teacher.

    tokenizer: the teacher's. other_teacher: they need not be, but the vocabulary must be the same. Raises UserError.
    """
    expected, own = vocabulary_fingerprint(tokenizer), True
    for name in names:
        folder = job.input(name) / "model"
        made_from = read_origin(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        if not other_teacher and not _known(made_from).is_from(teacher):
            raise UserError(foreign_teacher(name, _known(made_from).teacher, teacher.fingerprint))
        own = own and made_from is not None and made_from.is_from(teacher)
        theirs = load_tokenizer(str(folder), trust_remote_code=teacher.trust_remote_code)
        if vocabulary_fingerprint(theirs) != expected:
            raise UserError(f"'{name}' has another vocabulary than the teacher, so the two cannot be compared")
    return own


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over every token and its id, added tokens included."""
    entries: dict[Any, int] = tokenizer.get_vocab()
    return hash_of(sorted((str(token), index) for token, index in entries.items()))


def _known(made_from: Origin | None) -> Origin:
    if made_from is None:
        raise UserError(
            "the student does not say which teacher it was converted from: an older version made it; transplant again"
        )
    return made_from
