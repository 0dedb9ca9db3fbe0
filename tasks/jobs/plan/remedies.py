"""Settings that would make a stage fit, found by trial, cheapest first; and those that would make it faster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.memory import FrozenBits, freezes_mlp
from radlads.tasks.contracts.recipe.sections import Evaluate, Needle, Training
from radlads.tasks.contracts.recipe.training import PhasedTraining, runs_teacher
from radlads.tasks.contracts.stages import stage_info
from radlads.tasks.jobs.plan.memory import USABLE, Memory, NetworkSizes, training_memory, word_bytes
from radlads.tasks.jobs.plan.timing.judged_memory import judging_memory

_GIB = 1024**3
# A change that saves less than this share is not reported.
_WORTH = 0.02
_FASTER = 0.05


@dataclass(frozen=True)
class Setting:
    """The settings that determine a training stage's memory on one device."""

    stage: str
    section: Training
    resources: JobResources
    teacher_bits: FrozenBits = 16
    mlp_bits: FrozenBits = 16
    divisible: bool = True
    """Whether ZeRO-3 can train the stage: not where align calibrates."""
    sharings: tuple[int, ...] = ()
    """The numbers of processes that can share rows."""

    def memory(self, networks: NetworkSizes) -> Memory:
        """As training_memory."""
        bits = {"teacher_bits": self.teacher_bits, "mlp_bits": self.mlp_bits}
        return training_memory(self.stage, self.section, networks, self.resources, **bits)

    def need(self, networks: NetworkSizes) -> int:
        """Bytes on one device."""
        return self.memory(networks)["total"]


def what_would_help(setting: Setting, networks: NetworkSizes, limit: float) -> str:
    """The changes that together bring a stage under `limit` bytes, or the smallest size that it can reach.

    Changes that do not alter results come first; each, the most expensive first, is dropped if the others suffice.
    """
    chosen: list[tuple[str, Setting]] = []
    now = setting
    for label, changed in _steps(setting):
        following, own = _onto(now, setting, changed), now.memory(networks)
        if following.resources.zero_stage == 3 and following.resources.offload_optimizer:
            continue  # they exclude each other
        if own["total"] - following.need(networks) < _WORTH * (own["total"] - own["overhead"]):
            continue
        chosen, now = [*chosen, (label, changed)], following
        if now.need(networks) <= limit:
            break
    for change in reversed(chosen[:-1]):
        rest = [one for one in chosen if one is not change]
        without = _all(setting, rest)
        if without.need(networks) <= max(limit, now.need(networks)):
            chosen, now = rest, without
    labels = ", ".join(label for label, _ in chosen)
    size, host = f"{now.need(networks) / _GIB:.0f} GiB", now.memory(networks)["host"]
    size += f" and {host / _GIB:.0f} GiB of host memory each" if host else ""
    whole = f"GPUs of {-(-setting.need(networks) // _GIB) / USABLE:.0f} GiB"
    if not labels:
        return whole
    enough = f"then {size}" if now.need(networks) <= limit else f"then {size}, which is not enough yet"
    return f"{labels} ({enough}); or {whole} and no change"


def what_would_be_faster(
    setting: Setting, networks: NetworkSizes, limit: float, seconds: Callable[[Training], float | None]
) -> str | None:
    """One line on recomputing less where the stage still fits into `limit` bytes, with forward passes of half the size
    if they must be; None if nothing saves a twentieth of its time. seconds: the stage's time with other settings."""
    section, now = setting.section, seconds(setting.section)
    if not section.gradient_checkpointing or now is None:
        return None
    found: list[tuple[float, str, int]] = []
    kinds: tuple[bool | Literal["selective"], ...] = (False, "selective")
    for kept in kinds[: 1 if section.gradient_checkpointing == "selective" else 2]:
        label = f"{setting.stage}.gradient_checkpointing: {str(kept).lower()}"
        changed = section.model_copy(update={"gradient_checkpointing": kept})
        trials = [(label, changed)]
        if section.micro_batch % 2 == 0 and {part.micro_batch for part in section.parts} == {section.micro_batch}:
            half = section.micro_batch // 2  # smaller passes than these were not measured
            trials.append((f"{label} with {setting.stage}.micro_batch: {half}", _with_micro_batch(changed, half)))
        for words, trial in trials:
            need = replace(setting, section=trial).need(networks)
            if need <= limit:
                found.append((seconds(trial) or now, words, need))
                break
    if not found or (best := min(found))[0] > (1 - _FASTER) * now:
        return None
    return f"{best[1]} fits ({best[2] / _GIB:.0f} GiB) and would take {1 - best[0] / now:.0%} less time"


