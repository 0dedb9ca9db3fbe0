"""Low-rank updates of a student's linear projections, merged before it is written.

y = x Wᵀ + b + scale · (x Aᵀ) Bᵀ, with A [R,in] Kaiming-uniform and B [out,R] zero: the network starts as it was, and
the gradient of B is not zero (with both zero, as in the seed, neither ever moves: rwkv7_variants §8.6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from radlads.model.training.settings import LoraSettings
from radlads.model.weights.finite import check_finite
from radlads.tasks.contracts.errors import UserError

_FACTORS = ("lora_a", "lora_b")


class LoraLinear(nn.Linear):
    """A linear module with a low-rank update; `weight` and `bias` are the module's own, under their own names."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_scale = scale
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.lora_a = nn.Parameter(self.lora_a.detach().to(linear.weight))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        low = nn.functional.linear(nn.functional.linear(x, self.lora_a), self.lora_b)
        return super().forward(x) + self.lora_scale * low

    def plain(self) -> nn.Linear:
        """The module without its update."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight, plain.bias = self.weight, self.bias
        return plain.train(self.training)


def linear_names(student: nn.Module) -> tuple[str, ...]:
    """Names allowed in `targets`: the last names of the linear modules inside the layers."""
    named = (name.rpartition(".") for name, module in student.named_modules() if isinstance(module, nn.Linear))
    return tuple(sorted({last for place, _, last in named if place}))


def missing_target(targets: Sequence[str], known: Sequence[str]) -> str | None:
    """The fault of a section's targets, in one line; None if all are known."""
    missing = [target for target in targets if target not in known]
    if not missing:
        return None
    return f"lora.targets: no layer has a linear module '{missing[0]}'; there are {', '.join(known)}"


def add_lora(student: nn.Module, section: LoraSettings) -> list[str]:
    """Give every linear module whose last name is among `section.targets` an update; returns the modules' names.

    The head is not among them. section: a recipe's `lora`. A is drawn from torch's generator, in the modules' order.
    Raises UserError for a target that no layer has, or that is held in 8 bit.
    """
    if fault := missing_target(section.targets, linear_names(student)):
        raise UserError(fault)
    named = [(name, module) for name, module in student.named_modules() if name.rpartition(".")[2] in section.targets]
    linear = {name: module for name, module in named if isinstance(module, nn.Linear)}
    if any(not isinstance(module.weight, nn.Parameter) for module in linear.values()):
        raise UserError("lora.targets: weights that are held in 8 bit cannot be merged with an update")
    for name, module in linear.items():
        _replace(student, name, LoraLinear(module, section.rank, section.scale))
    return list(linear)


def merge_lora(student: nn.Module, read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """Turn all modules that `add_lora` changed into plain ones. Returns the function that reads the student's tensors
    from then on: by name, each merged with its update as it is read.

    read: name of a tensor of the student as it was → the tensor. The function returned raises UserError for a sum that
    is not finite.
    """
    scales: dict[str, float] = {}
    for name, module in list(student.named_modules()):
        if isinstance(module, LoraLinear):
            scales[f"{name}.weight"] = module.lora_scale
            _replace(student, name, module.plain())

    @torch.no_grad()
    def read_merged(name: str) -> Tensor:
        weight = read(name)
        if name not in scales:
            return weight
        a, b = (read(name.removesuffix("weight") + factor).float() for factor in _FACTORS)
        merged = (weight.float() + scales[name] * (b @ a)).to(weight.dtype)
        check_finite(f"{name}, merged with its low-rank update,", merged)
        return merged

    return read_merged


def lora_trains(student: nn.Module, name: str) -> bool | None:
    """Whether a parameter is part of an update (True), or adapted by one (False); None: neither.

    name: as in `student.named_parameters()`.
    """
    place, _, last = name.rpartition(".")
    if last in _FACTORS:
        return True
    return False if isinstance(student.get_submodule(place), LoraLinear) else None


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    place, _, last = name.rpartition(".")
    setattr(model.get_submodule(place), last, module)
