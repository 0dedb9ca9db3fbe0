"""Time and cost of a stage: an estimate from FLOPs at an assumed utilisation.

FLOPs of a token: 2·N forward, 4·N backward, for the N parameters that a network multiplies with (without embeddings
that are looked up and experts that a token is not routed to), and in every softmax layer 2·T·W more forward, for the
half of T tokens that it sees on average and W = heads · head width; gradient checkpointing adds another forward. The
utilisation is what the published 7B run reached in step 2:
3,157 tokens a second on an MI300X (2505.03005, table 3) are 15 % of its bf16 peak.
"""

from __future__ import annotations

from typing import Any

from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.choice import late_choice
from radlads.tasks.contracts.recipe.recipe import Recipe
from radlads.tasks.contracts.recipe.sections import Evaluate, Needle, Training
from radlads.tasks.contracts.recipe.training import runs_teacher
from radlads.tasks.contracts.stages import logits_reference, stage_info
from radlads.tasks.jobs.plan.memory import NetworkSizes

UTILISATION = 0.15
# Dense bf16 peaks in FLOP/s, from the vendors' data sheets, by the device's reported name.
_PEAKS = {
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "MI300X": 1307e12,
    "MI325X": 1307e12,
    "MI250": 191e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
_UNKNOWN_GPU = 100e12
# GiB of memory → the GPU that a plan assumes when only the size is given.
_BY_MEMORY = ((180, "MI300X"), (140, "H200"), (80, "H100"), (48, "L40S"), (24, "RTX 4090"))
# Sustained FLOP/s of one core for models small enough to be trained on it (a few hundred thousand to a few million
# parameters); larger matrix products are several times as fast.
_CPU_CORE = 8e9


def device_peak(name: str | None, resources: JobResources) -> float:
    """Assumed peak FLOP/s of one process's device; `name`: of the GPU, None on a CPU."""
    if resources.device == "cpu" or name is None:
        return _CPU_CORE * resources.threads
    return next((peak for known, peak in _PEAKS.items() if known in name), _UNKNOWN_GPU)


def likely_gpu(gibibytes: float) -> str | None:
    """A well-known GPU with that much memory (GB on its data sheet, or GiB), for its speed; None: there is none."""
    return next((name for size, name in _BY_MEMORY if size * 0.93 <= gibibytes <= size * 1.1), None)


def training_flops(stage: str, section: Training, networks: NetworkSizes) -> float:
    """FLOPs of a whole training stage, or of one of its phases."""
    return float(sum(_token_flops(stage, part, networks) * part.seen_tokens for part in section.parts))


def _token_flops(stage: str, part: Training, networks: NetworkSizes) -> int:
    """FLOPs of a token in a part of a training stage."""
    pair = 2 * part.context * networks.width  # one softmax layer's products of tokens with tokens, forward
    teacher = 2 * _multiplied(networks.teacher_parameters, networks) + networks.num_softmax * pair
    if stage_info(stage).layerwise:
        return teacher + 6 * networks.mixer_parameters
    kept = networks.num_softmax - networks.num_recurrent + networks.chosen_late
    student = 2 * _multiplied(networks.student_parameters, networks) + kept * pair
    return (4 if part.gradient_checkpointing else 3) * student + (teacher if runs_teacher(stage, part) else 0)


def judging_flops(section: Evaluate | Needle, networks: NetworkSizes, recipe: Recipe) -> float:
    """FLOPs of scoring teacher and students, without the lm-evaluation-harness tasks.

    evaluate scores every stage's student and, with each, the teacher; needle runs the teacher once, the last student
    and, if that is finetuned, also the distilled one.
    """
    student = _multiplied(networks.student_parameters, networks)
    teacher = _multiplied(networks.teacher_parameters, networks)
    if isinstance(section, Evaluate):
        students = 1 + len(recipe.training_stages) + (late_choice(recipe) is not None)  # transplanted too
        return 2.0 * students * (teacher + student) * section.heldout_tokens
    students = 1 if logits_reference(recipe.training_stages) is None else 2
    prompts = len(section.depths) * section.trials
    tokens = prompts * sum(length + section.max_new_tokens for length in section.lengths)
    return 2.0 * (teacher + students * student) * tokens


def stage_cost(flops: float, peak: float, resources: JobResources) -> dict[str, Any]:
    """{flops, seconds, gpu_hours, dollars}; the latter two None on a CPU or without a price."""
    utilisation = UTILISATION if resources.device == "cuda" else 1.0
    seconds = flops / (peak * utilisation * resources.processes)
    gpu_hours = seconds * resources.processes / 3600 if resources.device == "cuda" else None
    price = resources.dollars_per_gpu_hour
    dollars = gpu_hours * price if gpu_hours is not None and price is not None else None
    return {"flops": flops, "seconds": seconds, "gpu_hours": gpu_hours, "dollars": dollars}


def _multiplied(parameters: int, networks: NetworkSizes) -> int:
    """Parameters without the embeddings that are only looked up (tied ones also make the logits, and count)."""
    looked_up = networks.groups.get("embeddings", 0) if networks.groups.get("head", 0) else 0
    return max(0, parameters - looked_up - networks.idle)
