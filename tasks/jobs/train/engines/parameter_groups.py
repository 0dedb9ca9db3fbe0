"""The optimizer's parameter groups: parameters, learning rates and weight decay."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from torch import nn

from radlads.model.training.mixer_parts import is_decay_base
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.recipe import Optimizer, Training

Named = list[tuple[str, nn.Parameter]]


def select_trainable(objective: Any, section: Training) -> dict[str, Named]:
    """Freeze the parameters that the objective does not train; return the rest by group (`mixer`, `rest`), in the
    student's own order.

    Names are the student's. Raises UserError if nothing is left to train.
    """
    student: Any = objective.student
    chosen: dict[str, Named] = {"mixer": [], "rest": []}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(objective.trainable(name))
        if parameter.requires_grad:
            of_mixer = hasattr(student, "parameter_group") and student.parameter_group(name) == "mixer"
            chosen["mixer" if of_mixer else "rest"].append((name, parameter))
    if not any(chosen.values()):
        only = ", ".join(getattr(section, "train_only", ()))
        reason = f"no mixer has parts named {only} (train_only)" if only else "every parameter is frozen"
        raise UserError(f"nothing is left to train: {reason} (freeze: {', '.join(section.freeze)})")
    return chosen


def optimizer_groups(chosen: dict[str, Named], options: Optimizer) -> list[dict[str, Any]]:
    """AdamW's parameter groups, each with the `name` whose rate it follows and the `multiplier` of that rate."""
    groups: list[dict[str, Any]] = []
    for name, named in chosen.items():
        sets: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for full_name, parameter in named:
            # Norms, biases and per-channel vectors are not decayed, [1,1,A] ones neither (rwkv7_variants §7.3).
            vector = sum(size > 1 for size in parameter.shape) < 2
            multiplier = options.decay_base_rate if is_decay_base(full_name) else 1.0
            sets.setdefault((vector, multiplier), []).append(parameter)
        for (vector, multiplier), parameters in sorted(sets.items(), key=itemgetter(0)):
            decay = 0.0 if vector else options.weight_decay
            groups.append(
                {"params": parameters, "name": name, "multiplier": multiplier, "weight_decay": decay, "lr": 0.0}
            )
    return groups
