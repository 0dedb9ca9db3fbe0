"""Where a job reads its teacher: a folder or hub id, or the folder that was made of a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass

from radlads.tasks.contracts.pins.places import is_gguf, resolve_teacher_path
from radlads.tasks.contracts.specs import TeacherRef
from radlads.tasks.jobs.common import Job

TEACHER_INPUT = "teacher"
"""The job's input with the folder of a GGUF teacher."""


@dataclass(frozen=True)
class TeacherPlace:
    """An absolute folder or a hub id, and the commit of the latter."""

    path: str
    revision: str | None


def teacher_place(job: Job, teacher: TeacherRef) -> TeacherPlace:
    """The place of a job's teacher. Collective. Raises UserError where there is none."""
    if is_gguf(teacher.path):
        return TeacherPlace(str(job.input(TEACHER_INPUT) / "model"), None)
    return TeacherPlace(resolve_teacher_path(teacher.path), teacher.revision)
