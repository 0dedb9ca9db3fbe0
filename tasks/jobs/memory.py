"""How much memory a stage takes on one device: an estimate, made before a device is taken.

Weights, gradients and optimizer states are exact sums; activations follow the tensors that a layer keeps for its
backward pass, and are good to about a third.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from radlads.tasks.job import JobResources
from radlads.tasks.sections import Evaluate, Needle, Training

# fp32 master weight and the two moments of Adam.
_OPTIMIZER_BYTES = 12
# The recurrence keeps its fp32 state once every so many tokens (kernels/wkv7).
_STATE_EVERY = 16
# Rows of logits that the fused losses hold at a time (kernels/linear_kl), in fp32, of teacher and student.
_LOGIT_ROWS = 1024
# GPU: context, NCCL buffers, fragmentation. CPU: the interpreter and its libraries.
_OVERHEAD_BYTES = {"cuda": 2 * 1024**3, "cpu": 600 * 1024**2}

Memory = dict[str, int]
StageName = Literal["pretrain", "align", "distill", "finetune", "evaluate", "needle"]


@dataclass(frozen=True)
class Networks:
    """Sizes of teacher and student, counted on the meta device."""

    num_layers: int
    num_recurrent: int
    hidden: int
    intermediate: int
    width: int
    """Query heads × head width."""
    head_dim: int
    kv_width: int
    vocab: int
    teacher_parameters: int
    student_parameters: int
    groups: dict[str, int]
    """Parameter group (mixer, attention, mlp, norms, embeddings, head) → parameters of the student."""

    @property
    def mixer_parameters(self) -> int:
        """Parameters of all mixers."""
        return self.groups.get("mixer", 0)

    def trainable(self, stage: StageName, frozen: tuple[str, ...] = ()) -> int:
        """Parameters that a training stage moves."""
        if stage == "align":
            return self.mixer_parameters
        return sum(count for group, count in self.groups.items() if group not in frozen)


def training_memory(stage: StageName, section: Training, networks: Networks, resources: JobResources) -> Memory:
    """Bytes on one device, by what holds them, and `total`."""
    word = word_bytes(section.precision, resources)
    shards = resources.processes
    trainable = networks.trainable(stage, section.freeze)
    student = networks.student_parameters
    tokens = section.micro_batch * section.context
    memory = {
        "weights": student * word,
        "gradients": trainable * word // (shards if resources.zero_stage >= 2 else 1),
        "optimizer": trainable * _OPTIMIZER_BYTES // (shards if resources.zero_stage >= 1 else 1),
        "teacher": networks.teacher_parameters * word if stage in ("align", "distill") else 0,
        "activations": tokens * _kept_per_token(stage, section, networks, word),
        "logits": 0 if stage == "align" else 2 * min(tokens, _LOGIT_ROWS) * networks.vocab * 4,
        "overhead": _OVERHEAD_BYTES[resources.device],
    }
    return memory | {"total": sum(memory.values())}


def judging_memory(section: Evaluate | Needle, networks: Networks, resources: JobResources) -> Memory:
    """Bytes on one device while teacher and one student are scored beside each other."""
    word = word_bytes("auto", resources)
    length = section.context if isinstance(section, Evaluate) else max(section.lengths)
    tokens = section.batch * length
    layer = (8 * networks.hidden + 6 * networks.width + 3 * networks.intermediate) * word
    if isinstance(section, Evaluate):
        logits = tokens * networks.vocab * 2 * word + 3 * length * networks.vocab * 4
    else:
        logits = section.batch * networks.vocab * 4
    cache = 0 if isinstance(section, Evaluate) else tokens * networks.num_layers * 2 * networks.kv_width * word
    memory = {
        "weights": networks.student_parameters * word,
        "teacher": networks.teacher_parameters * word,
        "activations": tokens * layer + cache,
        "logits": logits,
        "overhead": _OVERHEAD_BYTES[resources.device],
    }
    return memory | {"total": sum(memory.values())}


def word_bytes(precision: str, resources: JobResources) -> int:
    """Bytes of a number in the precision that a stage computes in."""
    return 2 if precision == "bf16" or (precision == "auto" and resources.device == "cuda") else 4


def _kept_per_token(stage: StageName, section: Training, networks: Networks, word: int) -> int:
    """Bytes that one token keeps for the backward pass, over all layers."""
    state = networks.width * networks.head_dim * 4 // _STATE_EVERY
    # Mixer: r, k, v, gate, decay, iclr, the removal key and their products, after projection and before.
    mixer = 14 * networks.width * word + state + 2 * networks.hidden * word
    attention = 6 * networks.width * word + 2 * networks.hidden * word
    mlp = 4 * networks.intermediate * word + 4 * networks.hidden * word
    recurrent, kept = networks.num_recurrent, networks.num_layers - networks.num_recurrent
    if stage == "align":  # the mixers' graphs live until the one backward pass; of the teacher only a layer at a time
        return recurrent * mixer + attention + mlp
    if section.gradient_checkpointing:
        return networks.num_layers * networks.hidden * word + mixer + mlp
    return recurrent * (mixer + mlp) + kept * (attention + mlp)


def what_would_help(stage: StageName, section: Training, memory: Memory, resources: JobResources) -> str:
    """Recipe changes that shrink what is biggest, the surest first."""
    helpers: list[str] = []
    own = memory["total"] - memory["overhead"]
    if memory["activations"] > own // 4:
        if section.micro_batch > 1:
            helpers.append(f"{stage}.micro_batch: {max(1, section.micro_batch // 2)}")
        if not section.gradient_checkpointing and stage != "align":
            helpers.append(f"{stage}.gradient_checkpointing: true")
        if not helpers:
            helpers.append(f"a smaller {stage}.context")
    if memory["optimizer"] + memory["gradients"] > own // 4:
        if resources.zero_stage < 2 and resources.processes > 1:
            helpers.append("resources.zero_stage: 2")
        if "mlp" not in section.freeze and stage != "align":
            helpers.append(f"{stage}.freeze: [mlp] (costs quality)")
        helpers.append("more GPUs (resources.processes)")
    return ", ".join(helpers) or "a GPU with more memory, or a smaller teacher"
