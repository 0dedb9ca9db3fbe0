"""Keep rotary frequencies exact when a model is cast.

`module.bfloat16()` (which DeepSpeed calls) also rounds non-persistent buffers, and rotary frequencies rounded to 8 bits
are wrong by radians after a thousand tokens. `from_pretrained` keeps them in fp32, so training would differ from
the model that is loaded afterwards.
"""

from __future__ import annotations

from torch import Tensor, nn

Kept = list[tuple[nn.Module, str, Tensor]]


def remember_buffers(module: nn.Module) -> Kept:
    """Current values of the floating-point buffers that are not saved with the weights."""
    return [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if name in owner._non_persistent_buffers_set and buffer is not None and buffer.is_floating_point()
    ]


def restore_buffers(kept: Kept) -> None:
    """Restore the old values of every buffer whose dtype has changed, on its current device."""
    for owner, name, before in kept:
        now = owner._buffers[name]
        if now is not None and now.dtype != before.dtype and not before.is_meta:
            owner._buffers[name] = before.to(now.device)
