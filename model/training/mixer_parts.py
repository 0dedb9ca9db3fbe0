"""Parts of a mixer by the names of its parameters, which every variant keeps (rwkv7_variants §7.3, radlads §3.1)."""

from __future__ import annotations

_DECAY_BASE = ("w0", "time_decay")
_DECAY = (*_DECAY_BASE, "w1", "w2", "time_decay_w1", "time_decay_w2")
_TOKEN_SHIFT = ("x_", "time_maa_")


def is_decay_base(name: str) -> bool:
    """Whether a parameter is the decay's base, which holds before the token is looked at."""
    return name.rpartition(".")[2] in _DECAY_BASE


def mixer_parts(name: str) -> set[str]:
    """What a mixer's parameter belongs to: `mixer`, and `decay` or `token_shift`."""
    last = name.rpartition(".")[2]
    if last in _DECAY:
        return {"mixer", "decay"}
    return {"mixer", "token_shift"} if last.startswith(_TOKEN_SHIFT) else {"mixer"}
