"""The sizes of teacher and student, counted on the meta device, and the device that they have to fit on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import psutil
import torch
from transformers import PreTrainedConfig

from radlads.model.student.load import build_student
from radlads.model.student.modeling import RadladsForCausalLM, norm_names, parameter_group
from radlads.model.teacher.load import find_family
from radlads.model.teacher.weights import build_empty
from radlads.model.training.lora import linear_names
from radlads.model.training.quantized import is_matrix
from radlads.model.training.recompute import recompute_cheap
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.choice import AttentionChoice, late_choice
from radlads.tasks.contracts.recipe.sections import Recipe
from radlads.tasks.jobs.judge.batching.budget import read_sizes
from radlads.tasks.jobs.plan.activations import LayerBytes, count_layer_bytes, linear_attention_bytes
from radlads.tasks.jobs.plan.choice_plan import planned_layers
from radlads.tasks.jobs.plan.cost import device_kind, likely_gpu
from radlads.tasks.jobs.plan.memory import NetworkSizes
from radlads.tasks.jobs.train.flops import Multiplied, count_multiplied

_GIB = 1024**3


def count_networks(recipe: Recipe, config: PreTrainedConfig, *, liger: bool | None = None) -> NetworkSizes:
    """Build teacher and student on the meta device and count. liger: whether training will find liger-kernel; None: as
    this machine has it. Raises UserError for options that do not fit."""
    family, values, late = find_family(config), _values(config), late_choice(recipe)
    teacher, softmax = build_empty(config), family.softmax_layers(config)
    with torch.device("meta"):
        if recipe.pretrain is not None:
            student, mixers = teacher, set()
        else:
            student = build_student(
                config,
                variant=recipe.student.variant,
                options=recipe.student.options,
                attention_layers=planned_layers(recipe.student, softmax),
                attention_rope=recipe.student.attention_rope,
                attention_log_scale=recipe.student.attention_log_scale,
                untie_embeddings=recipe.student.untie_embeddings,
            )
            mixers = set(student.mixers())
    groups: dict[str, int] = {}
    for name, parameter in student.named_parameters():
        group = parameter_group(name, family, mixers)
        groups[group] = groups.get(group, 0) + parameter.numel()
    theirs = {name: parameter.numel() for name, parameter in teacher.named_parameters()}
    matrices = {n: theirs[n] for n in theirs if _in_layers(n, family) and is_matrix(teacher, n)}
    sizes = read_sizes(config)
    dtypes = (torch.float32, torch.bfloat16)
    longest = max(
        (part.context for stage in recipe.training_stages for part in getattr(recipe, stage).parts), default=1
    )
    layer_bytes = {dtype.itemsize: _layer_bytes(student, dtype, longest, liger) for dtype in dtypes}
    recompute_cheap(student.train())
    return NetworkSizes(
        num_layers=values.num_hidden_layers,
        num_recurrent=len(mixers),
        num_linear=values.num_hidden_layers - len(softmax),
        hidden=sizes.hidden,
        intermediate=sizes.intermediate,
        width=sizes.width,
        head_dim=sizes.head_dim,
        kv_width=sizes.kv_width,
        vocab=sizes.vocab,
        teacher_parameters=0 if recipe.pretrain is not None else sum(theirs.values()),
        student_parameters=sum(groups.values()),
        groups=groups,
        new_parameters=sum(p.numel() for n, p in student.named_parameters() if n not in theirs and n != _HEAD),
        teacher_matrices=sum(matrices.values()),
        mlp_matrices=sum(count for name, count in matrices.items() if parameter_group(name, family, set()) == "mlp"),
        largest_matrix=max(matrices.values(), default=0),
        idle=_idle(teacher, config),
        multiplied=_multiplied(None if recipe.pretrain is not None else teacher, student, late),
        layer_bytes=layer_bytes,
        selective_bytes={dtype.itemsize: _layer_bytes(student, dtype, longest, liger) for dtype in dtypes},
        chosen_late=0 if late is None else late.count,
        linear_names=linear_names(student),
    )


def describe_device(resources: JobResources) -> dict[str, Any]:
    """{device, as_fast_as, kind, processes, peak_flops, memory_bytes} of one process's device; on a CPU its part of the
    machine's resources. kind: of GPU, CPU, or None: unknown.

    A GPU whose memory is given need not be present; its speed is that of a well-known one of that size.
    """
    like = None
    if resources.device == "cuda" and resources.gpu_memory_gib is not None:
        like = likely_gpu(resources.gpu_memory_gib)
        label, name, memory = "GPU", like or "GPU", int(resources.gpu_memory_gib * _GIB)
    elif resources.device == "cuda" and torch.cuda.is_available():
        label = name = torch.cuda.get_device_name(0)
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        label, name, memory = resources.device, None, psutil.virtual_memory().total // resources.processes
    kind, peak = device_kind(name, resources)
    return {
        "device": label,
        "as_fast_as": like,
        "kind": kind,
        "processes": resources.processes,
        "peak_flops": peak,
        "memory_bytes": memory,
    }


_HEAD = "lm_head.weight"


def _multiplied(teacher: Any, student: Any, late: AttentionChoice | None) -> Multiplied:
    counted = count_multiplied(teacher, student)
    return replace(counted, student_softmax=counted.student_softmax + (0 if late is None else late.count))


def _values(config: PreTrainedConfig) -> Any:
    return config


def _in_layers(name: str, family: Any) -> bool:
    return parameter_group(name, family, set()) in ("attention", "mlp")


def _idle(model: torch.nn.Module, config: PreTrainedConfig) -> int:
    """Parameters of experts that a token does not go to."""
    mlp = f".{find_family(config).mlp}."
    experts = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 3 and mlp in name)
    if not experts:
        return 0
    values = _values(config)
    idle: int = round(experts * (1 - values.num_experts_per_tok / values.num_experts))
    return idle


def _layer_bytes(student: Any, dtype: torch.dtype, context: int, liger: bool | None) -> LayerBytes:
    if isinstance(student, RadladsForCausalLM):
        return count_layer_bytes(student, dtype, context=context, liger=liger)
    values, word = _values(student.config), dtype.itemsize
    norms = len(norm_names(find_family(student.config)))
    mlp = (4 * values.intermediate_size + values.hidden_size) * word
    attention = (values.hidden_size + 7 * values.num_attention_heads * (getattr(values, "head_dim", None) or 0)) * word
    linear = linear_attention_bytes(student.to(dtype).model, find_family(student.config))
    return LayerBytes(0, 0, attention, mlp, mlp, norms * 3 * values.hidden_size * word, linear)
