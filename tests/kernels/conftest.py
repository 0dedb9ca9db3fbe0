"""What makes Triton's interpreter and its compiler cheap to test with."""

from __future__ import annotations

import os
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


@pytest.fixture(scope="session")
def interpret(warm_python: Callable[..., Any]) -> Callable[..., None]:
    """interpret(file, *arguments of pytest): run a file of tests under Triton's interpreter, which a process has from
    its start or never."""
    modules = ("pytest", "numpy.testing", "triton.language", "radlads.kernels.shared.testing")
    python = warm_python(*modules, TRITON_INTERPRET="1")

    def run(file: str, *arguments: str) -> None:
        path = str(Path(__file__).with_name(file))
        python.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", path, *arguments, cwd=Path.cwd())

    return run


def pytest_configure() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        _make_the_interpreter_fast()


def _make_the_interpreter_fast() -> None:
    """Triton's interpreter replaces the functions of triton.language again at each call of a device function, which is
    half of its time; once, and for good, is the same in a process that interprets only. Of the rest it takes a quarter
    to write down, for each array, the table of numpy's types; the answer for a type is always the same."""
    import triton.language as tl
    from triton.runtime import interpreter

    if hasattr(interpreter, "_LangPatchScope"):
        kernel = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # has in sight all that kernels have
        interpreter._patch_lang(kernel)
        interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
    if hasattr(interpreter, "_get_np_dtype"):
        of_type, known = interpreter._get_np_dtype, {}
        interpreter._get_np_dtype = lambda tt: known.get(tt.name) or known.setdefault(tt.name, of_type(tt))
