"""The package map of pyproject.toml says what is on the disk."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Folders of deployments/ that build or send the checkout itself, and are of no use without it.
OF_A_CHECKOUT = {"containers", "sky"}
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_folder_with_code_is_listed_and_no_other() -> None:
    listed = set(SETUP["tool"]["setuptools"]["packages"])
    folders = {
        path.parent.relative_to(ROOT)
        for top in ("flows", "tasks", "model", "kernels", "deployments")
        for path in (ROOT / top).rglob("*.py")
    }
    assert listed == {"radlads." + ".".join(folder.parts) for folder in folders}


def test_every_package_has_an_init_and_the_namespace_has_none() -> None:
    for name in SETUP["tool"]["setuptools"]["packages"]:
        assert (ROOT.joinpath(*name.split(".")[1:]) / "__init__.py").is_file(), name
    assert not (ROOT / "__init__.py").exists()


def test_nothing_is_installed_under_a_global_name(tmp_path: Path) -> None:
    code = "import importlib.util, sys; sys.exit(any(importlib.util.find_spec(n) for n in ('kernels', 'tasks')))"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, check=False)
    assert done.returncode == 0


def test_package_data_exists() -> None:
    for package, patterns in SETUP["tool"]["setuptools"]["package-data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        for pattern in patterns:
            assert list(folder.glob(pattern)), (package, pattern)


def test_recipes_and_chat_templates_are_package_data() -> None:
    patterns = SETUP["tool"]["setuptools"]["package-data"]["radlads.deployments"]
    listed = {path for pattern in patterns for path in (ROOT / "deployments").glob(pattern)}
    ends = ("*.yaml", "*.jinja", "pools/*.json")
    found = {path for end in ends for path in (ROOT / "deployments").rglob(end)}
    assert listed == {path for path in found if path.parent.name not in OF_A_CHECKOUT}
    assert {path.parent.name for path in found} >= OF_A_CHECKOUT


def test_every_direct_dependency_is_pinned() -> None:
    pinned = {
        line.split("==")[0].strip().lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    wanted = sum(SETUP["project"]["optional-dependencies"].values(), SETUP["project"]["dependencies"])
    for requirement in wanted:
        name = requirement.split(";")[0].split("[")[0]
        for mark in "<>=!~ ":
            name = name.split(mark)[0]
        assert name.lower().replace("_", "-") in pinned, requirement


def test_constraints_name_no_host_and_no_local_path() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in text
    assert " @ " not in text
    assert "+cpu" not in text
