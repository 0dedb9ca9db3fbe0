"""Install the releases of transformers that exports are tested with beside the locked one: the lowest and the newest.

`python tests/releases.py` fills `.venv-transformers/{lowest,newest}`; what a release needs in another version than the
environment has is put beside it. `make test` does this once.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv-transformers"
RELEASES = ("lowest", "newest")


def allowed() -> SpecifierSet:
    """The releases of transformers that the project allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = (Requirement(line) for line in project["project"]["dependencies"])
    return next(requirement.specifier for requirement in found if requirement.name == "transformers")


def lowest() -> str:
    """The lowest release allowed, with three parts."""
    bound = re.search(r">=([\d.]+)", str(allowed()))
    assert bound is not None, "pyproject.toml names no lowest release of transformers"
    return ".".join((*bound[1].split("."), "0", "0")[:3])


def install(release: str) -> None:
    """Fill one folder; one that is there stays as it is."""
    target, name = FOLDER / release, f"transformers=={lowest()}" if release == "lowest" else f"transformers{allowed()}"
    if not (target / "transformers" / "__init__.py").is_file():
        shutil.rmtree(target, ignore_errors=True)
        _pip(target, name)
    [found] = metadata.distributions(name="transformers", path=[str(target)])
    for line in found.requires or ():
        requirement = Requirement(line)
        if requirement.marker is None and not _satisfied(requirement, target):
            _pip(target, f"{requirement.name}{requirement.specifier}")


def _satisfied(requirement: Requirement, target: Path) -> bool:
    beside = list(metadata.distributions(name=requirement.name, path=[str(target), *sys.path]))
    return bool(beside) and requirement.specifier.contains(beside[0].version, prereleases=True)


def _pip(target: Path, requirement: str) -> None:
    options = ["--quiet", "--no-compile", "--no-deps", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, requirement], check=True)


if __name__ == "__main__":
    for each in RELEASES:
        install(each)
