"""Copy the teacher's weights into a student: all of them, by name; a misfit is reported with its reason.

Between two loaded models (`transplant`), or from a checkpoint's files into the student's, tensor by tensor
(`stream_transplant`); both follow the origins that `trace_origins` finds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from radlads.model.mixers.shared.mixer import Mixer
from radlads.model.student.modeling import RadladsForCausalLM
from radlads.model.teacher.weights import DAMAGED, TeacherWeights, check_ties
from radlads.model.weights.finite import check_finite
from radlads.model.weights.weight_files import WeightWriter
from radlads.tasks.contracts.errors import UserError


@dataclass(frozen=True)
class TransplantReport:
    """How every tensor was handled, by its name in the student (`dropped`: in the teacher)."""

    copied: tuple[str, ...]
    fresh: tuple[str, ...]
    """Only in the student: the mixers' own parameters, as initialised."""
    dropped: tuple[str, ...]
    """Only in the checkpoint, and not part of the language model: vision parts, stored frequencies."""
    tied: tuple[str, ...] = ()
    """Names that share another tensor (a tied head), which was copied under its own name."""


@dataclass(frozen=True)
class TensorOrigin:
    """Source of one tensor of the student."""

    source: str | None
    """Name in the teacher; None: initialised by its mixer."""
    rows: tuple[int, int] | None = None
    """Rows (first axis) of the source, where the teacher stores several projections in one tensor."""
    factor: float = 1.0
    gates: int | None = None
    """Head width K of a q_proj that also holds gates: the factor is for the first K of every 2 K rows."""
    tied_to: str | None = None
    """The student's tensor that it is tied to; `source`, if given, must then hold the same numbers."""


def trace_origins(
    student: RadladsForCausalLM, shapes: Mapping[str, Sequence[int]], *, scale: Mapping[str, float] | None = None
) -> dict[str, TensorOrigin]:
    """Find the source of every tensor of a student (on the meta device or not). shapes: of the teacher's tensors.

    scale: multipliers {q, k, v, o} of the projections (weight and bias) of converted layers. Raises UserError when
    shapes differ, when a tensor that is not a mixer's own has no source, or when a tensor of the teacher has no
    counterpart in the student: a bias, a norm.
    """
    mixers, parts, target = student.mixers(), student.parts, student.state_dict()
    tied = dict(student.all_tied_weights_keys)
    origins: dict[str, TensorOrigin] = {}
    for name in target:
        if name in tied:
            origins[name] = TensorOrigin(name if name in shapes else None, tied_to=tied[name])
            continue
        origin = _own_origin(name, student, shapes)
        if origin.source is not None and (projection := _projection(name, mixers, parts)):
            shape = mixers[_split(name, parts)[0]].shape
            gates = shape.head_dim if projection == "q" and shape.output_gate else None
            origin = TensorOrigin(origin.source, origin.rows, float((scale or {}).get(projection, 1.0)), gates)
        origins[name] = origin
    misshapen = []
    for name, origin in origins.items():
        if origin.source is not None:
            found = tuple(shapes[origin.source])
            found = (origin.rows[1] - origin.rows[0], *found[1:]) if origin.rows else found
            if found != tuple(target[name].shape):
                misshapen.append(f"{name} is {found} in the teacher and {tuple(target[name].shape)} in the student")
    if misshapen:
        raise UserError(f"the student does not fit this teacher: {'; '.join(sorted(misshapen)[:3])}")
    own = [name for name, origin in origins.items() if origin.source is None and origin.tied_to is None]
    orphans = sorted(name for name in own if student.parameter_group(name) != "mixer" or _given(name, mixers, parts))
    homeless = sorted(shapes.keys() - {origin.source for origin in origins.values()})
    if orphans or homeless:
        raise UserError(
            "the student does not fit this teacher: "
            f"without a source: {orphans[:3] or 'none'}; without a place: {homeless[:3] or 'none'}"
        )
    return origins


