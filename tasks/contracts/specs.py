"""The spec of each stage: the typed form of JobSpec.spec, and the digest that names the stage's product."""

from __future__ import annotations

from types import NoneType
from typing import Annotated, Any, get_args

from pydantic import Field, SerializeAsAny, ValidationError, ValidationInfo, field_validator

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.identity import identity
from radlads.tasks.contracts.job import InputRef, Sheet, first_fault, stage_digest
from radlads.tasks.contracts.recipe.base import OPERATIONAL, PLACE, ReadsKind
from radlads.tasks.contracts.recipe.choice import AttentionChoice
from radlads.tasks.contracts.recipe.memory import FrozenBits
from radlads.tasks.contracts.recipe.sections import (
    Dataset,
    Evaluate,
    Needle,
    Publish,
    Recipe,
    Student,
    Training,
)
from radlads.tasks.contracts.recipe.teacher import Calibration
from radlads.tasks.contracts.stages import Stage, TrainingStage, stage_info


class TeacherRef(Sheet):
    """A teacher, pinned by its content."""

    path: Annotated[str, PLACE]
    revision: Annotated[str | None, PLACE] = None
    trust_remote_code: bool = False
    """Of its tokenizer."""
    fingerprint: str
    """Hub: the commit. Folder: sha256 over config, tokenizer and weights. GGUF: of the file. Represents the teacher in
    digests."""
    tokenizer_fingerprint: str = ""
    """As in TokenizeSpec; datasets and students of this teacher are compared by it."""


class GgufFile(Sheet):
    """The GGUF file that a teacher was kept in."""

    name: str
    sha256: str
    """Empty where only sizes are planned."""
    kinds: dict[str, int]
    """ggml type → number of tensors, that with most elements first."""
    dtype: str
    """Of the dequantised weights."""

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in self.kinds.items())
        whole = f"GGUF with tensors of {kinds}; dequantised once by transformers, to {self.dtype}"
        return f"{whole}; sha256 {self.sha256 or 'not read'}"


class FileRef(Sheet):
    """A file, pinned by its content."""

    path: str
    """As it was found, or relative to the named folder."""
    size: int
    sha256: str


class Pin(Sheet):
    """The content of a place when the run was planned."""

    kind: ReadsKind
    place: tuple[str, ...]
    """As the recipe names it."""
    revision: str | None = None
    """As the recipe names it."""
    content: str
    """sha256 over the files; of the hub `hub:<id>@<commit>`."""
    commits: dict[str, str] = Field(default_factory=dict)
    """For an evaluation task: hub dataset that it reads → commit."""
    files: tuple[FileRef, ...] = ()

    @property
    def commit(self) -> str | None:
        """The commit of a hub place; None for a local one."""
        return self.content.rpartition("@")[2] if self.content.startswith("hub:") else None

    @property
    def named(self) -> Any:
        """The value that replaces the place in a digest."""
        return {"content": self.content, "commits": self.commits} if self.commits else self.content


Pins = Annotated[dict[str, Pin], PLACE]
"""Location of a field in the spec, dotted → pin of the place that it names."""


class PlanSpec(Sheet):
    """No inputs. Product: plan.json (a PlanReport).

    A plan belongs to one run: it pins the contents of the places that the recipe names, for all later stages.
    """

    recipe: Recipe
    run: str = ""
    contents: dict[str, str] = Field(default_factory=dict)
    """Location in the recipe → content, for places whose content differs from the run's earlier plan because the recipe
    now names another place."""
    preview: bool = False
    """A preview for the user: a stage that does not fit into memory is reported beside the sizes, not refused."""
    sizes_only: bool = False
    """Parameters, memory and cost from the teacher's config alone: no weights, tokenizer or text are read."""


