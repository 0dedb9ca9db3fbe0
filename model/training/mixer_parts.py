"""Parts of a mixer by the names of its parameters, as the variants declare them (`Mixer.PARTS`)."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch

from radlads.model.mixers.shared.registry import list_variants, mixer_class


def is_decay_base(name: str) -> bool:
    """Whether a parameter is the decay's base, the part that does not depend on the token."""
    return _is_part(name, "decay_base")


def mixer_parts(name: str) -> set[str]:
    """Parts that a mixer's parameter belongs to: `mixer`, and `decay` or `token_shift`."""
    return {"mixer", *(part for part in ("decay", "token_shift") if _is_part(name, part))}


def _is_part(name: str, part: str) -> bool:
    return any(fnmatchcase(word, pattern) for word in name.split(".") for pattern in _patterns(part))


@cache
def _patterns(part: str) -> tuple[str, ...]:
    return tuple(sorted({pattern for name in list_variants() for pattern in mixer_class(name).PARTS[part]}))


def has_part(variant: str, part: str) -> bool:
    """Whether mixers of a variant have `decay_base`, `decay` or `token_shift`."""
    return bool(mixer_class(variant).PARTS[part])


def has_log_decay(variant: str) -> bool:
    """Whether the log decay of a variant's recurrence may be rounded to 16 bits."""
    return hasattr(mixer_class(variant), "decay_dtype")


def round_log_decay(student: Any, dtype: torch.dtype) -> None:
    """Give the recurrences of a student their log decay in `dtype`, where its variant `has_log_decay`."""
    for mixer in student.mixers().values():
        if hasattr(mixer, "decay_dtype"):
            mixer.decay_dtype = dtype
