"""What `radlads import-openmose` and `export-openmose` ask of the program that converts weight files."""

from __future__ import annotations

from typing import Literal

from radlads.tasks.contracts.job import Sheet


class OpenMoseImport(Sheet):
    """Weights under OpenMOSE's names become an exported student."""

    kind: Literal["import"] = "import"
    weights: str
    """Folder of safetensors."""
    teacher: str
    """Folder or hub id of the model that they were converted from: its config, tokenizer and fingerprint."""
    revision: str | None = None
    trust_remote_code: bool = False
    """Of the teacher's tokenizer."""
    out: str
    architecture: str | None = None
    """As the author calls it (hxa079, hxa07b, ...), where names and shapes do not say."""
    rope: bool | None = None
    """Of the mixers; None: as the weights' config says, or as the variant was published."""
    attention_rope: bool | None = None
    """Of the layers that stayed attention, likewise."""


class OpenMoseExport(Sheet):
    """An exported student's weights are written under OpenMOSE's names."""

    kind: Literal["export"] = "export"
    student: str
    out: str
    marker: bool = False
    """Add the published `layer_architecture` to every converted layer."""
