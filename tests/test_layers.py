"""Who may import whom (docs/architecture.md, section 1): packages compared with packages, from the syntax tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TORCH = {
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "triton",
    "tokenizers",
    "safetensors",
    "lm_eval",
    "accelerate",
}
CONTRACTS = "radlads.tasks.contracts"
LAUNCHERS = "radlads.tasks.launchers"
JOBS = "radlads.tasks.jobs"
# Package → what of radlads it may import, itself excepted.
ALLOWED = {
    "kernels": (),
    "model": ("radlads.kernels", f"{CONTRACTS}.errors"),
    "tasks/contracts": (),
    "tasks/launchers": (CONTRACTS,),
    "tasks/jobs": ("radlads.kernels", "radlads.model", CONTRACTS),
    "tasks": (CONTRACTS, LAUNCHERS),
    "flows": ("radlads.tasks", "radlads.deployments"),
}
# Modules of the control plane that know the orchestrator; nothing else under tasks/ does.
PREFECT = {"tasks/observe.py", "tasks/stage_tasks.py"}
MOST_FILES = 12


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, deferred imports included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def package_of(path: Path) -> str:
    """The longest key of ALLOWED that a file lies under."""
    name = path.relative_to(ROOT).as_posix()
    return max((package for package in ALLOWED if name.startswith(package + "/")), key=len)


@pytest.mark.parametrize("package", list(ALLOWED))
def test_a_package_imports_what_it_may(package: str) -> None:
    own = "radlads." + package.replace("/", ".")
    for path in sources(package):
        if package_of(path) != package:
            continue
        used = {name for name in imports(path) if within(name, "radlads")}
        wrong = {n for n in used if not within(n, own, *ALLOWED[package]) or (package == "tasks" and within(n, JOBS))}
        assert not wrong, (path.relative_to(ROOT), wrong)


def test_only_named_modules_of_the_control_plane_know_the_orchestrator() -> None:
    for path in sources("kernels", "model", "tasks"):
        knows = any(within(name, "prefect") for name in imports(path))
        assert not knows or path.relative_to(ROOT).as_posix() in PREFECT, path


def test_the_control_plane_never_imports_torch() -> None:
    for path in sources("flows", "tasks"):
        if package_of(path) != "tasks/jobs":
            assert not {name for name in imports(path) if within(name, *TORCH)}, path


def test_the_model_knows_no_orchestration() -> None:
    for path in sources("kernels", "model"):
        assert not {name for name in imports(path) if within(name, "mlflow", "deepspeed", "prefect")}, path


def test_no_cycles_between_modules() -> None:
    """Deferred imports count too, but for those under TYPE_CHECKING."""
    modules = {"radlads." + ".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sources("kernels", "model")}
    modules |= {"radlads." + ".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sources("tasks", "flows")}
    graph = {name: run_time_imports(path, set(modules)) - {name} for name, path in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def run_time_imports(path: Path, modules: set[str]) -> set[str]:
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in skipped:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in modules else node.module)
    return found & modules


@pytest.mark.parametrize("top", ["tasks", "model"])
def test_folders_stay_small(top: str) -> None:
    for folder in {path.parent for path in sources(top)}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= MOST_FILES, f"{folder.relative_to(ROOT)} holds {len(files)} files"


@pytest.mark.parametrize("module", ["radlads.flows.convert", "radlads.flows.cli"])
def test_importing_the_control_plane_leaves_torch_out(module: str) -> None:
    code = f"import sys, {module}; bad = sorted({TORCH!r} & set(sys.modules)); sys.exit(', '.join(bad) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