def what_would_help_judging(
    stage: str,
    section: Evaluate | Needle,
    networks: NetworkSizes,
    resources: JobResources,
    limit: float,
    *,
    divisible: bool = True,
) -> str:
    """The largest batch with which evaluate or needle stays under `limit` bytes, ZeRO-3 where that is not enough, the
    longest needles that fit, or the GPU that it needs. divisible: as in Setting."""
    batch = section.batch or 1
    while batch > 1:
        batch //= 2
        if judging_memory(section.model_copy(update={"batch": batch}), networks, resources)["total"] <= limit:
            return f"{stage}.batch: {batch}"
    smallest = section.model_copy(update={"batch": 1})
    divided = resources.model_copy(update={"zero_stage": 3})
    divisible = divisible and not (resources.offload_optimizer or resources.cuda_graphs == "on")
    if divisible and judging_memory(smallest, networks, divided)["total"] <= limit and resources.zero_stage < 3:
        return f"resources.zero_stage: 3 and {stage}.batch: 1"
    for prefix, machine in (("", resources), ("resources.zero_stage: 3 and ", divided))[: 1 + divisible]:
        fits = (
            words
            for words, shorter in _shorter(smallest)
            if judging_memory(shorter, networks, machine)["total"] <= limit
        )
        if words := next(fits, None):
            return f"{prefix}{words}" + (f" and {stage}.batch: 1" if (section.batch or 1) > 1 else "")
    least = judging_memory(smallest, networks, resources)["total"]
    return f"GPUs of {-(-least // _GIB) / USABLE:.0f} GiB (teacher and student are judged side by side), or no {stage}"


def _shorter(section: Evaluate | Needle) -> Iterator[tuple[str, Needle]]:
    """(label, the needle without its longest prompts), the longest that are left first."""
    if not isinstance(section, Needle):
        return
    ruler = section.ruler
    asked = (*section.lengths, *(ruler.lengths if ruler is not None else ()))
    for most in sorted({length for length in section.lengths if length < max(asked)}, reverse=True):
        left = tuple(length for length in section.lengths if length <= most)
        update: dict[str, Any] = {"lengths": left}
        places = ["needle.lengths"] if left != section.lengths else []
        if ruler is not None and max(ruler.lengths) > most:
            short = tuple(length for length in ruler.lengths if length <= most)
            update["ruler"] = ruler.model_copy(update={"lengths": short}) if short else None
            places.append("needle.ruler.lengths")
        yield f"{' and '.join(places)} up to {most:,}", section.model_copy(update=update)


def misfit(stage: str, memory: Memory, device: dict[str, Any], helps: str) -> str:
    """One line on a stage that needs more memory than there is."""
    return (
        f"{stage} needs about {_gib(memory['total'])} on each {device['device']}, which has "
        f"{_gib(device['memory_bytes'])}; what would help: {helps}"
    )


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f} GiB"


