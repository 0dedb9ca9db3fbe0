"""Who may import whom (docs/architecture.md, section 1), read from the syntax tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONTRACTS = {
    "credentials",
    "document",
    "files",
    "yaml_reader",
    "recipe",
    "chat_templates",
    "sections",
    "section_memory",
    "section_base",
    "section_choice",
    "section_losses",
    "section_training",
    "section_transplant",
    "job",
    "specs",
    "identity",
    "content",
    "places",
    "hub",
    "pins",
    "task_files",
    "store",
    "store_base",
    "store_local",
    "store_s3",
    "store_seal",
    "store_errors",
    "store_files",
    "store_names",
    "store_proof",
    "s3_probe",
    "s3_copy",
    "lease",
    "holder",
    "scratch_lock",
    "s3_client",
    "tracking",
    "metrics_record",
    "process_tree",
    "disk",
}
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


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, deferred imports included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def uses(path: Path, *packages: str) -> set[str]:
    return {n for n in imports(path) for p in packages if n == p or n.startswith(p + ".")}


def contract_files() -> list[Path]:
    return [path for path in sources("tasks") if path.parent.name == "tasks" and path.stem in CONTRACTS]


def control_plane_files() -> list[Path]:
    return [p for p in sources("tasks") if p.parent.name == "tasks"] + sources("flows")


def test_kernels_know_nothing_above_them() -> None:
    for path in sources("kernels"):
        assert not uses(path, "radlads.model", "radlads.tasks", "radlads.flows", "prefect", "mlflow"), path


def test_model_knows_kernels_and_contracts_only() -> None:
    for path in sources("model"):
        assert not uses(path, "radlads.flows", "radlads.tasks.jobs", "prefect", "mlflow", "deepspeed"), path
        allowed = {"radlads.tasks.job", "radlads.tasks.specs"}
        used = {n for n in uses(path, "radlads.tasks") if not any(n == a or n.startswith(a + ".") for a in allowed)}
        assert used <= {"radlads.tasks"}, (path, used)


def test_data_plane_never_imports_the_orchestrator() -> None:
    for path in sources("kernels", "model", "tasks/jobs"):
        assert not uses(path, "prefect", "radlads.flows"), path


def test_control_plane_never_imports_torch() -> None:
    for path in control_plane_files():
        assert not uses(path, *TORCH, "radlads.model", "radlads.kernels", "radlads.tasks.jobs"), path


def test_contracts_know_neither_plane() -> None:
    for path in contract_files():
        used = {n for n in uses(path, "radlads.tasks") if n.split(".")[2:3] and n.split(".")[2] not in CONTRACTS}
        assert not used, (path, used)
        assert not uses(path, "prefect"), path


def test_jobs_use_contracts_and_not_the_control_plane() -> None:
    for path in sources("tasks/jobs"):
        used = {n for n in uses(path, "radlads.tasks") if n.split(".")[2:3]}
        outside = {n for n in used if n.split(".")[2] not in CONTRACTS | {"jobs"}}
        assert not outside, (path, outside)


@pytest.mark.parametrize("module", ["radlads.flows.convert", "radlads.flows.cli"])
def test_importing_the_control_plane_leaves_torch_out(module: str) -> None:
    code = f"import sys, {module}; bad = sorted({TORCH!r} & set(sys.modules)); sys.exit(', '.join(bad) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
