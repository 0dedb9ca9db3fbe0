"""ZeRO-2 and 3: what trains is divided over the ranks, under ZeRO-3 all parameters of student and teacher.

torch's `fully_shard` does it. Under ZeRO-2 each layer is a unit, gathered once a step. Under ZeRO-3 a unit is
gathered before it runs, forward and backward, and freed after it: in every layer of both networks, each module whose
weights both networks share is a unit (held once), and so is the rest of the layer. Where mixers run outside their
layers (align), each mixer is one. Embeddings, final norms and heads are one unit, which is gathered for the whole
pass: the losses read the heads' weights.

Every parameter is divided along its first dimension, so a rank's part is one piece of the flattened parameter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from radlads.model.mixers.shared.family_code import family_class
from radlads.model.mixers.shared.mixer import Mixer
from radlads.model.student.modeling import RadladsForCausalLM
from radlads.model.teacher.family import backbone
from radlads.model.teacher.load import find_family
from radlads.model.training.quantized import hold_as_buffers, hold_as_parameters

REDUCED = torch.float32
"""In which gradients are averaged over the ranks."""
_REPLICATED = 1 << 20
"""Elements below which a module that both networks share is held whole by every rank: a norm, not a matrix."""
_NO_MORE = -1


class Partitioned(nn.Module):
    """An objective with its networks divided over the ranks. Call it in place of the objective, on every rank alike."""

    def __init__(
        self, objective: Any, *, device: torch.device, dtype: torch.dtype, gathered_once: bool = False
    ) -> None:
        """objective: its networks are on the CPU, trained parameters are known by `requires_grad`. They are moved to
        the device as they are divided; those that train become fp32 (the masters), and are gathered in `dtype`.

        gathered_once: only what trains is divided, and stays gathered until `free_gathered`: ZeRO-2's communication.
        """
        super().__init__()
        self.objective, self.teacher, self.dtype = objective, objective._teacher[0], dtype
        student = objective.student
        self._policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=dtype if gathered_once else REDUCED, cast_forward_inputs=False
        )
        self.device = device
        self._mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
        self._whole: set[nn.Parameter] = set()
        networks = [network for network in (student, self.teacher) if network is not None]
        if gathered_once:
            self._whole |= {p for network in networks for p in network.parameters() if not p.requires_grad}
        shared = [] if self.teacher is None or gathered_once else join_shared(student, self.teacher)
        for module in shared:
            for part in module.modules():
                hold_as_parameters(part)
            if sum(parameter.numel() for parameter in module.parameters()) < _REPLICATED:
                self._whole |= set(module.parameters())
            else:
                self._divide(module)
        alone = objective.mixes_outside_layers
        # Outputs of mixers are views; nothing is written into them.
        warnings.filterwarnings("ignore", message=".*returned a view tensor")
        for network in networks:
            for layer in layers(network):
                for module in layer.modules():
                    if not gathered_once:
                        hold_as_parameters(module)
                    if alone and isinstance(module, Mixer):
                        self._divide(module)
                        register_fsdp_forward_method(module, "mix")
                self._divide(layer)
        self._divide(self, reshard_after_forward=False)
        for parameter in self._whole:
            parameter.data = parameter.data.to(device)
        if gathered_once:
            root: Any = self
            root.set_reshard_after_forward(False)
            root.set_reshard_after_backward(False)

    def forward(self, batch: Any) -> Any:
        """The objective's."""
        return self.objective(batch)

    def _divide(self, module: nn.Module, **options: Any) -> None:
        own = {p for part in outside_units(module) for p in part.parameters(recurse=False)} - self._whole
        if own or module is self:
            for parameter in own:  # unit by unit: loaded weights are pages of their files, which all ranks share
                parameter.data = parameter.data.to(self.device, torch.float32 if parameter.requires_grad else None)
            fully_shard(module, mesh=self._mesh, mp_policy=self._policy, ignored_params=self._whole or None, **options)
            for parameter in own:  # replaced; what still refers to it must not keep the whole tensor
                parameter.data = parameter.data.new_empty(0)


