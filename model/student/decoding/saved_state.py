"""A cache on disk and in pieces: what a model remembers of a text, saved as safetensors, copied, joined and divided.

A file holds the tensors of every layer under `<layer>.<name>`, and in its metadata how many tokens were read and
which model read them. An exported model carries this file.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from radlads.model.mixers.shared.mixer import MixerState

_FORMAT = "radlads cache 1"
_ATTENTION = ("keys", "values")


def save_cache(cache: Any, path: str | Path) -> Path:
    """Write a RadladsCache. Raises ValueError for one that has read nothing, or whose layers are of other kinds than
    mixers and full attention."""
    tensors = {
        f"{i}.{name}": tensor.detach().contiguous()
        for i, layer in enumerate(cache.layers)
        for name, tensor in _parts(layer, i).items()
    }
    if not tensors:
        raise ValueError("this cache has read no tokens: there is nothing to save")
    path = Path(path)
    written = {"format": _FORMAT, "tokens": str(cache.get_seq_length()), "model": fingerprint(cache.config)}
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, path, metadata=written)
    return path


def load_cache(cache: Any, path: str | Path, device: torch.device | str | None = None) -> Any:
    """Fill an empty RadladsCache from a file of `save_cache`. Raises ValueError, in one line, for a file that is none,
    or of another model."""
    try:
        file = safe_open(path, framework="pt", device=str(device or "cpu"))
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is no saved cache: {error}") from error
    with file:
        told = file.metadata() or {}
        if told.get("format") != _FORMAT:
            raise ValueError(f"{path} is no saved cache of this version (its format is {told.get('format')!r})")
        if told.get("model") != fingerprint(cache.config):
            raise ValueError(f"{path} was saved by another model: a state means nothing to a model of other layers")
        found: dict[int, dict[str, Tensor]] = {}
        for name in file.keys():  # noqa: SIM118 - no mapping
            layer, _, part = name.partition(".")
            found.setdefault(int(layer), {})[part] = file.get_tensor(name)
    tokens = int(told["tokens"])
    for i, layer in enumerate(cache.layers):
        parts = found.get(i, {})
        if hasattr(layer, "remember"):
            state = MixerState(*(parts.get(name) for name in MixerState._fields))
            layer.state, layer.num_seen, layer.is_initialized = state, tokens, True
        else:
            layer.lazy_initialization(parts["keys"], parts["values"])
            layer.keys, layer.values = parts["keys"], parts["values"]
    return cache


def copy_cache(cache: Any) -> Any:
    """A cache that goes its own way from here: nothing that either reads changes the other."""
    other = type(cache)(cache.config)
    for old, new in zip(cache.layers, other.layers, strict=True):
        if hasattr(old, "remember"):
            new.state = None if old.state is None else MixerState(*(_cloned(x) for x in old.state))
            new.num_seen, new.is_initialized, new.record_past = old.num_seen, old.is_initialized, old.record_past
        else:
            new.__dict__.update({name: _cloned(value) for name, value in old.__dict__.items() if name != "_held"})
    return other


def join_caches(caches: Sequence[Any]) -> Any:
    """One cache with the rows of all, in order. Rows that have read fewer tokens count as padded on the left: give an
    attention_mask with zeros there. Raises ValueError for caches of different models, or of layers that cannot be
    joined."""
    if not caches:
        raise ValueError("there is no cache to join")
    if len({fingerprint(cache.config) for cache in caches}) > 1:
        raise ValueError("caches of different models cannot be joined")
    longest = max(cache.get_seq_length() for cache in caches)
    joined = type(caches[0])(caches[0].config)
    for i, layer in enumerate(joined.layers):
        parts = [_parts(cache.layers[i], i) for cache in caches]
        if any(part.keys() != parts[0].keys() or not part for part in parts):
            raise ValueError("a cache that has read no tokens cannot be joined with others")
        if hasattr(layer, "remember"):
            rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            layer.state = MixerState(**rows)
            layer.num_seen, layer.is_initialized = longest, True
        else:
            keys, values = (torch.cat([_padded(part[name], longest) for part in parts]) for name in _ATTENTION)
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
    return joined


def select_rows(cache: Any, rows: Sequence[int], padding: int = 0) -> Any:
    """A cache with some rows, in this order, each of which goes on as it would have in the old one, which stays as it
    is. padding: so many tokens at the left are padding in all of these rows, and are left out. Raises ValueError as
    `join_caches`, and where there is no such row or not so much to leave out."""
    seen, total = cache.get_seq_length(), None
    if not rows or not 0 <= padding < max(1, seen):
        raise ValueError(f"cannot take {len(rows)} rows without {padding} of {seen} tokens")
    chosen = type(cache)(cache.config)
    for i, (old, new) in enumerate(zip(cache.layers, chosen.layers, strict=True)):
        parts = _parts(old, i)
        if not parts:
            raise ValueError("a cache that has read no tokens has no rows")
        if total is None:
            total = len(next(iter(parts.values())))
            if not all(0 <= row < total for row in rows):
                raise ValueError(f"there are {total} rows, which are counted from 0; {list(rows)} are asked for")
        index = torch.tensor(list(rows), device=next(iter(parts.values())).device)
        taken = {name: part.index_select(0, index) for name, part in parts.items()}
        if hasattr(new, "remember"):
            new.state, new.num_seen, new.is_initialized = MixerState(**taken), seen - padding, True
        else:
            keys, values = (taken[name][:, :, padding:] for name in _ATTENTION)
            new.lazy_initialization(keys, values)
            new.keys, new.values = keys, values
    return chosen


def fingerprint(config: Any) -> str:
    """What must be the same in two models for the state of one to fit the other: a digest of shapes and layers, not of
    weights."""
    told = {
        "variant": config.variant,
        "options": config.options,
        "constants": config.constants,
        "attention_layers": list(config.attention_layers),
        "attention_rope": config.attention_rope,
        "sizes": [getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size")],
        "heads": [getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads", "head_dim")],
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _parts(layer: Any, index: int) -> dict[str, Tensor]:
    """The tensors of a layer by name; empty where it has read nothing."""
    if hasattr(layer, "remember"):
        return {} if layer.state is None else {n: x for n, x in layer.state._asdict().items() if x is not None}
    if getattr(layer, "sliding_window", None) is not None or not hasattr(layer, "keys"):
        raise ValueError(
            f"layer {index} of this model has a window or is linear attention of the teacher's own: its memory can be "
            "neither saved nor joined"
        )
    return {} if not layer.is_initialized else dict(zip(_ATTENTION, (layer.keys, layer.values), strict=True))


def _padded(x_BHTK: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(x_BHTK, (0, 0, length - x_BHTK.shape[-2], 0))


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return {key: _cloned(one) for key, one in value.items()} if isinstance(value, dict) else copy.copy(value)
