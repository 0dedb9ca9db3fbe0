"""Description of a teacher family: names of its transformers model's parts, and differences of its attention."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from radlads.model.student.configuration import softmax_layers
from radlads.tasks.contracts.errors import UserError

NO_RESTART = "the teacher's own linear-attention layers do not restart where documents do; turn it off"
"""Why packed documents are refused where a family has `linear_attention`."""


@dataclass(frozen=True)
class TeacherFamily:
    """Names of a family's parts, all relative to the backbone (`model.model`), to a layer, or to its attention.

    Sizes, biases, the rotary function, the kind of q/k norm and the scale of the scores are not here: they are read
    from the modules. The defaults are Llama's.
    """

    model_type: str
    layers: str = "layers"
    attention: str = "self_attn"
    input_norm: str | None = "input_layernorm"
    """The norm before attention; None where attention reads the residual stream directly."""
    mlp_norm: str | None = "post_attention_layernorm"
    """The norm before the MLP; None where the MLP has no norm of its own."""
    other_norms: tuple[str, ...] = ()
    """Further norms of a layer: after attention, after the MLP."""
    mlp: str = "mlp"
    embeddings: str = "embed_tokens"
    final_norm: str = "norm"
    rotary: str = "rotary_emb"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    qkv: str | None = None
    """One projection with the rows of q, k and v, in this order; then q, k and v are names in the student only."""
    q_norm: str | None = None
    k_norm: str | None = None
    window: Literal["none", "all", "layer_types"] = "none"
    """Which layers apply the config's `sliding_window`."""
    rotates: tuple[str, ...] = ()
    """Attributes of an attention module, of which one must be true where it rotates q and k; `not x` is true where x is
    false or None. Empty: every layer rotates."""
    logit_scale: str | None = None
    """Name of the config value by which logits are multiplied."""
    logit_divisor: str | None = None
    """The config's number that logits are divided by."""
    linear_attention: str | None = None
    """The linear attention of the layers that the config's `layer_types` calls so. Those layers have no softmax
    attention: they stay as they are."""
    text_of: tuple[str, ...] = ()
    """Model types of vision-language text parts that compute the same function without images."""

    def names(self) -> dict[str, str | tuple[str, ...] | None]:
        """The part names as a plain mapping, as the student's config stores them."""
        return {key: value for key, value in asdict(self).items() if key not in ("model_type", "text_of")}

    def softmax_layers(self, config: PreTrainedConfig) -> list[int]:
        """The layers that have softmax attention: those that can be converted."""
        return softmax_layers(config.num_hidden_layers, self.linear_attention, getattr(config, "layer_types", None))

    def attention_modules(self, model: PreTrainedModel) -> dict[int, nn.Module]:
        """Layer → its softmax attention module, of a loaded teacher."""
        layers = getattr(backbone(model), self.layers)
        return {i: getattr(layers[i], self.attention) for i in self.softmax_layers(model.config)}

    def check(self, model: PreTrainedModel) -> None:
        """Raise UserError unless every part exists under the name that this family gives."""
        inner = backbone(model)
        missing = [
            name for name in (self.layers, self.embeddings, self.final_norm, self.rotary) if not hasattr(inner, name)
        ]
        norms, softmax = (self.input_norm, self.mlp_norm, *self.other_norms), self.softmax_layers(model.config)
        for index, layer in enumerate(getattr(inner, self.layers, ())):
            mixes = self.attention if index in softmax else self.linear_attention
            parts = (mixes, *filter(None, norms), self.mlp)
            missing += [f"layer {index}: {name}" for name in parts if not hasattr(layer, name)]
            if index not in softmax:
                continue
            attention = getattr(layer, self.attention, None)
            projections = (self.qkv, self.o) if self.qkv else (self.q, self.k, self.v, self.o)
            flags = (name.removeprefix("not ") for name in self.rotates)
            expected = [*projections, *filter(None, (self.q_norm, self.k_norm)), *flags]
            missing += [f"layer {index}: {self.attention}.{name}" for name in expected if not hasattr(attention, name)]
        if missing:
            raise UserError(
                f"this model lacks what the family '{self.model_type}' expects: {', '.join(missing[:5])}; "
                "it is another architecture under this name, or a new transformers release moved the parts"
            )


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model below the language-model head. Raises UserError if there is none."""
    inner = getattr(model, "model", None)
    if not isinstance(inner, nn.Module):
        raise UserError(f"{type(model).__name__} has no backbone `model`; a causal language model is needed")
    return inner