@torch.no_grad()
def transplant(
    teacher: PreTrainedModel, student: RadladsForCausalLM, *, scale: Mapping[str, float] | None = None
) -> TransplantReport:
    """Copy every tensor that both models have, converting to the student's dtype and device, and the generation
    defaults.

    scale: see `trace_origins`. Raises UserError: as `trace_origins`, and for values that are not finite.
    """
    source, target = teacher.state_dict(), student.state_dict()
    origins = trace_origins(student, {name: tensor.shape for name, tensor in source.items()}, scale=scale)

    def read(name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return source[name][start:stop]

    ties = {o.source: origins[o.tied_to].source for o in origins.values() if o.tied_to and o.source}
    check_ties(ties, {name: tensor.shape for name, tensor in source.items()}, read)
    for name, origin in origins.items():
        if origin.source is not None and origin.tied_to is None:
            taken = _take(origin, read)
            target[name].copy_(taken)
            check_finite(f"teacher tensor {origin.source}", target[name], source=taken, mend=DAMAGED)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return _report(origins)


@torch.no_grad()
def stream_transplant(
    weights: TeacherWeights,
    student: RadladsForCausalLM,
    folder: Path,
    *,
    dtype: torch.dtype,
    seed: int,
    scale: Mapping[str, float] | None = None,
    max_shard_bytes: int = 4_000_000_000,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> TransplantReport:
    """Write the weights of `student` (on the meta device) into `folder` as safetensors, each tensor as it is read.

    In memory at a time: one tensor of the teacher (the experts of a layer are one) and one fresh mixer. A mixer's
    initial values depend on `seed` and its layer's number only, not on the order or the number of files. on_progress:
    tensors done, tensors in total. Raises UserError: see `trace_origins`, and for values that are not finite.
    """
    origins = trace_origins(student, weights.shapes, scale=scale)
    weights.check_ties()
    own = {name: tensor for name, tensor in student.state_dict().items() if origins[name].tied_to is None}
    layout = {name: (dtype if t.is_floating_point() else t.dtype, t.shape) for name, t in own.items()}
    writer = WeightWriter(folder, layout, max_shard_bytes=max_shard_bytes)
    fresh = {_split(name, student.parts)[1] for name in own if origins[name].source is None}
    nursery = _Nursery(student, fresh, dtype, seed)
    try:
        for done, name in enumerate(own):
            origin = origins[name]
            taken = nursery.take(name) if origin.source is None else _take(origin, weights.read)
            written = taken.to(layout[name][0])
            label = f"fresh tensor {name}" if origin.source is None else f"teacher tensor {origin.source}"
            check_finite(label, written, source=taken, mend=DAMAGED if origin.source else "")
            writer.write(name, written)
            on_progress(done + 1, len(own))
        writer.close()
    finally:
        writer.abandon()
    return _report(origins, weights.left_out)


def _report(origins: Mapping[str, TensorOrigin], left_out: Iterable[str] = ()) -> TransplantReport:
    """left_out: the checkpoint's tensors outside the language model."""
    kinds: dict[str, list[str]] = {"copied": [], "fresh": [], "tied": []}
    for name, origin in origins.items():
        kinds["tied" if origin.tied_to else "fresh" if origin.source is None else "copied"].append(name)
    return TransplantReport(
        **{kind: tuple(sorted(names)) for kind, names in kinds.items()}, dropped=tuple(sorted(left_out))
    )


class _Nursery:
    """Freshly initialised mixers, one at a time, for the tensors that the teacher does not have."""

    def __init__(self, student: RadladsForCausalLM, fresh: set[str], dtype: torch.dtype, seed: int) -> None:
        """fresh: names within a mixer of the tensors to keep; the rest come from the teacher."""
        self._student, self._fresh, self._dtype, self._seed = student, fresh, dtype, seed
        self._shapes = {layer: mixer.shape for layer, mixer in student.mixers().items()}
        self._layer, self._tensors = -1, dict[str, Tensor]()

    def take(self, name: str) -> Tensor:
        layer, rest = _split(name, self._student.parts)
        if layer != self._layer:
            self._tensors = {}
            self._layer, self._tensors = layer, self._make(layer)
        return self._tensors[rest]

    def _make(self, layer: int) -> dict[str, Tensor]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed + layer)
                mixer = self._student.build_mixer(layer, self._shapes[layer])
        finally:
            torch.set_default_dtype(before)
        return {name: tensor for name, tensor in mixer.state_dict().items() if name in self._fresh}


def _own_origin(name: str, student: RadladsForCausalLM, shapes: Mapping[str, Sequence[int]]) -> TensorOrigin:
    """Source by the tensor's name; for an untied head the embeddings; for q, k or v the rows of a fused projection."""
    if name in shapes:
        return TensorOrigin(name)
    embeddings = f"model.{student.parts.embeddings}.weight"
    if name == "lm_head.weight" and student.config.teacher.get("tie_word_embeddings") and embeddings in shapes:
        return TensorOrigin(embeddings)
    fused = getattr(student.parts, "qkv", None)
    mixers = student.mixers()
    if fused and (projection := _projection(name, mixers, student.parts)) in ("q", "k", "v"):
        layer, rest = _split(name, student.parts)
        source = name.removesuffix(rest) + f"{fused}.{rest.rpartition('.')[2]}"
        if source in shapes:
            shape = mixers[layer].shape
            q, kv = shape.width, shape.num_kv_heads * shape.head_dim
            return TensorOrigin(source, rows={"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}[projection])
    return TensorOrigin(None)


def _projection(name: str, mixers: Mapping[int, Mixer], parts: object) -> str | None:
    """q, k, v or o, for a tensor of a converted layer's projections."""
    layer, rest = _split(name, parts)
    letter, _, kind = rest.partition(".")[0].partition("_")
    return letter if layer in mixers and kind == "proj" and letter in ("q", "k", "v", "o") else None


def _given(name: str, mixers: Mapping[int, Mixer], parts: object) -> bool:
    """Whether a mixer's tensor must come from the teacher: a projection, or a norm of q and k."""
    return _projection(name, mixers, parts) is not None or _split(name, parts)[1].startswith(("q_norm.", "k_norm."))


def _split(name: str, parts: object) -> tuple[int, str]:
    """`model.layers.3.self_attn.q_proj.weight` → (3, "q_proj.weight"); (-1, "") outside attention and mixers."""
    words = name.split(".")
    if parts.layers not in words[:2]:
        return -1, ""
    place = words.index(parts.layers)
    if len(words) < place + 4 or words[place + 2] != parts.attention:
        return -1, ""
    return int(words[place + 1]), ".".join(words[place + 3 :])


def _take(origin: TensorOrigin, read: Callable[..., Tensor]) -> Tensor:
    tensor = read(origin.source, *(origin.rows or ()))
    if origin.factor == 1.0:
        return tensor
    scaled = tensor.float() * origin.factor
    if origin.gates is not None:
        heads = (-1, 2, origin.gates)
        scaled = torch.stack([scaled.unflatten(0, heads)[:, 0], tensor.float().unflatten(0, heads)[:, 1]], dim=1)
        scaled = scaled.flatten(0, 2)
    return scaled.to(tensor.dtype)
