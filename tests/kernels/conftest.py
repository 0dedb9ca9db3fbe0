"""What makes Triton's interpreter and its compiler cheap to test with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for operands_cases


@pytest.fixture(scope="session")
def compiler(warm_python: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], None]:
    """compiler(code): run code that compiles kernels, in a process of its own: it swaps Triton's driver for good."""
    cache = str(tmp_path_factory.mktemp("compiled"))
    python = warm_python("radlads.kernels.shared.offline", TRITON_CACHE_DIR=cache)

    def run(code: str) -> None:
        python.run("-c", code)

    return run


@pytest.fixture
def interpret() -> Callable[[str], None]:
    """interpret(file): run a file of tests under Triton's interpreter, which a process has from its start or never."""

    def run(file: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(file))],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]

    return run


def pytest_configure() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        _patch_language_once()


def _patch_language_once() -> None:
    """Triton's interpreter replaces the functions of triton.language again at each call of a device function, which is
    half of its time; once, and for good, is the same in a process that interprets only."""
    import triton.language as tl
    from triton.runtime import interpreter

    if hasattr(interpreter, "_LangPatchScope"):
        kernel = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # has in sight all that kernels have
        interpreter._patch_lang(kernel)
        interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
