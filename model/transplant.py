"""Give a student its teacher's weights: total, by name, and with the reason where it cannot be done."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from radlads.model.modeling import RadladsForCausalLM
from radlads.tasks.job import UserError


@dataclass(frozen=True)
class TransplantReport:
    """What became of every tensor, by its name in the student (`dropped`: in the teacher)."""

    copied: tuple[str, ...]
    fresh: tuple[str, ...]
    """Of the student alone: the mixers' own parameters, as initialised."""
    dropped: tuple[str, ...]
    """Of the teacher alone."""
    tied: tuple[str, ...] = ()
    """Names that share another tensor (a tied head), which was copied under its own name."""


@torch.no_grad()
def transplant(teacher: PreTrainedModel, student: RadladsForCausalLM) -> TransplantReport:
    """Copy every tensor that both have, converting to the student's dtype and device, and the generation defaults.

    Raises UserError when shapes differ, when a tensor that is not a mixer's own has no source, or when the teacher has
    a tensor that the student has no place for: a bias, a norm.
    """
    source, target = teacher.state_dict(), student.state_dict()
    misshapen = [
        f"{name} is {tuple(source[name].shape)} in the teacher and {tuple(target[name].shape)} in the student"
        for name in source.keys() & target.keys()
        if source[name].shape != target[name].shape
    ]
    if misshapen:
        raise UserError(f"the student does not fit this teacher: {'; '.join(sorted(misshapen)[:3])}")
    fresh = sorted(target.keys() - source.keys())
    orphans = [name for name in fresh if student.parameter_group(name) != "mixer"]
    dropped = sorted(source.keys() - target.keys())
    if orphans or dropped:
        raise UserError(
            "the student does not fit this teacher: "
            f"without a source: {orphans[:3] or 'none'}; without a place: {dropped[:3] or 'none'}"
        )
    owner: dict[int, str] = {}
    copied, tied = [], []
    for name, tensor in target.items():
        if name in source:
            shared = owner.setdefault(tensor.data_ptr(), name) != name and tensor.numel() > 0
            (tied if shared else copied).append(name)
            tensor.copy_(source[name])
    untied = [name for name in tied if not torch.equal(source[name], source[owner[target[name].data_ptr()]])]
    if untied:
        raise UserError(
            f"the student ties {untied[0]}, but the teacher's own tensors differ there; untie the teacher's config"
        )
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return TransplantReport(tuple(sorted(copied)), tuple(fresh), tuple(dropped), tuple(sorted(tied)))
