"""The releases of transformers that run this model's code; an exported model carries this file and checks at load."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import transformers

TESTED = ("5.17.0", "5.24.0")
"""The lowest release that works, and the highest tested one."""
CACHE_NAMES = ("cache", "past_key_values")
"""Names of the cache keyword: from 5.24 on, and before."""


def check_release(version: str) -> None:
    """Raise ImportError, in one line, for a release that is too old, or of another major version."""
    found, lowest = _numbers(version), _numbers(TESTED[0])
    if found < lowest or found[0] > lowest[0]:
        raise ImportError(
            f"this model needs transformers {TESTED[0]} or newer, below {lowest[0] + 1} (tested up to {TESTED[1]}); "
            f"{version} is installed: pip install 'transformers>={TESTED[0]},<{lowest[0] + 1}'"
        )


def cache_keyword(model: Any) -> str:
    """The keyword by which this release passes a cache to a model's forward."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[0])


def check_calls(backbone: Any, layer: Any, attention: Any) -> None:
    """Raise ImportError, in one line, if this release calls a family's parts differently than mixers need.

    Keywords must be passed from the model to attention, and the cache under one name from generate() to attention.
    """
    cache, faults = cache_keyword(backbone), []
    generate = transformers.GenerationMixin.prepare_inputs_for_generation
    required: Iterable[tuple[str, Any, tuple[str, ...]]] = (
        (type(backbone).__name__, backbone.forward, (cache, "position_ids", "use_cache")),
        (type(layer).__name__, layer.forward, (cache,)),
        (type(attention).__name__, attention.forward, (cache, "position_embeddings")),
        ("generate", generate, (cache,)),
    )
    for owner, function, names in required:
        parameters = inspect.signature(function).parameters
        faults += [f"{owner} takes no '{name}'" for name in names if name not in parameters]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            faults.append(f"{owner} passes no keywords on")
    if faults:
        raise ImportError(
            f"this model cannot run under transformers {transformers.__version__}: {'; '.join(faults)}; it was tested "
            f"with {TESTED[0]} to {TESTED[1]}"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
