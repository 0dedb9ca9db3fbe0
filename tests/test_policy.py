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
    "tasks/launchers/terminal.py",
    "tasks/launchers/remote/agent.py",
    "tasks/launchers/remote/follow.py",
    "tasks/launchers/remote/hosts.py",
    "tasks/launchers/remote/node.py",
    "tasks/launchers/remote/slurm.py",
    "tasks/contracts/settings.py",
    "tasks/launchers/supervise.py",
    "flows/serve.py",  # sets what Prefect and MLflow read on import
    "flows/services.py",
    "flows/cli/report.py",  # whether there is a desktop
    "tasks/look/doctor/machine.py",  # what is set wrongly
    "tasks/look/doctor/places.py",
    "tasks/jobs/common.py",
    "tasks/jobs/process_group.py",
    "tasks/jobs/train/engines/ranks.py",
}
# Every mixer variant has these two; a class of any other name has one meaning in the whole tree.
OF_EVERY_VARIANT = {"Mixer", "Options"}
FOUND_BY_FILE_NAME = ("model/mixers",)
# Modules that no program of the product imports, each with what it is for.
FOR_TESTS = {
    "kernels/mixer_ops/reference.py": "the equations, which every form is compared with",
    "kernels/shared/offline.py": "compiles every kernel for GPUs that are not there",
    "deployments/twins.py": "writes the tiny recipes that tests run",
    "deployments/demo/make_corpus.py": "wrote the shipped corpus",
}
MAX_LINES = 320
LONG_FILES = {"kernels": 450}


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


def test_the_reading_order_counts_the_lines_that_there_are() -> None:
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d+ \| `([^`]+)` \| (\d+) \|", page, re.MULTILINE)
    actual = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name, _ in rows}
    assert len(rows) == 13
    drift = {name: (int(said), actual[name]) for name, said in rows if abs(int(said) - actual[name]) > 15}
    assert drift == {}, "written, actual: write the lines anew, and their total"
    total = re.search(r"\*\*total\*\* \| \*\*([\d,]+)\*\*", page)
    assert total is not None
    assert int(total[1].replace(",", "")) == sum(int(said) for _, said in rows)


def test_a_class_name_has_one_meaning() -> None:
    places: dict[str, list[str]] = {}
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name not in OF_EVERY_VARIANT:
                places.setdefault(node.name, []).append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_every_module_is_reached() -> None:
    """By an import, or by its name in a string (programs, forms of an operator, entry points), from another file."""
    scripts = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "prefect.yaml"))
    mentioned = {path: _mentioned(path) for path in python_files()}
    unreached = set()
    for path in python_files():
        name = path.relative_to(ROOT)
        if path.name in ("__init__.py", "__main__.py") or name.parent.as_posix() in FOUND_BY_FILE_NAME:
            continue
        dotted = "radlads." + ".".join(name.with_suffix("").parts)
        endings = {dotted, dotted.removeprefix("radlads.tasks.jobs."), f".{path.stem}"}
        if path.stem.endswith("_op"):  # the form of an operator for GPUs: `Forms` names what it needs
            endings.add(path.stem.removesuffix("_op"))
        others = (words for place, words in mentioned.items() if place != path)
        if dotted not in scripts and not any(endings & words for words in others):
            unreached.add(name.as_posix())
    assert unreached == FOR_TESTS.keys()


def _mentioned(path: Path) -> set[str]:
    """Dotted names that a file imports, and its strings."""
    words: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            words |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            words |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words.add(node.value)
    return words


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