class PlanReport(Sheet):
    """plan.json: the pins of later specs, and the estimates shown to the user."""

    teacher: TeacherRef | None
    gguf: GgufFile | None = None
    """If the teacher is one: the stage dequantize makes a folder of it, which all other stages read."""
    tokenizer: str
    """Folder, GGUF file or hub id."""
    tokenizer_fingerprint: str
    pins: dict[str, Pin] = Field(default_factory=dict)
    """Location of a field in the recipe, dotted → pin of the place that it names."""
    teacher_parameters: int
    student_parameters: int
    mixer_parameters: int
    new_parameters: int = 0
    """Parameters of the mixers without a counterpart in the teacher."""
    idle_parameters: int = 0
    """Parameters of experts that a token is not routed to, the same in teacher and student."""
    groups: dict[str, int] = Field(default_factory=dict)
    """Parameter group (mixer, attention, mlp, norms, embeddings, head) → parameters of the student."""
    num_layers: int
    linear_layers: int = 0
    """Of those: linear attention in the teacher already, so never converted."""
    attention_layers: tuple[int, ...]
    """Empty if they are chosen after align."""
    stages: dict[str, dict[str, Any]]
    """Label of a stage (`distill`, `tokenize train`), in the order of a run → {tokens, steps, context, batch,
    trainable_parameters, epochs, memory_bytes_per_gpu: {weights, gradients, optimizer, teacher, activations, logits,
    buffers, overhead, total, host}, checkpoint: {bytes, host_bytes}, flops, speed, mfu, seconds_by: {train, start,
    heldout, checkpoints, export, judge}, seconds, gpu_hours, dollars}, as far as they apply; of a stage with phases
    also `phases`, in order, each {tokens, steps, context, batch, flops, seconds, gpu_hours, dollars}, training alone.
    Memory, seconds and values derived from them are estimates; None if unknown. speed: in words, where the speed of
    training comes from; mfu: the share of the peak that it means; flops: what must be computed. host: host memory of an
    offloaded optimizer; host_bytes: of the copy that a process keeps of its part of a checkpoint. GPU hours are those
    of the whole machine, which also waits for stages that need no GPU."""
    choice: AttentionChoice | None = None
    """A choice after align, its probe reduced to its budget."""
    data: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Dataset name → {bytes, bytes_per_token, tokens, assistant}, of a mixture also passes, of each source: estimates
    from its first documents."""
    gpu_hours: float | None = None
    """Estimated total of all stages; None on a CPU."""
    dollars: float | None = None
    """Estimated; None without `dollars_per_gpu_hour`."""
    assumptions: dict[str, Any] = Field(default_factory=dict)
    """The basis of the estimates: kind of device, peak FLOP/s, processes, memory of one device."""
    warnings: tuple[str, ...] = ()
    misfits: tuple[str, ...] = ()
    """Stages that do not fit into memory, with remedies; only in a preview."""
    advice: tuple[str, ...] = ()
    """Settings that fit too and would take less time, by the same estimates."""


class DequantizeSpec(Sheet):
    """No inputs (shared between runs). Product: model/ (the teacher's Hugging Face folder), dequantize.json (what the
    file was, a GgufFile)."""

    teacher: TeacherRef


class TokenizeSpec(Sheet):
    """Inputs: teacher, if that is a GGUF file; no others, so that runs share it. Product: index.json and the files it
    names: token shards (uint16 or uint32, little endian), masks beside them (uint8, chat data only), document
    boundaries (uint64)."""

    name: str
    dataset: Dataset
    pins: Pins = Field(default_factory=dict)
    tokenizer: Annotated[str, PLACE]
    tokenizer_fingerprint: str
    trust_remote_code: bool = False
    """Of the tokenizer."""
    teacher: TeacherRef | None
    """Only if a source samples from the teacher."""

    @property
    def files(self) -> tuple[FileRef, ...]:
        """All files that the sources read."""
        return tuple(file for pin in self.pins.values() for file in pin.files)


class TransplantSpec(Sheet):
    """Inputs: teacher, as in TokenizeSpec; likewise in the specs below. Product: model/ (the student's Hugging Face
    folder), transplant.json (the report)."""

    teacher: TeacherRef
    student: Student


def section_class(stage: str) -> type[Training]:
    """The recipe's class of a training stage's section."""
    kinds = get_args(Recipe.model_fields[stage_info(stage).section or ""].annotation)
    found: type[Training] = next(kind for kind in kinds if kind is not NoneType)
    return found


class TrainSpec(Sheet):
    """Inputs: student (a product with model/; not for pretrain), data (a dataset). Product: model/, train.json."""

    objective: TrainingStage
    section: SerializeAsAny[Training]
    """An instance of the recipe's class for the stage."""
    pins: Pins = Field(default_factory=dict)
    teacher: TeacherRef | None
    trust_remote_code: bool = False
    """Fingerprint of the student's tokenizer, which is the teacher's."""
    teacher_bits: FrozenBits = 16
    mlp_bits: FrozenBits = 16
    """Of the student's frozen MLPs."""
    calibrate: Calibration | None = None
    """For align only."""

    @field_validator("section", mode="before")
    @classmethod
    def _section_of_the_stage(cls, value: Any, info: ValidationInfo) -> Any:
        stage = info.data.get("objective")
        if stage is None:  # rejected already by its own validator
            return value
        expected = section_class(stage)
        if isinstance(value, Training) and not isinstance(value, expected):
            raise ValueError(f"the section of {stage} must be of the class {expected.__name__}")
        try:
            return expected.model_validate(value)
        except ValidationError as error:
            raise ValueError(first_fault(error)) from None


