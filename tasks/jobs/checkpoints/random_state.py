"""Saves and restores the random generators of a process as one tensor, without pickle."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PYTHON_WORDS = 625  # 624 words of the Mersenne twister and the position
_NUMPY_WORDS = 624


def seed_everything(seed: int) -> None:
    """Seed torch (CPU and GPU), numpy and python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def read_random_state() -> Tensor:
    """The generator states of this process, [bytes] uint8. The length depends on the device type only."""
    _, words, spare = random.getstate()
    twister: Any = np.random.get_state(legacy=True)
    _, keys, position, has_gauss, gauss = twister
    integers = np.concatenate([np.asarray(words, dtype="<u8"), keys.astype("<u8"), [position, has_gauss]]).astype("<u8")
    floats = np.asarray([np.nan if spare is None else spare, gauss], dtype="<f8")
    parts = [torch.from_numpy(np.frombuffer(integers.tobytes() + floats.tobytes(), dtype=np.uint8).copy())]
    parts.append(torch.get_rng_state())
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_rng_state())
    return torch.cat(parts)


def write_random_state(state: Tensor) -> None:
    """Restore a state of read_random_state. The GPU part is ignored without a GPU, and optional with one."""
    data = state.numpy().tobytes()
    num_integers = _PYTHON_WORDS + _NUMPY_WORDS + 2
    integers = np.frombuffer(data, dtype="<u8", count=num_integers)
    floats = np.frombuffer(data, dtype="<f8", count=2, offset=num_integers * 8)
    words, rest = integers[:_PYTHON_WORDS], integers[_PYTHON_WORDS:]
    random.setstate((3, tuple(int(word) for word in words), None if np.isnan(floats[0]) else float(floats[0])))
    keys = rest[:_NUMPY_WORDS].astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(rest[-2]), int(rest[-1]), float(floats[1])))
    start = num_integers * 8 + 16
    length = torch.get_rng_state().numel()
    torch.set_rng_state(state[start : start + length].clone())
    if torch.cuda.is_available() and state.numel() > start + length:
        torch.cuda.set_rng_state(state[start + length :].clone())
