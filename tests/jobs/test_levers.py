"""benchmarks/levers.py: which runs there are, which are left, and a table that compares each with the baseline."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.recipe import load_recipe
from radlads.tasks.launchers.stopping import RunStopped

TABLES = """
tables:
  - name: pure
    recipe: one.yaml
    seeds: [1, 2]
    set: {align.tokens: 100}
    levers: [{name: baseline, set: {}}, {name: mse, set: {align.loss: mse}}]
  - name: variants
    recipe: one.yaml
    seeds: [1]
    levers: [{name: ours, same_as: pure/baseline}, {name: theirs, set: {student.variant: rwkv7}}]
"""


@pytest.fixture
def levers(project_root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(project_root / "benchmarks")
    spec = importlib.util.spec_from_file_location("levers_benchmark", project_root / "benchmarks" / "levers.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "levers_benchmark", module)  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tables(levers: ModuleType, tmp_path: Path) -> list[dict[str, Any]]:
    (tmp_path / "levers.yaml").write_text(TABLES)
    return levers.read_tables(tmp_path / "levers.yaml")


def test_every_lever_runs_with_the_first_seed_first(levers: ModuleType, tables: Any, tmp_path: Path) -> None:
    units = levers.make_units(tables, {"distill.tokens": 7})
    assert [unit.key for unit in units] == [
        "pure-baseline-seed1",
        "pure-mse-seed1",
        "variants-theirs-seed1",
        "pure-baseline-seed2",
        "pure-mse-seed2",
    ]
    assert units[1].recipe == str(tmp_path / "one.yaml")
    seeds = {"align.seed": 1, "distill.seed": 1}
    assert units[1].changes == {"align.tokens": 100, "align.loss": "mse", "distill.tokens": 7} | seeds


def test_the_table_has_differences_seed_by_seed(levers: ModuleType, tables: Any, tmp_path: Path) -> None:
    units = {unit.key: unit for unit in levers.make_units(tables, {})}
    results = levers.Results(tmp_path / "out.md", tables, "# Head")
    speed = {"stage speed": {"distill": 1234}, "seconds": 1}
    results.add(
        units["pure-baseline-seed1"], {"kl": 0.5, "student/needle/512": 0.25, "teacher/needle/512": 1.0} | speed
    )
    results.add(units["pure-baseline-seed2"], {"kl": 0.7} | speed)
    results.add(units["pure-mse-seed1"], {"kl": 0.4} | speed)
    results.add(units["pure-mse-seed2"], {"error": "no memory"})
    page = (tmp_path / "out.md").read_text()
    assert "| baseline | 0.6000 |" in page
    assert "| mse (failed: no memory) | 0.4000 (-0.1000) |" in page
    assert "The teacher: needle 512 1.000." in page
    assert "| ours | 0.5000 |" in page
    with pytest.raises(UserError, match=r"another levers\.py writes .*out\.json"):
        levers.Results(tmp_path / "out.md", tables, "# Head")
    results.close()
    again = levers.Results(tmp_path / "out.md", tables, "# Head")
    assert [key for key, unit in units.items() if not again.has(unit)] == ["variants-theirs-seed1", "pure-mse-seed2"]
    changed = levers.make_units(tables, {"distill.tokens": 7})
    assert not any(again.has(unit) for unit in changed), "of other sizes"


def test_a_file_with_a_mistake_is_refused(levers: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "levers.yaml"
    path.write_text(TABLES.replace("name: mse, set", "name: mse, sett"))
    with pytest.raises(UserError, match=r"pure: \['sett'\]"):
        levers.read_tables(path)
    path.write_text(TABLES.replace("name: mse", "name: baseline"))
    with pytest.raises(UserError, match="a lever has the name of another"):
        levers.read_tables(path)


def test_the_shipped_levers_are_valid_recipes(levers: ModuleType, project_root: Path) -> None:
    units = levers.make_units(levers.read_tables(project_root / "benchmarks" / "smollm2_levers.yaml"), {})
    for unit in units:
        recipe = load_recipe(unit.recipe, unit.changes)
        assert recipe.align.seed == recipe.distill.seed == unit.seed
    assert len({unit.key for unit in units}) == len(units)


def test_how_a_run_ends(levers: ModuleType, tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit, out = levers.make_units(tables, {})[0], tmp_path / "one.json"
    monkeypatch.setattr(levers.signal, "signal", lambda *_: None)
    monkeypatch.setattr(levers, "REQUEST", levers.REQUEST.__class__())

    def ends(result: Any) -> int:
        def convert(*_: Any) -> Any:
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(levers, "convert_recipe", convert)
        return levers.run_one(unit, tmp_path, out)

    assert ends(RunStopped("stopped in align")) == levers.STOPPED
    assert not out.exists(), "a stopped run has no result"
    assert ends(UserError("no\nmemory")) == 1
    assert json.loads(out.read_text()) == {"error": "no memory"}
    assert ends({"kl": 1.0}) == 0
    assert json.loads(out.read_text())["kl"] == 1.0


def test_time_ends_all_runs(levers: ModuleType, tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time; the runs that are asked to stop are neither results nor failures."""
    program = tmp_path / "run.py"
    program.write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "if 'mse' in sys.argv[2]: time.sleep(60)\n"
        'pathlib.Path(sys.argv[4]).write_text(\'{"kl": 1.0, "seconds": 1}\')\n'
    )
    monkeypatch.setattr(levers, "GRACE_SECONDS", 1.0)
    results = levers.Results(tmp_path / "out.md", tables, "# Head")
    units, began = levers.make_units(tables, {}), time.monotonic()
    command = [levers.sys.executable, str(program)]
    levers.run_units(list(units), results, ["cpu", "cpu"], command, tmp_path, began + 4)
    done = {unit.key for unit in units if results.has(unit)}
    assert done == {"pure-baseline-seed1", "variants-theirs-seed1", "pure-baseline-seed2"}
    assert not any("error" in run["numbers"] for run in results.runs.values())
    assert time.monotonic() - began < 30


def test_mistakes_of_convert_are_one_line(levers: ModuleType, project_root: Path, tmp_path: Path):
    script = str(project_root / "benchmarks" / "convert.py")
    for words, code, said in (
        (["smoke", "--set", "align"], 2, "write it as KEY=VALUE"),
        (["smokee"], 2, "smokee"),
        (["smoke", "smoke-pure", "--name", "x"], 2, "--name is for one recipe"),
    ):
        command = [sys.executable, script, *words, "--work", str(tmp_path / "work")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert said in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
