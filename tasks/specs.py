"""What each stage is asked for: the typed form of JobSpec.spec, and the digest that names its product."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from radlads.tasks.job import InputRef, Sheet, Stage, UserError, first_fault, stage_digest
from radlads.tasks.section_choice import AttentionChoice, Calibration
from radlads.tasks.section_memory import FrozenBits
from radlads.tasks.sections import (
    Align,
    Dataset,
    Distill,
    Evaluate,
    Finetune,
    Needle,
    Pretrain,
    Publish,
    Recipe,
    Student,
)


class TeacherRef(Sheet):
    """A teacher, pinned by what it holds."""

    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    fingerprint: str
    """Hub: the commit. Folder: sha256 over config, tokenizer and weight headers. Names the teacher in digests."""


class FileRef(Sheet):
    """A corpus file, pinned by its content."""

    path: str
    size: int
    sha256: str


class PlanSpec(Sheet):
    """No inputs. Product: plan.json (a PlanReport)."""

    recipe: Recipe
    preview: bool = False
    """For a person to look at: what does not fit into memory is reported beside the sizes and refuses nothing."""
    sizes_only: bool = False
    """Parameters, memory and cost from the teacher's config alone: no weights, no tokenizer, no text is looked at."""


class PlanReport(Sheet):
    """plan.json: what later specs are pinned to, and the numbers that a user decides by."""

    teacher: TeacherRef | None
    tokenizer: str
    """Folder or hub id."""
    tokenizer_fingerprint: str
    files: dict[str, tuple[FileRef, ...]]
    """Dataset name → its corpus files, globs resolved."""
    teacher_parameters: int
    student_parameters: int
    mixer_parameters: int
    new_parameters: int = 0
    """Of the mixers: without a counterpart in the teacher."""
    idle_parameters: int = 0
    """Of experts that a token does not go to, in teacher and student alike."""
    groups: dict[str, int] = Field(default_factory=dict)
    """Parameter group (mixer, attention, mlp, norms, embeddings, head) → parameters of the student."""
    num_layers: int
    attention_layers: tuple[int, ...]
    """Empty where they are chosen after align."""
    stages: dict[str, dict[str, Any]]
    """Stage → {tokens, steps, context, batch, trainable_parameters, epochs, memory_bytes_per_gpu: {weights, gradients,
    optimizer, teacher, activations, logits, buffers, overhead, total, host}, seconds, gpu_hours, dollars}. Memory,
    seconds and what follows from them are estimates; None where nothing is known."""
    choice: AttentionChoice | None = None
    """A choice after align, its probe made to fit its budget."""
    data: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Dataset name → {bytes, bytes_per_token, tokens, assistant}: estimates from its first documents."""
    gpu_hours: float | None = None
    """Estimated, of all stages; None on a CPU."""
    dollars: float | None = None
    """Estimated; None without `dollars_per_gpu_hour`."""
    assumptions: dict[str, Any] = Field(default_factory=dict)
    """What the estimates rest on: peak FLOP/s, utilisation, processes, memory of one device."""
    warnings: tuple[str, ...] = ()
    misfits: tuple[str, ...] = ()
    """Stages that do not fit into memory, and what would help; only a preview has any."""


class TokenizeSpec(Sheet):
    """No inputs (shared between runs). Product: index.json and the files it names: token shards (uint16 or uint32,
    little endian), masks beside them (uint8, chat data only), document boundaries (uint64)."""

    name: str
    dataset: Dataset
    files: tuple[FileRef, ...]
    tokenizer: str
    tokenizer_fingerprint: str
    teacher: TeacherRef | None
    """Only where a source samples from the teacher."""


class TransplantSpec(Sheet):
    """No inputs. Product: model/ (the student's Hugging Face folder), transplant.json (the report)."""

    teacher: TeacherRef
    student: Student


class TrainSpec(Sheet):
    """Inputs: student (a product with model/; not for pretrain), data (a dataset). Product: model/, train.json."""

    objective: Literal["align", "distill", "finetune", "pretrain"]
    section: Annotated[Align | Distill | Finetune | Pretrain, Field()]
    teacher: TeacherRef | None
    teacher_bits: FrozenBits = 16
    mlp_bits: FrozenBits = 16
    """Of the student's frozen MLPs."""
    calibrate: Calibration | None = None
    """Align only."""


class ChooseSpec(Sheet):
    """Inputs: student (aligned, every layer converted), data (a dataset; recall only). Product: model/ (the student
    with the chosen layers restored), choose.json, choose.png."""

    section: AttentionChoice
    teacher: TeacherRef
    attention_rope: bool
    """Of the product; while it is scored, a restored layer has the teacher's rotary positions."""
    run_tokens: int
    """What the cost is a share of."""


class EvaluateSpec(Sheet):
    """Inputs: student, data, and one entry per earlier stage's model to be compared. Product: evaluate.json."""

    section: Evaluate
    teacher: TeacherRef


class NeedleSpec(Sheet):
    """Inputs: student. Product: needle.json, needle.png."""

    section: Needle
    teacher: TeacherRef
    training_length: int


class PublishSpec(Sheet):
    """Inputs: every earlier product. Product: model/ with its card, report.md, pictures."""

    section: Publish
    recipe: Recipe


StageSpec = PlanSpec | TokenizeSpec | TransplantSpec | TrainSpec | ChooseSpec | EvaluateSpec | NeedleSpec | PublishSpec

_SPEC_OF_STAGE: dict[str, type[StageSpec]] = {
    "plan": PlanSpec,
    "tokenize": TokenizeSpec,
    "transplant": TransplantSpec,
    "pretrain": TrainSpec,
    "align": TrainSpec,
    "choose": ChooseSpec,
    "distill": TrainSpec,
    "finetune": TrainSpec,
    "evaluate": EvaluateSpec,
    "needle": NeedleSpec,
    "publish": PublishSpec,
}


def parse_spec(stage: Stage, values: dict[str, Any]) -> StageSpec:
    """The typed form of JobSpec.spec. Raises UserError."""
    try:
        return _SPEC_OF_STAGE[stage].model_validate(values)
    except ValidationError as error:
        raise UserError(f"job.json: spec: {first_fault(error)}") from None


# What changes how a product is made, not what it is: moving a folder or checkpointing more often is the same run.
_OPERATIONAL = {
    "micro_batch",
    "checkpoint_every",
    "keep_checkpoints",
    "heldout_every",
    "resources",
    "run_tokens",
}

_PLACES = {"path", "paths", "haystack", "tokenizer"}


def spec_digest(stage: Stage, spec: StageSpec, inputs: dict[str, InputRef]) -> str:
    """The digest of a stage: of its spec without operational settings and without places, and of its inputs."""
    return stage_digest(stage, _identity(spec.model_dump(mode="json")), inputs)


def _identity(value: Any) -> Any:
    if isinstance(value, dict):
        # A place is dropped only where a fingerprint or a hash beside it names the content.
        pinned = "fingerprint" in value or "sha256" in value
        hidden = _OPERATIONAL | ({"path"} if pinned else set())
        if "tokenizer_fingerprint" in value:
            hidden |= {"tokenizer"}
        kept = {key: item for key, item in value.items() if key not in hidden}
        return {key: _placeless(item) if key in _PLACES else _identity(item) for key, item in kept.items()}
    if isinstance(value, list | tuple):
        return [_identity(item) for item in value]
    return value


def _placeless(value: Any) -> Any:
    """An absolute place by its last name: the same recipe beside the same files in another folder is the same run.
    What the files hold is pinned by the plan."""
    if isinstance(value, list | tuple):
        return [_placeless(item) for item in value]
    return PurePosixPath(value).name if isinstance(value, str) and value.startswith("/") else value
