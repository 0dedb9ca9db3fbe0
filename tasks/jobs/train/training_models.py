"""The networks of a training job: loading, and export of the trained one."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from radlads.model.student.export import export_student
from radlads.model.student.load import load_student
from radlads.model.student.modeling import RadladsForCausalLM
from radlads.model.teacher.load import load_teacher
from radlads.model.training.fused_modules import fuse_modules
from radlads.model.training.mixer_parts import round_log_decay
from radlads.model.training.mlp_pieces import run_mlps_in_pieces
from radlads.model.training.recompute import recompute_cheap
from radlads.model.weights.finite import check_finite
from radlads.model.weights.weight_files import WeightFiles, open_weight_files
from radlads.tasks.contracts.disk import need_space
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.recipe import Pretrain
from radlads.tasks.contracts.recipe.training import Training, runs_teacher
from radlads.tasks.contracts.specs import TrainSpec
from radlads.tasks.jobs.common import Job
from radlads.tasks.jobs.sources import load_tokenizer
from radlads.tasks.jobs.teacher.place import teacher_place
from radlads.tasks.jobs.train.frozen_weights import hold_student, hold_teacher

logger = logging.getLogger("radlads")


@dataclass(frozen=True)
class Networks:
    """The networks and the tokenizer of a training job."""

    student: PreTrainedModel
    """The network that trains: a converted student, or, for pretrain, a plain Hugging Face causal model."""
    teacher: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    originals: WeightFiles | None = None
    """The files that the student was loaded from: weights held in 8 bit are exported from them unchanged."""


def load_networks(job: Job, spec: TrainSpec) -> Networks:
    """Student, teacher (where the objective needs one) and tokenizer, on this rank's device (under ZeRO-3 on the CPU).
    Raises UserError."""
    teacher, originals = _teacher(job, spec), None
    if isinstance(spec.section, Pretrain):
        pin = spec.pins["section.tokenizer"]
        tokenizer = load_tokenizer(spec.section.tokenizer, revision=pin.commit)
        student: Any = _fresh_model(spec.section, tokenizer)
        student = student.to(_place(job), job.dtype)
    else:
        folder = job.input("student") / "model"
        tokenizer = load_tokenizer(str(folder), trust_remote_code=spec.trust_remote_code)
        student = hold_student(load_student(folder, dtype=job.dtype), teacher, spec, _place(job))
        decay = job.dtype if spec.section.decay_dtype == "auto" else getattr(torch, spec.section.decay_dtype)
        round_log_decay(student, decay)
        originals = open_weight_files(str(folder))
    for network in (student, *([] if teacher is None else [teacher])):
        fuse_modules(network, job.device)
        run_mlps_in_pieces(network, recomputed=spec.section.gradient_checkpointing is True)
    checkpoint_activations(student, spec.section, teacher)
    return Networks(student, teacher, tokenizer, originals)


def checkpoint_activations(student: Any, section: Training, teacher: PreTrainedModel | None = None) -> None:
    """Let the student compute activations again, as the section says; after `fuse_modules`.

    teacher: whose modules the student runs where both share them (ZeRO-3); its own passes have no gradients.
    """
    if section.gradient_checkpointing == "selective":
        for network in filter(None, (student, teacher)):
            recompute_cheap(network)
    elif section.gradient_checkpointing:
        # Without dropout there is no random state to save, which a CUDA graph could not record.
        random = any("drop" in name and value for name, value in student.config.to_dict().items())
        how = {"use_reentrant": False, "preserve_rng_state": random}
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


def _teacher(job: Job, spec: TrainSpec) -> PreTrainedModel | None:
    if not runs_teacher(spec.objective, spec.section):
        return None
    if spec.teacher is None:
        raise UserError(f"the stage {spec.objective} needs a teacher, and this job names none")
    place = teacher_place(job, spec.teacher)
    teacher = load_teacher(place.path, dtype=job.dtype, revision=place.revision)
    return hold_teacher(teacher, spec, _place(job))


def _place(job: Job) -> torch.device:
    """Where the networks are held until the engine takes them: under ZeRO-3 it divides them as it moves them."""
    return torch.device("cpu") if job.spec.resources.zero_stage == 3 else job.device


def _fresh_model(section: Pretrain, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model with random weights (torch's generator is seeded), sized by the section's config."""
    given = dict(section.config)
    kind = given.pop("model_type", None)
    if kind is None:
        raise UserError("pretrain.config needs a model_type, e.g. qwen3")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    try:
        config = AutoConfig.for_model(kind, **{"vocab_size": len(tokenizer), **ids, **given})
        causal_models: Any = AutoModelForCausalLM
        model: PreTrainedModel = causal_models.from_config(config)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"pretrain.config: {' '.join(str(error).split())[:300]}") from error
    if config.vocab_size < len(tokenizer):
        raise UserError(f"pretrain.config.vocab_size is {config.vocab_size}, the tokenizer has {len(tokenizer)} tokens")
    return model


def export_model(networks: Networks, folder: Path, read: Callable[[str], Tensor], *, dtype: torch.dtype) -> None:
    """Write the trained network as a Hugging Face folder. read: name → the tensor, whole, on the CPU, of this dtype."""
    student: Any = networks.student
    student.eval()
    shutil.rmtree(folder, ignore_errors=True)  # remains of an attempt that failed here
    need_space(folder.parent, student.num_parameters() * dtype.itemsize, "the model")
    if isinstance(student, RadladsForCausalLM):
        export_student(student, networks.tokenizer, folder, dtype=dtype, originals=networks.originals, read=read)
        return
    _make_whole(student, read)
    for name, tensor in student.state_dict().items():
        check_finite(f"the model's tensor {name}", tensor, mend="no model was written")
    student.config.use_cache = True
    student.save_pretrained(folder, max_shard_size=4_000_000_000)
    networks.tokenizer.save_pretrained(folder)


def _make_whole(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Replace the parameters by whole ones, those of a tied matrix by one."""
    whole: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter not in whole:
            whole[parameter] = nn.Parameter(read(name), requires_grad=False)
        place, _, own = name.rpartition(".")
        model.get_submodule(place)._parameters[own] = whole[parameter]
