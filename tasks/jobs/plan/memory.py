"""Memory of a stage on one device: an estimate, made before a device is used.

P parameters that train, N processes, w bytes of a number in the precision of the stage (2 in bf16):

    weights      student · w; 8-bit matrices 1 + w/128 each; nothing for tensors shared with the teacher
    weights and teacher divided by N under ZeRO-3, where parameters that train are held as masters alone
    gradients    4 P / N under ZeRO-2: fp32 sums of a shard; bf16 always runs so (train/engines). 4 P below it. In a
                 step of one pass they take the place of activations, which are freed as they are made. With an
                 offloaded optimizer they are on the device in bf16, in host memory in fp32
    optimizer    12 P / N: fp32 master and two moments; 12 P without ZeRO; in host memory where it is offloaded; 4 more
                 bytes of each where an average is kept
    teacher      teacher · w, the matrices of its layers in 8 bit where set
    activations  counted (jobs/activations.py), for the tokens of a forward pass; with sequence_parallel of
                 a part of each row, and a tenth more of a mixer, whose recurrence runs twice; with hidden_weight the
                 teacher's hidden states after every layer
    logits       the arena of linear_kl, and the head's gradient as it is summed up (kernels/linear_kl), beyond the
                 activations of the layer whose backward pass comes next
    buffers      DeepSpeed's bucket; what ZeRO-3 gathers, or two layers' gradients as ZeRO-2 reduces them
                 (train/engines/partition.py); one dequantised matrix; what DeepSpeed's step flattens in excess of
                 activations; with CUDA graphs instead of the bucket and the flattened gradients those of a pass, w P,
                 and the rest as without ZeRO

Weights, gradients and optimizer are exact sums; activations are accurate to about 20 %; a recomputed layer's own
gradients are assumed to be half as large as what it keeps (states have none), and an MLP's as large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from radlads.kernels.linear_kl.driver import ARENA_BYTES
from radlads.kernels.shared.meta import FEWEST_HEADS
from radlads.model.training.mlp_pieces import PIECE
from radlads.model.training.quantized import GROUP
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.loss_terms import Lora
from radlads.tasks.contracts.recipe.memory import FrozenBits, freezes_mlp, held_once
from radlads.tasks.contracts.recipe.sections import Training
from radlads.tasks.contracts.recipe.training import runs_teacher
from radlads.tasks.contracts.stages import stage_info
from radlads.tasks.jobs.judge.batching.budget import OVERHEAD_BYTES
from radlads.tasks.jobs.plan.activations import LayerBytes
from radlads.tasks.jobs.train.engines.build import records_passes
from radlads.tasks.jobs.train.engines.deepspeed_config import BUCKET_ELEMENTS
from radlads.tasks.jobs.train.flops import Flops, Multiplied

# fp32 master weight and the two moments of Adam.
_OPTIMIZER_BYTES = 12
_SHARD_BYTES = 4_000_000_000  # of an exported file, which is gathered in host memory under ZeRO-3 (student/export.py)
# A margin for fragmentation and for the error of the estimate.
USABLE = 0.95

Memory = dict[str, int]


@dataclass(frozen=True)
class NetworkSizes:
    """Sizes of teacher and student, counted on the meta device."""

    num_layers: int
    num_recurrent: int
    hidden: int
    intermediate: int
    """Width of an MLP; with experts, of all that a token is routed to."""
    width: int
    """Query heads × head width."""
    head_dim: int
    kv_width: int
    vocab: int
    teacher_parameters: int
    student_parameters: int
    groups: dict[str, int]
    """Parameter group (mixer, attention, mlp, norms, embeddings, head) → parameters of the student."""
    new_parameters: int
    """The student's mixer parameters without a counterpart in the teacher."""
    teacher_matrices: int
    """Parameters of the teacher that can be held in 8 bit: the matrices of its layers."""
    mlp_matrices: int
    """Of those, the MLPs'."""
    largest_matrix: int
    idle: int
    """Parameters of experts that a token is not routed to."""
    layer_bytes: dict[int, LayerBytes]
    """Bytes of a number → what a token keeps in each part of a layer."""
    selective_bytes: dict[int, LayerBytes]
    """Likewise, with selective activation checkpointing."""
    multiplied: Multiplied
    """Of the student as most stages train it: with the layers that are chosen after align."""
    num_linear: int = 0
    """Layers that are linear attention in the teacher already; neither recurrent here nor softmax."""
    chosen_late: int = 0
    """Layers that get their softmax attention back after align; counted among the recurrent ones until then."""
    linear_names: tuple[str, ...] = ()
    """Last names of the student's linear modules, without the head."""

    @property
    def num_softmax(self) -> int:
        """Layers that are softmax attention in the teacher."""
        return self.num_layers - self.num_linear

    @property
    def mixer_parameters(self) -> int:
        """Parameters of all mixers."""
        return self.groups.get("mixer", 0)

    def trainable(self, stage: str, section: Training) -> int:
        """Parameters that a training stage updates; for `train_only`, an upper bound."""
        lora: Lora | None = getattr(section, "lora", None)
        if lora is not None:  # each projection is assumed to be as long and as wide as the model
            return self.new_parameters + self.num_layers * len(lora.targets) * 2 * lora.rank * self.hidden
        only: tuple[str, ...] = getattr(section, "train_only", ())
        if only:
            return self.mixer_parameters if "mixer" in only else self.new_parameters
        if stage_info(stage).layerwise:
            return self.mixer_parameters
        return sum(count for group, count in self.groups.items() if group not in section.freeze)

    def flops(self, stage: str, part: Training) -> Flops:
        """Of one token in a part of a training stage. With LoRA or `train_only` all mixers are taken to train."""
        layerwise = stage_info(stage).layerwise
        alone = layerwise or getattr(part, "lora", None) is not None or bool(getattr(part, "train_only", ()))
        groups = self.multiplied.student.items()
        trained = sum(n for group, n in groups if (group == "mixer" if alone else group not in part.freeze))
        return self.multiplied.stage_flops(
            part.context, trained=trained, taught=runs_teacher(stage, part), layerwise=layerwise
        )


