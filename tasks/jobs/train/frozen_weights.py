"""Frozen weights of a training job: in 8 bit where the recipe sets it, and held once if teacher and student share them.

The student's frozen parts usually are the teacher's, bit for bit. Then the student uses the teacher's own tensors: with
the MLPs frozen that is most of the model, in align everything but the mixers.
"""

from __future__ import annotations

import logging

import torch
from torch import nn
from transformers import PreTrainedModel

from radlads.model.student.modeling import RadladsForCausalLM, parameter_group
from radlads.model.teacher.load import find_family
from radlads.model.training.quantized import quantize_frozen, share_frozen
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.memory import freezes_mlp, held_once
from radlads.tasks.contracts.specs import TrainSpec
from radlads.tasks.contracts.stages import stage_info

logger = logging.getLogger("radlads")


def hold_teacher(teacher: PreTrainedModel, spec: TrainSpec, device: torch.device) -> PreTrainedModel:
    """Move a teacher to the device, its layers' matrices in the stage's number of bits; it must be on the CPU."""
    parts = find_family(teacher.config)
    quantize_frozen(
        teacher,
        spec.teacher_bits,
        lambda name: parameter_group(name, parts, set()) in ("attention", "mlp"),
        device=device,
    )
    _move(teacher, device)
    return teacher


def hold_student(
    student: RadladsForCausalLM, teacher: PreTrainedModel | None, spec: TrainSpec, device: torch.device
) -> RadladsForCausalLM:
    """Move a student to the device: tensors shared with the teacher are not copied, frozen MLPs in the stage's bits.

    It must be on the CPU in the stage's precision, after `hold_teacher`. Raises UserError for 8-bit MLPs that the stage
    trains.
    """
    if spec.mlp_bits == 8 and not freezes_mlp(spec.objective, spec.section):
        raise UserError(trained_mlp(spec.objective))
    shared: list[str] = []
    if teacher is not None:
        shareable = held_once(spec.objective, spec.section, spec.teacher_bits, spec.mlp_bits)
        shared = share_frozen(student, teacher, lambda name: student.parameter_group(name) in shareable)
        own = [n for n, _ in student.named_parameters() if student.parameter_group(n) in shareable and n not in shared]
        if stage_info(spec.objective).layerwise and own:
            logger.warning(
                "%d frozen tensors of the student are not the teacher's, first %s: they are held twice, and the "
                "teacher is not quite the one that the student was made from",
                len(own),
                own[0],
            )
    if spec.mlp_bits == 8:
        mlps = {name for name, _ in student.named_parameters() if student.parameter_group(name) == "mlp"} - {*shared}
        for name in mlps:
            student.get_parameter(name).requires_grad_(False)
        quantize_frozen(student, 8, mlps.__contains__, device=device)
    _move(student, device)
    if shared:
        size = sum(tensor.untyped_storage().nbytes() for tensor in _held_as(student, shared))
        logger.info("%d frozen tensors are the teacher's own: %.3f GiB are held once", len(shared), size / 2**30)
    return student


def trained_mlp(stage: str) -> str:
    """The one-line fault of 8-bit MLPs in a stage that trains them."""
    return (
        f"student.mlp_bits is 8, but {stage} trains the MLPs, and only frozen weights can be held in 8 bit; "
        f"add mlp to {stage}.freeze, or set student.mlp_bits to 16"
    )


def _move(module: nn.Module, device: torch.device) -> None:
    module.to(device)


def _held_as(model: nn.Module, names: list[str]) -> list[torch.Tensor]:
    """The storages of these parameters, every tensor once."""
    held: dict[int, torch.Tensor] = {}
    for name in names:
        place, _, own = name.rpartition(".")
        owner = model.get_submodule(place)
        tensors = (owner._parameters.get(own), *(owner._buffers.get(f"{own}_{part}") for part in ("int8", "scale")))
        held |= {tensor.data_ptr(): tensor for tensor in tensors if tensor is not None}
    return list(held.values())