def join_shared(student: PreTrainedModel, teacher: PreTrainedModel) -> list[nn.Module]:
    """Give the student the teacher's own modules where all their tensors are the same objects; returns those modules.

    Outermost modules below the layers, and those outside them. A module with hooks, or another class, is not replaced.
    """
    joined: list[nn.Module] = []
    places = [name for name, _ in student.named_modules()]
    decoder = set(layers(student))
    inside = tuple(f"{name}." for name in places if _find(student, name) in decoder)
    done: tuple[str, ...] = ()
    for name in places:
        ours, theirs = _find(student, name), _find(teacher, name)
        if name.startswith(done) or theirs is None or ours is None or not (name.startswith(inside) or _is_leaf(ours)):
            continue
        if ours is theirs or type(theirs) not in (type(ours), family_class(ours)):
            continue
        if _same_tensors(ours, theirs) and not _hooked(ours):
            place, _, last = name.rpartition(".")
            setattr(student.get_submodule(place), last, theirs)
            done += (f"{name}.",)
            if name.startswith(inside):
                joined.append(theirs)
    return joined


def layers(network: PreTrainedModel) -> Iterator[nn.Module]:
    """The decoder layers of a student, or of a model of a known family."""
    if isinstance(network, RadladsForCausalLM):
        yield from network._layers()
    else:
        yield from getattr(backbone(network), find_family(network.config).layers)


def part_start(parameter: Tensor, rank: int, num_ranks: int) -> int:
    """The first element of a rank's part in the flattened parameter, as `fully_shard` divides it: by rows."""
    rows = parameter.shape[0]
    return min(rank * -(-rows // num_ranks), rows) * (parameter.numel() // rows)


def free_gathered(module: Partitioned) -> None:
    """Free all that is gathered: embeddings and heads stay so after a pass without a backward pass."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextmanager
def gather_student(module: Partitioned, rank: int) -> Iterator[Callable[[str], Tensor] | None]:
    """On rank 0, yields a function: name in the student's state dict → that tensor whole, in its compute dtype, on the
    CPU. On the others it yields None, once rank 0 has left. The student cannot run afterwards."""
    free_gathered(module)
    for part in module.objective.student.modules():
        hold_as_buffers(part)  # exported from their originals
    state: dict[str, Any] = module.objective.student.state_dict()
    divided = [name for name, tensor in state.items() if isinstance(tensor, DTensor)]

    def ask(number: int) -> int:
        """Rank 0's number, on every rank."""
        asked = torch.tensor(number, device=module.device)
        distributed.broadcast(asked, src=0)
        return int(asked)

    def read(name: str) -> Tensor:
        if name in places:
            ask(places[name])
        tensor: Tensor = state[name].full_tensor().to(module.dtype) if name in places else state[name]
        return tensor.cpu()

    if rank != 0:
        while (number := ask(_NO_MORE)) != _NO_MORE:
            state[divided[number]].full_tensor()
        yield None
        return
    places = {name: number for number, name in enumerate(divided)}
    try:
        yield read
    finally:
        ask(_NO_MORE)


def outside_units(module: nn.Module) -> Iterator[nn.Module]:
    """The module and its submodules, without those of units that `fully_shard` has made."""
    yield module
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from outside_units(child)


def _is_leaf(module: nn.Module) -> bool:
    return not any(True for _ in module.children())


def _find(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _same_tensors(ours: nn.Module, theirs: nn.Module) -> bool:
    mine, other = (dict(_tensors(module)) for module in (ours, theirs))
    return bool(mine) and mine.keys() == other.keys() and all(mine[name] is other[name] for name in mine)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _hooked(module: nn.Module) -> bool:
    return any(part._forward_pre_hooks or part._forward_hooks for part in module.modules())