def training_memory(
    stage: str,
    section: Training,
    networks: NetworkSizes,
    resources: JobResources,
    *,
    teacher_bits: FrozenBits = 16,
    mlp_bits: FrozenBits = 16,
) -> Memory:
    """Bytes on one device, by kind, and `total`; `host`: host memory of a process, for an offloaded optimizer, or for
    a file of the export under ZeRO-3."""
    word = word_bytes(section.precision, resources)
    trainable = networks.trainable(stage, section)
    shards = resources.processes
    taught, layerwise = runs_teacher(stage, section), stage_info(stage).layerwise
    eight = mlp_bits == 8 and not layerwise and freezes_mlp(stage, section)
    shared = held_once(stage, section, teacher_bits, mlp_bits) if taught else ()
    groups = {group: count * word for group, count in networks.groups.items() if group not in shared}
    if eight and "mlp" in groups:
        groups["mlp"] -= _saved_by_8_bit(networks.mlp_matrices, word)
    teacher = networks.teacher_parameters * word
    if teacher_bits == 8:
        teacher -= _saved_by_8_bit(networks.teacher_matrices, word)
    activations, logits = _passes(stage, section, networks, resources, word)
    replicated = records_passes(section, resources, networks.student_parameters)
    sharded = not replicated and (word == 2 or resources.zero_stage >= 2 or resources.offload_optimizer)
    gradients = 4 * trainable // (shards if sharded else 1)
    divided = sharded or (resources.zero_stage == 1 and not replicated)
    optimizer = (_OPTIMIZER_BYTES + average_bytes(section)) * trainable // (shards if divided else 1)
    host = 0
    if resources.offload_optimizer:
        # The optimizer's gradients, and the updated weights before they are copied back. In bf16 DeepSpeed sums
        # gradients up on the device; in fp32 beside the optimizer's.
        host = optimizer + (1 if word == 2 else 2) * gradients + trainable * word // shards
        gradients, optimizer = gradients if word == 2 else 0, 0
    weights, teacher, gathered = sum(groups.values()), teacher if taught else 0, 0
    if resources.zero_stage == 3:  # what trains is held as masters alone
        host = min(networks.student_parameters * word, _SHARD_BYTES)
        weights, teacher = max(0, weights - trainable * word) // shards, teacher // shards
        gathered = _gathered(networks, word, taught=taught, shared=shared)
    elif sharded and not resources.offload_optimizer:  # all is gathered; a layer's gradients, and as they are reduced
        gathered = (trainable // networks.num_layers) * 2 * (word + 4)
    if gathered and all(part.batch <= part.micro_batch * (shards // part.sequence_parallel) for part in section.parts):
        gradients = max(0, gradients - activations - logits)  # of a single pass: made as the activations are freed
    flattened = word * trainable if replicated else (0 if resources.offload_optimizer else gradients)
    memory = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "teacher": teacher,
        "activations": activations,
        "logits": logits,
        "buffers": (gathered or (0 if replicated else min(BUCKET_ELEMENTS, trainable) * (word + 4)))
        + (networks.largest_matrix * (word + 1) if eight or (taught and teacher_bits == 8) else 0)
        + (0 if gathered else max(0, flattened - activations - logits)),
        "overhead": OVERHEAD_BYTES[resources.device],
    }
    return memory | {"total": sum(memory.values()), "host": host}


def average_bytes(section: Training) -> int:
    """Of an average that a stage keeps, for each parameter that trains."""
    return 0 if getattr(section, "average", None) is None else 4


def word_bytes(precision: str, resources: JobResources) -> int:
    """Bytes per number in a stage's precision."""
    return 2 if precision == "bf16" or (precision == "auto" and resources.device == "cuda") else 4


def _gathered(networks: NetworkSizes, word: int, *, taught: bool, shared: Sequence[str]) -> int:
    """ZeRO-3: bytes of what is whole at a time (train/engines/partition.py): embeddings and heads, the current layer,
    the next one, and a layer's gradient in the precision and as it is reduced in fp32."""
    ends = {group: networks.groups.get(group, 0) for group in ("embeddings", "head")}
    root = sum(ends.values())
    layer = (networks.student_parameters - root) // networks.num_layers
    twice = sum(count for group, count in ends.items() if group not in shared) if taught else 0
    return (root + twice + 2 * layer) * word + layer * (word + 4)


def _saved_by_8_bit(matrices: int, word: int) -> int:
    return matrices * word - matrices - matrices * word // GROUP


def _passes(
    stage: str, section: Training, networks: NetworkSizes, resources: JobResources, word: int
) -> tuple[int, int]:
    """(activations, what the losses take beyond the layer that is worked on next): bytes of the largest pass."""
    found = []
    for part in section.parts:
        kept, transient = _activations(stage, part, networks, resources, word)
        kept += _hidden_targets(part, networks, resources, word)
        losses, waiting = (0, 0) if stage_info(stage).layerwise else _logits(part, networks, resources, word)
        # The losses are done before the last layer's backward pass begins; the head's gradient waits.
        found.append((kept + transient, max(losses - transient, waiting)))
    return max(found, key=sum)


def _activations(
    stage: str, part: Training, networks: NetworkSizes, resources: JobResources, word: int
) -> tuple[int, int]:
    """(bytes that the sequences of one forward pass keep, bytes of the layer that is worked on), at most."""
    tokens, of = _tokens(part, resources), networks.layer_bytes[word]
    whole, selective = part.gradient_checkpointing is True, part.gradient_checkpointing == "selective"
    kept_of = networks.selective_bytes[word] if selective else of
    many = _sequences(part, resources) * (networks.width // networks.head_dim) >= FEWEST_HEADS
    mixer, kept_mixer = (one.mixer if many else one.mixer_few for one in (of, kept_of))
    if part.sequence_parallel > 1:
        mixer, kept_mixer = mixer * 11 // 10, kept_mixer * 11 // 10
    recurrent, kept = networks.num_recurrent, networks.num_softmax - networks.num_recurrent
    frozen = freezes_mlp(stage, part)
    mlp, kept_mlp = (one.frozen_mlp if frozen else one.mlp for one in (of, kept_of))
    rows = networks.hidden * word
    if stage_info(stage).layerwise:  # all mixers' graphs live until the one backward pass; the teacher layer by layer
        passing = max(of.attention, of.linear) + of.frozen_mlp + of.norms
        target = networks.hidden * (4 + 4)  # the difference to the attention's output, in fp32, and its square
        each = rows + target if whole else kept_mixer + target
        return tokens * recurrent * each, tokens * (passing + mixer)
    largest = max(mixer if recurrent else 0, of.attention if kept else 0, of.linear)
    if whole:  # every layer's input and the first values; what is worked on again as gradients
        first = 2 * networks.kv_width * word
        inner = mlp * (tokens if networks.idle else min(tokens, PIECE))  # experts are not run in pieces
        return tokens * (networks.num_layers * rows + first), tokens * 3 * (largest + of.norms) // 2 + 2 * inner
    each = networks.num_layers * (kept_mlp + of.norms) + recurrent * kept_mixer + kept * of.attention
    return tokens * (each + networks.num_linear * of.linear), tokens * (largest + mlp)


def _hidden_targets(part: Training, networks: NetworkSizes, resources: JobResources, word: int) -> int:
    """What `hidden_weight` keeps of one pass for the backward pass: the teacher's states after every layer (without
    Triton their differences in fp32), and the student's after the last one."""
    if not getattr(part, "hidden_weight", 0):
        return 0
    each = word if resources.device == "cuda" else 4
    return _tokens(part, resources) * networks.hidden * (networks.num_layers * each + word)


def _sequences(part: Training, resources: JobResources) -> int:
    """Rows of one forward pass of one process."""
    return min(part.micro_batch, max(1, part.batch // max(1, resources.processes // part.sequence_parallel)))


def _tokens(part: Training, resources: JobResources) -> int:
    """Tokens of one forward pass of one process."""
    return _sequences(part, resources) * part.context // part.sequence_parallel


def _logits(part: Training, networks: NetworkSizes, resources: JobResources, word: int) -> tuple[int, int]:
    """(bytes of the losses, bytes that wait for the backward pass): an arena, and where the head trains its gradient,
    summed in fp32 and cast by halves once the arena is free (kernels/linear_kl); that of the hidden states."""
    head = 0 if "head" in part.freeze else networks.vocab * networks.hidden
    tokens = _tokens(part, resources)
    arena = min(tokens * networks.vocab * (4 + 4 + word), ARENA_BYTES[resources.device])
    waiting = tokens * networks.hidden * word
    return max(arena + head * 4, head * (4 + word // 2)) + waiting, head * word + waiting
