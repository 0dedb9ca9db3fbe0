"""The versions of the code and of the packages that made a product."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from radlads.tasks.contracts.job import CodeVersion

_NAMED = ("radlads", "torch", "transformers", "deepspeed", "triton", "numpy", "safetensors", "datasets", "lm-eval")


@cache
def code_version() -> CodeVersion:
    """The project's git commit, if it runs from a checkout, and the versions of the relevant packages."""
    checkout = Path(__file__).resolve().parents[2]
    sha = _git(checkout, "rev-parse", "HEAD") if (checkout / ".git").exists() else None
    dirty = bool(sha and _git(checkout, "status", "--porcelain", "--untracked-files=no"))
    versions = {"python": platform.python_version()} | {name: found for name in _NAMED if (found := _version(name))}
    return CodeVersion(sha=sha, dirty=dirty, versions=versions)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
