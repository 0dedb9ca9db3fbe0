"""Import DeepSpeed without side effects that take seconds or need a compiler and are not used here."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch


def import_deepspeed() -> ModuleType:
    """The `deepspeed` module, quiet. The first call takes about half a second beyond torch's own import."""
    with _without("mlflow"), _without_compilation():
        deepspeed = importlib.import_module("deepspeed")
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On a CPU, DeepSpeed would compile a shared-memory all-reduce on first use (a minute, and a compiler that may not
    # be there); gloo does the same work. As an attribute, `deepspeed.comm.torch` is another module: look it up by name.
    importlib.import_module("deepspeed.comm.torch")
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    return deepspeed


@contextmanager
def _without(module: str) -> Iterator[None]:
    """Make the import of a module fail: DeepSpeed's autotuner imports MLflow if installed, which takes a second."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


@contextmanager
def _without_compilation() -> Iterator[None]:
    """torch.compile does nothing: DeepSpeed applies it to an unused optimizer, which loads inductor."""
    original = torch.compile

    def unchanged(function: Callable[..., Any] | None = None, **_: Any) -> Any:
        return function if function is not None else (lambda wrapped: wrapped)

    torch.compile = unchanged  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original