class ChooseSpec(Sheet):
    """Inputs: student (aligned, every layer converted), data (a dataset; recall only). Product: model/ (the student
    with the chosen layers restored), choose.json, choose.png."""

    section: AttentionChoice
    pins: Pins = Field(default_factory=dict)
    teacher: TeacherRef
    attention_rope: bool
    """For the product; during scoring a restored layer has the teacher's rotary positions."""
    run_tokens: Annotated[int, OPERATIONAL]
    """The total of which the probe's cost is a share."""


class EvaluateSpec(Sheet):
    """Inputs: student, data, and one entry per earlier stage's model to be compared. Product: evaluate.json."""

    section: Evaluate
    pins: Pins = Field(default_factory=dict)
    teacher: TeacherRef
    other_teacher: bool = False
    """Whether the student may have been made from a teacher other than this one."""


class NeedleSpec(Sheet):
    """Inputs: student. Product: needle.json, needle.png."""

    section: Needle
    pins: Pins = Field(default_factory=dict)
    teacher: TeacherRef
    other_teacher: bool = False
    """As in EvaluateSpec."""
    training_length: int


class PublishSpec(Sheet):
    """Inputs: every earlier product. Product: model/ with its card, report.md, pictures."""

    section: Publish
    recipe: Recipe


def foreign_teacher(name: str, made_from: str, judged_against: str) -> str:
    """Why a student is not evaluated. made_from, judged_against: fingerprints of teachers."""
    return (
        f"'{name}' was converted from another teacher ({made_from[:20]}) than the one that it would be compared with "
        f"({judged_against[:20]}); evaluate it by the recipe of its own run, or allow another teacher "
        "(--other-teacher, other_teacher=true)"
    )


StageSpec = (
    PlanSpec
    | DequantizeSpec
    | TokenizeSpec
    | TransplantSpec
    | TrainSpec
    | ChooseSpec
    | EvaluateSpec
    | NeedleSpec
    | PublishSpec
)

_SPEC_CLASSES: dict[str, type[StageSpec]] = {cls.__name__: cls for cls in get_args(StageSpec)}


def parse_spec(stage: Stage, values: dict[str, Any]) -> StageSpec:
    """The typed form of JobSpec.spec. Raises UserError."""
    try:
        return _SPEC_CLASSES[stage_info(stage).spec].model_validate(values)
    except ValidationError as error:
        raise UserError(f"job.json: spec: {first_fault(error)}") from None


def spec_digest(stage: Stage, spec: StageSpec, inputs: dict[str, InputRef]) -> str:
    """The digest of a stage: of its spec without operational settings and with contents for places, and of its inputs.

    Raises ValueError for a place that is not pinned.
    """
    return stage_digest(stage, identity(spec, getattr(spec, "pins", None)), inputs)
