"""Requests of `radlads import-openmose` and `export-openmose` to the program that converts weight files."""

from __future__ import annotations

from typing import Literal

from radlads.tasks.contracts.job import Sheet


class OpenMoseImport(Sheet):
    """Convert weights under OpenMOSE's names into an exported student."""

    kind: Literal["import"] = "import"
    weights: str
    """Folder of safetensors."""
    teacher: str
    """Folder or hub id of their teacher, which provides config, tokenizer and fingerprint."""
    revision: str | None = None
    trust_remote_code: bool = False
    """Of the teacher's tokenizer."""
    out: str
    architecture: str | None = None
    """The author's name of the mixer (hxa079, hxa07b, ...), if names and shapes do not determine it."""
    rope: bool | None = None
    """Whether the mixers rotate; None: by the weights' config, or as the variant was published."""
    attention_rope: bool | None = None
    """Likewise, for the attention layers."""


class OpenMoseExport(Sheet):
    """Write an exported student's weights under OpenMOSE's names."""

    kind: Literal["export"] = "export"
    student: str
    out: str
    marker: bool = False
    """Add the published `layer_architecture` to every converted layer."""
