"""Frozen weight matrices in 8 bit: int8 with one scale for a group of inputs, by torchao's quantisation primitives.

Dims: E experts, N outputs, K inputs, G groups of a row (K / 128; 1 where 128 does not divide K).

    scale_NG = max |W_NK| over the group / 127        q_NK = round(W / scale)        W' = q · scale

The module keeps its class, its forward and the names of everything else; only the matrix is replaced by an
`Int8Weight`, which is dequantised for each product and again in the backward pass: no full-precision copy
outlives a product. The gradient of the input is that of a product with W' (exact); the weight has none. The originals
are not kept: code that saves the model reads them from where it was loaded (`originals` of model/student/export.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from radlads.model.weights.finite import check_finite
from radlads.tasks.contracts.errors import UserError

GROUP = 128
"""Numbers of a row that share a scale."""
_BOUND = 127
# Routers select the experts: small matrices, in which rounding would change the selection.
_ROUTERS = ("gate", "router", "shared_expert_gate")
_VALUES, _SCALES = "_int8", "_scale"


class Int8Weight:
    """A frozen matrix [N,K], or a stack of them [E,N,K]. Not a tensor: it can be indexed by its first dimension,
    transposed, and multiplied with by `F.linear` and `F.grouped_mm`, the only uses of such a weight in models."""

    def __init__(self, values: Tensor, scales: Tensor, *, transposed: bool = False) -> None:
        """values: int8 [...,N,K]; scales: [...,N,G] in the dtype of the original weight."""
        self.values, self.scales, self.transposed = values, scales, transposed

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def shape(self) -> torch.Size:
        return self.values.mT.shape if self.transposed else self.values.shape

    def __getitem__(self, index: Any) -> Int8Weight:
        if self.values.ndim != 3:
            raise TypeError("only a stack of 8-bit matrices can be indexed, and only by the expert")
        return Int8Weight(self.values[index], self.scales[index], transposed=self.transposed)

    def transpose(self, first: int, second: int) -> Int8Weight:
        """The last two dimensions swapped. Raises TypeError for others."""
        if {first % self.values.ndim, second % self.values.ndim} != {self.values.ndim - 2, self.values.ndim - 1}:
            raise TypeError("only the last two dimensions of an 8-bit weight can be swapped")
        return Int8Weight(self.values, self.scales, transposed=not self.transposed)

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """W'; dtype: None is its own."""
        primitives = _torchao()
        block = (*(1,) * (self.values.ndim - 1), self.values.shape[-1] // self.scales.shape[-1])
        weight: Tensor = primitives.dequantize_affine(
            self.values, block, self.scales, None, torch.int8, -_BOUND, _BOUND, output_dtype=dtype or self.dtype
        )
        return weight.mT if self.transposed else weight

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is nn.functional.linear:
            return _linear(*args, **kwargs)
        if function in _grouped_products():
            return _GroupedProduct.apply(*args, kwargs.pop("offs", None), kwargs)
        raise TypeError(f"{getattr(function, '__name__', function)} does not know 8-bit weights")


def _linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    if bias is not None and bias.requires_grad:
        raise ValueError("the bias beside an 8-bit weight is frozen with it, and cannot train")
    return _Product.apply(x, weight, bias)


class _Product(torch.autograd.Function):
    """x [...,K] → x W'ᵀ + bias [...,N]; keeps neither x nor W'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return nn.functional.linear(x, weight.dequantized(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.weight.dequantized(grad.dtype), None, None


class _GroupedProduct(torch.autograd.Function):
    """Rows of x [S,K], sorted by expert, times W' [E,K,N]; offs [E]: where each expert's rows end."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight, offs: Tensor, options: dict[str, Any]) -> Tensor:
        ctx.weight, ctx.options = weight, options
        ctx.save_for_backward(offs)
        return nn.functional.grouped_mm(x, weight.dequantized(x.dtype), offs=offs, **options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (offs,) = ctx.saved_tensors
        weight = ctx.weight.dequantized(grad.dtype).mT
        return nn.functional.grouped_mm(grad.contiguous(), weight, offs=offs, **ctx.options), None, None, None


def quantize_frozen(
    model: nn.Module, bits: int, select: Callable[[str], bool], *, device: torch.device | str | None = None
) -> list[str]:
    """Convert the selected matrices to 8 bit; returns their names. Biases, norms and routers are not changed.

    bits: 16 changes nothing. select: of the names in `model.named_parameters()`. device: where the 8-bit
    matrices are made and stay, one at a time, so that the full-precision model need not fit there; None: each matrix's
    own device. Raises ValueError for other bits, or a selected matrix that trains, UserError for values that are not
    finite.
    """
    if bits not in (8, 16):
        raise ValueError(f"frozen weights are held in 8 or 16 bits, not {bits}")
    chosen = [] if bits == 16 else [name for name in dict(model.named_parameters()) if select(name)]
    done = []
    for name in chosen:
        if not is_matrix(model, name):
            continue
        owner, own = _owner(model, name)
        parameter = owner._parameters[own]
        assert parameter is not None
        if parameter.requires_grad:
            raise ValueError(f"{name} trains, so it cannot be held in 8 bit")
        check_finite(f"{name}, which is to be held in 8 bit,", parameter)
        _put(owner, own, *quantize(parameter.detach().to(device or parameter.device)))
        done.append(name)
    return done


@torch.no_grad()
def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 values [...,N,K], scales [...,N,G] in the weight's dtype)."""
    primitives = _torchao()
    width = weight.shape[-1]
    group = GROUP if width % GROUP == 0 else width
    block = (*(1,) * (weight.ndim - 1), group)
    exact = weight.float()
    scales, zeros = primitives.choose_qparams_affine(
        exact, primitives.MappingType.SYMMETRIC, block, torch.int8, -_BOUND, _BOUND, keepdim=True
    )
    scales = scales.to(weight.dtype)  # before the values are rounded, so that they match the stored scale
    values = primitives.quantize_affine(exact, block, scales.float(), zeros, torch.int8, -_BOUND, _BOUND)
    return values, scales


@torch.no_grad()
def share_frozen(student: nn.Module, teacher: nn.Module, select: Callable[[str], bool]) -> list[str]:
    """Let the student use the teacher's tensors where they are equal, in the form in which the teacher holds them.

    select: of the student's parameter names; those that nothing will change. A tensor that the teacher holds in 8 bit
    is compared in 8 bit. The teacher is on its device already: moving it afterwards would separate the two. Returns the
    names that are shared, those of a tied matrix each.
    """
    shared = []
    for name, tensor in list(student.named_parameters(remove_duplicate=False)):
        place, _, own = name.rpartition(".")
        theirs = _submodule(teacher, place) if select(name) else None
        if theirs is None:
            continue
        whole, values, scales = theirs._parameters.get(own), *_held(theirs, own)
        ours = student.get_submodule(place)
        if whole is not None and _same(tensor, whole):
            ours._parameters[own] = whole
        elif values is not None and is_matrix(student, name) and values.shape == tensor.shape:
            mine = quantize(tensor.detach().to(values.device))
            if not (torch.equal(mine[0], values) and torch.equal(mine[1], scales)):
                continue
            _put(ours, own, values, scales)
        else:
            continue
        shared.append(name)
    return shared


def quantized_names(model: nn.Module) -> list[str]:
    """Names, as they were, of the parameters that are held in 8 bit."""
    return list(quantized_shapes(model))


def quantized_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Name, as it was, of each parameter that is held in 8 bit → its shape."""
    named = model.named_buffers(remove_duplicate=False)
    return {name.removesuffix(_VALUES): values.shape for name, values in named if name.endswith(_VALUES)}


def num_weights(model: nn.Module) -> int:
    """Parameters of a model, those that are held in 8 bit included."""
    return sum(map(torch.numel, model.parameters())) + sum(map(torch.Size.numel, quantized_shapes(model).values()))


def is_matrix(model: nn.Module, name: str) -> bool:
    """Whether a parameter can be held in 8 bit: the matrix of a linear map that is no router, or a stack of experts'
    matrices (one parameter in transformers 5)."""
    owner, own = _owner(model, name)
    parameter, words = owner._parameters[own], name.split(".")
    if parameter is None or not parameter.is_floating_point() or (len(words) > 1 and words[-2] in _ROUTERS):
        return False
    if isinstance(owner, nn.Conv1d):
        return False
    return parameter.ndim == 3 or (parameter.ndim == 2 and isinstance(owner, nn.Linear))


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    place, _, own = name.rpartition(".")
    return model.get_submodule(place), own


def _put(owner: nn.Module, own: str, values: Tensor, scales: Tensor) -> None:
    """Replace a parameter by buffers that move with the module and are not saved with it."""
    owner._parameters.pop(own, None)
    owner.register_buffer(own + _VALUES, values, persistent=False)
    owner.register_buffer(own + _SCALES, scales, persistent=False)
    names = tuple(sorted({*getattr(type(owner), "_int8_names", ()), own}))
    owner.__class__ = _reading(getattr(type(owner), "_int8_base", type(owner)), names)


@cache
def _reading(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The class, with the named weights read from the buffers: so they move with the module's buffers."""
    reads = {name: property(partial(_read, name)) for name in names}
    made = {"_int8_names": names, "_int8_base": kind, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**reads, **made})


def hold_as_parameters(module: nn.Module) -> None:
    """Hold a module's own 8-bit matrices as frozen parameters, not as buffers: ranks can divide those."""
    for name in [name for name in module._buffers if name.endswith((_VALUES, _SCALES))]:
        tensor = module._buffers.pop(name)
        module._non_persistent_buffers_set.discard(name)
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def hold_as_buffers(module: nn.Module) -> None:
    """Undo `hold_as_parameters`; the values are dropped."""
    for name in [name for name in module._parameters if name.endswith((_VALUES, _SCALES))]:
        tensor = module._parameters.pop(name)
        assert tensor is not None
        module.register_buffer(name, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), persistent=False)


def _held(owner: nn.Module, own: str) -> tuple[Tensor | None, Tensor | None]:
    values, scales = (owner._buffers.get(own + part, owner._parameters.get(own + part)) for part in (_VALUES, _SCALES))
    return values, scales


def _read(name: str, owner: nn.Module) -> Int8Weight:
    values, scales = _held(owner, name)
    assert values is not None
    assert scales is not None
    return Int8Weight(values, scales)


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and ours.dtype == theirs.dtype and torch.equal(ours.to(theirs.device), theirs)


def _submodule(model: nn.Module, place: str) -> nn.Module | None:
    try:
        return model.get_submodule(place)
    except AttributeError:
        return None


def _grouped_products() -> tuple[Any, ...]:
    return tuple(p for p in (getattr(nn.functional, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if p)


@cache
def _torchao() -> Any:
    """torchao's primitives, imported on use: the import takes seconds and logs messages on kernels not needed here."""
    logging.getLogger("torchao").setLevel(logging.ERROR)
    try:
        from torchao.quantization import quant_primitives
    except ImportError as error:
        raise UserError("holding weights in 8 bit needs torchao: pip install 'radlads[quant]'") from error
    return quant_primitives