def _steps(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """(label, the setting with this change alone), the cheapest first."""
    stage, section, resources = setting.stage, setting.section, setting.resources
    size = max(part.micro_batch for part in section.parts)
    while size > 1:
        size //= 2
        yield f"{stage}.micro_batch: {size}", replace(setting, section=_with_micro_batch(section, size))
    if section.gradient_checkpointing is not True:
        changed = section.model_copy(update={"gradient_checkpointing": True})
        yield f"{stage}.gradient_checkpointing: true", replace(setting, section=changed)
    if resources.zero_stage < 2 and resources.processes > 1 and word_bytes(section.precision, resources) == 4:
        yield "resources.zero_stage: 2", replace(setting, resources=resources.model_copy(update={"zero_stage": 2}))
    graphs = resources.cuda_graphs == "on"  # which exclude the next three
    if (
        resources.zero_stage < 3
        and resources.processes > 1
        and not (resources.offload_optimizer or graphs)
        and setting.divisible
    ):
        yield "resources.zero_stage: 3", replace(setting, resources=resources.model_copy(update={"zero_stage": 3}))
    for number in () if graphs else setting.sharings:
        changed = section.model_copy(update={"sequence_parallel": number})
        yield f"{stage}.sequence_parallel: {number}", replace(setting, section=changed)
    if not (resources.offload_optimizer or graphs) and resources.zero_stage < 3:
        changed_resources = resources.model_copy(update={"offload_optimizer": True})
        yield "resources.offload_optimizer: true", replace(setting, resources=changed_resources)
    yield from _in_8_bit(setting)
    for factor in (2, 4, 8):
        count = factor * resources.processes
        if resources.device == "cuda" and all(part.batch % count == 0 for part in section.parts):
            yield f"{count} GPUs", replace(setting, resources=resources.model_copy(update={"processes": count}))
    if stage_info(stage).trains_whole_student and not freezes_mlp(stage, section):
        changed = section.model_copy(update={"freeze": (*section.freeze, "mlp")})
        label = f"mlp in {stage}.freeze and student.mlp_bits: 8 (costs quality)"
        yield label, replace(setting, section=changed, mlp_bits=8)
    phases = section.phases if isinstance(section, PhasedTraining) else ()
    for count in range(len(phases) - 1, 0, -1):
        first = {"phases": phases[:count], "tokens": sum(phase.tokens for phase in phases[:count])}
        shorter = section.model_copy(update=first)
        if shorter.longest_context < section.longest_context:
            label = f"no phase of {stage} beyond context {shorter.longest_context}"
            yield label, replace(setting, section=shorter)


def _in_8_bit(setting: Setting) -> Iterator[tuple[str, Setting]]:
    stage, section, info = setting.stage, setting.section, stage_info(setting.stage)
    if runs_teacher(stage, section) and setting.teacher_bits == 16:
        own: dict[str, Any] = {"teacher_bits": 8}
        label = "teacher.bits: 8"
        if info.trains_whole_student and freezes_mlp(stage, section) and setting.mlp_bits == 16:
            own["mlp_bits"] = 8
            label += " and student.mlp_bits: 8"
        yield label, replace(setting, **own)
    elif info.trains_whole_student and freezes_mlp(stage, section) and setting.mlp_bits == 16:
        yield "student.mlp_bits: 8", replace(setting, mlp_bits=8)


def _with_micro_batch(section: Training, size: int) -> Training:
    changes: dict[str, Any] = {"micro_batch": min(size, section.micro_batch)}
    phases = getattr(section, "phases", ())
    if phases:
        changes["phases"] = tuple(
            p if p.micro_batch is None else p.model_copy(update={"micro_batch": min(size, p.micro_batch)})
            for p in phases
        )
    return section.model_copy(update=changes)


def _onto(now: Setting, before: Setting, changed: Setting) -> Setting:
    """`now` with the values in which `changed` differs from `before`."""
    section = {
        name: getattr(changed.section, name)
        for name in type(before.section).model_fields
        if getattr(changed.section, name) != getattr(before.section, name)
    }
    resources = {
        name: getattr(changed.resources, name)
        for name in type(before.resources).model_fields
        if getattr(changed.resources, name) != getattr(before.resources, name)
    }
    return replace(
        now,
        section=now.section.model_copy(update=section),
        resources=now.resources.model_copy(update=resources),
        teacher_bits=min(now.teacher_bits, changed.teacher_bits),
        mlp_bits=min(now.mlp_bits, changed.mlp_bits),
    )


def _all(setting: Setting, changes: list[tuple[str, Setting]]) -> Setting:
    now = setting
    for _, changed in changes:
        now = _onto(now, setting, changed)
    return now
