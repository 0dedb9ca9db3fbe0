"""What makes Triton's interpreter and its compiler cheap to test with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

COMPILER = """
import json, os, sys, traceback
import radlads.kernels.shared.offline
for line in sys.stdin:
    code, log = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        try:
            exec(code)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], None]]:
    """compiler(code): run code that compiles kernels in a process of its own, whose imports are made once for all.

    Each piece of code runs in a fork: the offline compiler swaps Triton's driver for good. Triton's cache is a new one.
    """
    folder = tmp_path_factory.mktemp("compiler")
    process = subprocess.Popen(
        [sys.executable, "-c", COMPILER],
        env={**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    count = 0

    def run(code: str) -> None:
        nonlocal count
        count += 1
        log = folder / f"{count}.txt"
        print(json.dumps([code, str(log)]), file=process.stdin, flush=True)
        answer = process.stdout.readline().strip()
        assert answer == "0", (answer, log.read_text()[-4000:] if log.exists() else "the compiler ended")

    yield run
    process.stdin.close()
    process.wait()


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
