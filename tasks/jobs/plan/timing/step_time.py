"""Seconds of an optimizer step on one device, from what the step must do and what the device can.

    a pass      arithmetic at EFFICIENCY of the peak, or the host's launches where they take longer; under ZeRO-3 the
                gathering of weights where that takes longer; then gradients: added up in fp32 and reduced over the GPUs
    a step      its passes, the optimizer (bound by memory), and sending the new weights to all GPUs

The constants are those of one profiled run (benchmarks/results/training_h100.md: Qwen2.5-7B's shape and SmolLM2-135M on
an H100); `speed.py` corrects the result by the measured rows that are nearest.
"""

from __future__ import annotations

from radlads.tasks.contracts.job import JobResources, Sheet
from radlads.tasks.contracts.recipe.training import Training, runs_teacher
from radlads.tasks.contracts.stages import stage_info
from radlads.tasks.jobs.plan.memory import NetworkSizes, word_bytes
from radlads.tasks.jobs.train.engines.build import records_passes
from radlads.tasks.jobs.train.gpu_kinds import GpuKind

EFFICIENCY = 0.60
"""Share of the bf16 peak at which a pass computes, recurrences and elementwise operations included: 217 ms of 304."""
HOST_SECONDS = 2.9e-3
"""Of Python and launches for a forward pass of one layer; a backward pass counts as two. 11.5 ms a layer of distill."""
# Bytes of memory traffic for each parameter that trains.
_GRADIENT_BYTES = 36  # 27 ms a pass for 2.5 B parameters
_OPTIMIZER_BYTES = 80  # 60 ms a step
_WORD, _SUM = 2, 4  # bytes of a weight, and of a gradient as it is reduced
# For each logit of a token, where a divergence leaves the products that do not keep logits: both networks' in fp32,
# written and read, and the gradient (7.7 ps at 3 TB/s in benchmarks/results/kernels_h100.md); jsd reads them again.
_LOGIT_BYTES = {"forward": 0, "reverse": 23, "jsd": 39}
_HOST_BANDWIDTH = 20e9  # assumed: bytes/s of an optimizer in host memory, for each process
# On a CPU in fp32, from models of 0.3 to 2 M parameters (benchmarks/results/convert_cpu.md, demo_cpu.md).
CORE_FLOPS = 80e9  # of one core in matrix products
_TOKEN_SECONDS = 50e-6  # of a token in one layer besides them, forward and backward, on one core or two


class Work(Sheet):
    """What one device does in an optimizer step."""

    stage: str
    context: int
    layers: int
    flops: float
    """Of a token: what the stage must compute (train/flops.py)."""
    recomputed: float = 0.0
    """Of a token: the forward pass again, under gradient checkpointing."""
    taught: bool
    trained: int
    """Parameters that train, of all devices together."""
    gathered: int = 0
    """Parameters that a pass gathers under ZeRO-3; 0 under other stages."""
    tokens: int
    """Of one pass."""
    passes: int
    devices: int = 1
    threads: int = 1
    """Of a process; they count on a CPU alone."""
    offload: bool = False
    recorded: bool = False
    """Passes are replayed as CUDA graphs."""
    wide_decay: bool = False
    """A log decay of 32 bits in a stage of 16: other kernels run where heads are few."""
    sharing: int = 1
    """Devices that share rows; what they exchange is not in the computed time."""
    logit_bytes: int = 0
    """Of a token: memory traffic of logits, beyond that of a forward KL."""

    @property
    def step_tokens(self) -> int:
        """Of one device."""
        return self.tokens * self.passes


def work_of(stage: str, part: Training, networks: NetworkSizes, resources: JobResources) -> Work:
    """Of a part of a training stage."""
    own = max(1, part.batch // max(1, resources.processes // part.sequence_parallel))
    sequences = min(part.micro_batch, own)
    flops = networks.flops(stage, part)
    taught = runs_teacher(stage, part)
    gathered = networks.mixer_parameters if stage_info(stage).layerwise else networks.student_parameters
    gathered += networks.teacher_parameters * taught
    return Work(
        stage=stage,
        context=part.context,
        layers=networks.num_layers,
        flops=flops.total,
        recomputed=flops.forward if part.gradient_checkpointing is True else 0.0,
        taught=taught,
        trained=networks.trainable(stage, part),
        gathered=gathered if resources.zero_stage == 3 else 0,
        tokens=sequences * part.context // part.sequence_parallel,
        passes=-(-own // sequences),
        devices=resources.processes,
        threads=resources.threads,
        offload=resources.offload_optimizer,
        recorded=records_passes(part, resources, networks.student_parameters),
        wide_decay=part.decay_dtype == "float32" and word_bytes(part.precision, resources) == 2,
        sharing=part.sequence_parallel,
        logit_bytes=networks.vocab * _LOGIT_BYTES[getattr(part, "divergence", "forward")],
    )


def gpu_step_seconds(work: Work, gpu: GpuKind) -> float:
    """Of a step on GPUs of one kind."""
    others = (work.devices - 1) / work.devices
    computing = work.tokens * (work.flops + work.recomputed) / (gpu.peak_flops * EFFICIENCY)
    launching = 0.0 if work.recorded else work.layers * HOST_SECONDS * (3 + work.taught + bool(work.recomputed))
    gathering = 2 * _WORD * work.gathered * others / gpu.link  # for the forward and for the backward pass
    one = max(computing + work.tokens * work.logit_bytes / gpu.bandwidth, launching, gathering)
    one += work.trained * (_GRADIENT_BYTES / gpu.bandwidth + _SUM * others / gpu.link)
    shard = work.trained / work.devices
    bandwidth = _HOST_BANDWIDTH if work.offload else gpu.bandwidth
    sending = 0.0 if work.gathered else _WORD * work.trained * others / gpu.link
    return work.passes * one + shard * _OPTIMIZER_BYTES / bandwidth + sending


def cpu_step_seconds(work: Work) -> float:
    """Of a step on CPUs."""
    return work.step_tokens * (
        (work.flops + work.recomputed) / (work.threads * CORE_FLOPS) + work.layers * _TOKEN_SECONDS
    )
