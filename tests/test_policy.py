"""House rules that the linter does not know; it has those on prints, dead code and broad excepts."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("flows", "tasks", "model", "kernels", "deployments")
# Files that may read the environment: where settings enter, and the rank variables that the DeepSpeed launcher sets.
READS_ENVIRONMENT = {
    "tasks/launchers/local.py",
    "tasks/launchers/program.py",
    "tasks/contracts/settings.py",
    "tasks/launchers/supervise.py",
    "flows/services.py",
    "tasks/jobs/common.py",
    "tasks/jobs/process_group.py",
}
MAX_LINES = 320
LONG_FILES = {"kernels": 450, "tasks/contracts/recipe/sections.py": 400, "tasks/contracts/store/s3/store.py": 330}


def python_files() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def test_environment_is_read_only_where_settings_enter() -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in python_files()
        if re.search(r"\bos\.environ\b|\bgetenv\b", path.read_text(encoding="utf-8"))
    }
    assert found <= READS_ENVIRONMENT


def test_files_stay_short() -> None:
    for path in python_files():
        name = path.relative_to(ROOT)
        limit = LONG_FILES.get(name.as_posix(), LONG_FILES.get(name.parts[0], MAX_LINES))
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= limit, f"{name} has {lines} lines; split it by concept"


def test_weights_are_never_loaded_leniently_nor_unpickled() -> None:
    banned = {"load": "torch", "loads": "pickle"}
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            for keyword in node.keywords:
                lenient = (
                    keyword.arg == "strict" and isinstance(keyword.value, ast.Constant) and not keyword.value.value
                )
                loads_state = isinstance(node.func, ast.Attribute) and node.func.attr == "load_state_dict"
                assert not (lenient and loads_state), f"{path}:{node.lineno} loads weights with strict=False"
            if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                assert banned.get(node.func.attr) != node.func.value.id, f"{path}:{node.lineno} unpickles"


def test_nothing_large_is_tracked() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        return
    sizes = [(ROOT / name).stat().st_size for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert sum(sizes) < 16 << 20
