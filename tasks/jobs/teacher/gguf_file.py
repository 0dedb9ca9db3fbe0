"""What a GGUF file is, as plan, report and card say it."""

from __future__ import annotations

from radlads.model.teacher.gguf import GgufTeacher
from radlads.tasks.contracts.specs import GgufFile


def describe_gguf(teacher: GgufTeacher, sha256: str) -> GgufFile:
    """sha256: of the file; "" if it was not read."""
    dtype = str(teacher.dtype).removeprefix("torch.")
    return GgufFile(name=teacher.header.path.name, sha256=sha256, kinds=teacher.kinds, dtype=dtype)
