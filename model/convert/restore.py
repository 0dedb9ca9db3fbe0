"""Restore the teacher's softmax attention in converted layers of a student, temporarily (to score) or permanently."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from radlads.model.mixers.shared.mixer import Mixer
from radlads.model.student.configuration import FIRST_LAYER
from radlads.model.student.first_values import hand_on_first_values
from radlads.model.student.kept_attention import keep_attention
from radlads.model.student.modeling import RadladsForCausalLM
from radlads.model.teacher.load import find_family
from radlads.tasks.contracts.errors import UserError


@contextmanager
def restored(student: RadladsForCausalLM, teacher: PreTrainedModel, layers: Sequence[int]) -> Iterator[None]:
    """Context in which the given layers use the teacher's attention, in addition to the student's kept layers.

    Rotary positions are on and scores are not scaled, whatever the student's config says: untrained softmax attention
    without positions is not the function that the teacher learned, and a score would measure that difference. If the
    layer that hands on first values is restored, its attention hands them on, as in the product. Weights are shared,
    nothing is copied.
    """
    config = student.config
    before = (list(config.attention_layers), config.attention_rope, config.first_values, config.attention_log_scale)
    modules = {i: getattr(student._layers()[i], student.parts.attention) for i in config.softmax_layers()}
    try:
        _restore(student, teacher, layers)
        config.attention_rope, config.attention_log_scale = True, None
        yield
    finally:
        config.attention_layers, config.attention_rope, config.first_values, config.attention_log_scale = before
        for i, module in modules.items():
            setattr(student._layers()[i], student.parts.attention, module)


def restore_attention(
    student: RadladsForCausalLM, teacher: PreTrainedModel, layers: Sequence[int], *, attention_rope: bool
) -> dict[str, list[str]]:
    """Make the given layers softmax attention permanently, with the teacher's weights in the student's dtype.

    attention_rope: whether they use rotary positions from now on; published: without, with further training. The
    student is changed in place. Returns {restored, dropped}: names of tensors added and removed. Raises UserError.
    """
    names = set(student.state_dict())
    first = _restore(student, teacher, layers)
    for hidden in () if first is None else vars(first).keys() & first._parameters.keys():
        del vars(first)[hidden]
        first._parameters[hidden] = None
    attentions = student._layers()
    for i in layers:
        own = copy.deepcopy(getattr(attentions[i], student.parts.attention))
        setattr(attentions[i], student.parts.attention, own.to(device=student.device, dtype=student.dtype))
    config = student.config
    config.attention_rope = attention_rope
    kinds = ("linear_attention", "full_attention")
    config.layer_types = [kinds[i in config.attention_layers] for i in range(config.num_hidden_layers)]
    student.requires_grad_(True)
    now = set(student.state_dict())
    came = [name for name in now if student.parameter_group(name) == "attention" and _layer_of(name, student) in layers]
    return {"restored": sorted(came), "dropped": sorted(names - now)}


def _restore(student: RadladsForCausalLM, teacher: PreTrainedModel, layers: Sequence[int]) -> Mixer | None:
    """Returns the mixer that hands on first values now; None where the attention of the first softmax layer does."""
    attentions = find_family(teacher.config).attention_modules(teacher)
    places, softmax = student._layers(), student.config.softmax_layers()
    kept = set(student.config.attention_layers) | set(layers)
    beyond = sorted(kept - set(softmax))
    if beyond or len(kept) >= len(softmax):
        raise UserError(
            f"layers {sorted(kept)} cannot all be softmax attention: of the student's {len(places)} "
            f"layers {len(softmax)} can be, and at least one stays converted"
        )
    if softmax[0] in set(layers) - set(student.config.attention_layers):
        student.config.first_values = FIRST_LAYER  # they came from this layer until now
    student.config.attention_layers = sorted(kept)
    for i in layers:
        attention = copy.copy(attentions[i])
        attention.config = student.model.config  # the student's config determines how masks are made
        keep_attention(attention, student.config, i)
        hand_on_first_values(attention, student.config, i)
        setattr(places[i], student.parts.attention, attention)
    first = student.config.first_layer()
    if first is None or first in kept:
        return None
    mixer = _as_first(student, first, getattr(places[first], student.parts.attention))
    setattr(places[first], student.parts.attention, mixer)
    return mixer


def _as_first(student: RadladsForCausalLM, layer: int, mixer: Mixer) -> Mixer:
    """The mixer as the first recurrent one: the parameters that take values from a layer before it read as None.

    A copy with the mixer's own dict of parameters, since a partition (ZeRO-3) puts what it gathers there.
    """
    with torch.device("meta"):
        fresh = student.build_mixer(layer, mixer.shape)
    has, needs = mixer.state_dict().keys(), fresh.state_dict().keys()
    if needs - has:
        raise UserError(f"layer {layer} cannot become the first recurrent layer: {sorted(needs - has)}")
    made = copy.copy(mixer)
    vars(made).update(dict.fromkeys(has - needs))
    return made


def _layer_of(name: str, student: RadladsForCausalLM) -> int:
    words = name.split(".")
    return int(words[words.index(student.parts.layers) + 1])
