"""Memory of evaluate and needle on one device, and the rows that their passes take."""

from __future__ import annotations

from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.sections import Evaluate, Needle
from radlads.tasks.jobs.judge.batching.budget import OVERHEAD_BYTES, RowBudget, fit_rows, logit_bytes, token_bytes
from radlads.tasks.jobs.plan.memory import Memory, NetworkSizes, word_bytes


def judging_budget(
    section: Evaluate | Needle, networks: NetworkSizes, resources: JobResources, memory: float
) -> RowBudget:
    """The rows of passes in evaluate or needle. memory: bytes of the device."""
    word, weights = word_bytes("auto", resources), sum(_judged_weights(networks, resources))
    return fit_rows(section, networks, word=word, device=resources.device, memory=int(memory), weights=weights)


def judging_memory(
    section: Evaluate | Needle, networks: NetworkSizes, resources: JobResources, budget: RowBudget | None = None
) -> Memory:
    """Bytes on one device while the teacher and one student are scored together. budget: as `judging_budget`; None:
    of the section's rows, or of one."""
    word, length = word_bytes("auto", resources), section.longest
    budget = budget or RowBudget(section.batch or 1)
    needle = isinstance(section, Needle)
    writes = isinstance(section, Needle) or section.generation is not None
    read, written = (0 if needle else budget.reads(length) * length), budget.writes(length) * length * writes
    student, teacher = _judged_weights(networks, resources)
    memory = {
        "weights": student,
        "teacher": teacher,
        "activations": max(read * token_bytes(networks, word), written * token_bytes(networks, word, written=length)),
        "logits": written // length * networks.vocab * 6 if needle else logit_bytes(networks, resources.device),
        "overhead": OVERHEAD_BYTES[resources.device],
    }
    return memory | {"total": sum(memory.values())}


def _judged_weights(networks: NetworkSizes, resources: JobResources) -> tuple[int, int]:
    word, both = word_bytes("auto", resources), (networks.student_parameters, networks.teacher_parameters)
    student, teacher = (_judged_parameters(count, networks, resources) * word for count in both)
    return student, teacher


def _judged_parameters(parameters: int, networks: NetworkSizes, resources: JobResources) -> int:
    """That one process holds of a network. ZeRO-3 divides its layers; the current one and the next are whole, and so
    are embeddings and head (jobs/judge/divided.py)."""
    if resources.zero_stage < 3 or resources.processes == 1:
        return parameters
    ends = sum(networks.groups.get(group, 0) for group in ("embeddings", "head"))
    in_layers = parameters - ends
    return ends + in_layers // resources.processes + 2 * in_layers // networks.num_layers
