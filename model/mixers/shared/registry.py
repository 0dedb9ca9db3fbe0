"""The mixer architectures: one file of model/mixers each; the file name is the registry."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from radlads.model.mixers.shared.options import MixerOptions
from radlads.tasks.contracts.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from radlads.model.mixers.shared.mixer import Mixer

# Head widths that the kernels support.
_MIN_HEAD_DIM, _MAX_HEAD_DIM = 8, 256


def list_variants() -> list[str]:
    """Names of the existing mixer architectures."""
    package = importlib.import_module("radlads.model.mixers")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg)


def find_variant(name: str) -> ModuleType:
    """The module of a variant, with `Options` and `Mixer`. Raises UserError, listing the existing ones."""
    known = list_variants()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise UserError(f"no mixer variant named '{name}'{hint}; known: {', '.join(known)}")
    return importlib.import_module(f"radlads.model.mixers.{name}")


def mixer_class(name: str) -> type[Mixer]:
    """The nn.Module of a variant."""
    mixer: type[Mixer] = find_variant(name).Mixer
    return mixer


def validate_options(variant: str, options: Mapping[str, Any], config: PreTrainedConfig) -> MixerOptions:
    """The options with every default and derived size filled in, checked against the teacher's config; needs no GPU.

    Raises UserError: unknown variant, unknown or wrong option, head width that no kernel supports.
    """
    kind: type[MixerOptions] = find_variant(variant).Options
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not _MIN_HEAD_DIM <= head_dim <= _MAX_HEAD_DIM:
        raise UserError(f"the teacher's heads are {head_dim} wide, and mixers take {_MIN_HEAD_DIM} to {_MAX_HEAD_DIM}")
    return kind.parse(options, variant=variant).resolve(config.hidden_size, config.num_attention_heads * head_dim)
