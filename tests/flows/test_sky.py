"""deployments/sky: tasks that rent machines. SkyPilot itself parses them where it is installed; their scripts run in a
shell with a stand-in for `radlads`."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from test_doc_blocks import check_radlads

from radlads.tasks.contracts.recipe.recipe import list_recipes, load_recipe

ROOT = Path(__file__).resolve().parent.parent.parent
TASKS = sorted((ROOT / "deployments" / "sky").glob("*.yaml"))
ONE, SEVERAL = (ROOT / "deployments" / "sky" / name for name in ("convert.yaml", "convert-nodes.yaml"))
GIVEN = {"RUN": "first", "RADLADS_STORE": "s3://bucket/radlads"}
NODES = {"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
STAND_IN = '#!/bin/bash\nprintf "%s" radlads\nprintf " %q" "$@"\necho\n'
every = pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)


def task(path):
    return yaml.safe_load(path.read_text())


def shell(path, tmp_path, **more):
    """The task's script as the machine runs it, and the commands of radlads that it came to."""
    programs = tmp_path / "radlads-env" / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    (programs / "radlads").write_text(STAND_IN)
    (programs / "radlads").chmod(0o755)
    (programs / "activate").write_text(f"PATH={programs}:$PATH\n")
    asked = {name: value or "" for part in ("envs", "secrets") for name, value in task(path)[part].items()}
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | asked | GIVEN | NODES | more
    done = subprocess.run(["bash", "-c", task(path)["run"]], env=env, capture_output=True, text=True, check=False)
    return done, [shlex.split(line)[1:] for line in done.stdout.splitlines() if line.startswith("radlads ")]


@every
def test_a_machine_that_is_taken_away_is_replaced(path):
    asked = task(path)["resources"]
    assert [one["use_spot"] for one in asked["ordered"]] == [True, False]
    assert len({one["accelerators"] for one in asked["ordered"]}) == 1
    recovery = asked["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [143], "SIGTERM: the checkpoint is saved"
    assert recovery["max_restarts_on_errors"] == 1, "an error that a retry cannot mend costs little"


@every
def test_variables_are_read_and_secrets_are_the_callers(path):
    made = task(path)
    code = "".join(one.read_text() for one in (ROOT / "tasks").rglob("*.py"))
    for name in made["envs"]:
        assert f"${name}" in made["run"] or f'"{name}"' in code, name
    assert {name: value for name, value in made["envs"].items() if value is None}.keys() == GIVEN.keys()
    assert made["secrets"] == {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None, "HF_TOKEN": ""}
    assert made["envs"]["RECIPE"] in list_recipes()
    assert made["workdir"] == "."
    assert not re.search(r"://(?!\*|bucket)", path.read_text()), "no host"


@every
def test_the_installation_is_the_tested_one(path):
    setup = task(path)["setup"]
    [install] = [line for line in setup.splitlines() if "uv pip install" in line]
    assert "--constraint constraints.txt" in install
    assert "gcc" in setup, "Triton compiles at run time"
    assert setup == task(ONE)["setup"] or path != SEVERAL or "uv venv" in setup
    assert subprocess.run(["bash", "-n", "-c", setup], check=False).returncode == 0


@every
def test_the_script_runs_the_recipe_under_the_name(path, tmp_path):
    done, [doctor, run] = shell(path, tmp_path)
    assert done.returncode == 0, done.stderr
    for words in (doctor, run):
        check_radlads(words)
    assert doctor == ["doctor", "--no-kernels"]
    assert run[:4] == ["run", task(path)["envs"]["RECIPE"], "--run", "first"]


def test_of_several_machines_the_first_runs_the_pipeline(tmp_path):
    _, [_, run] = shell(SEVERAL, tmp_path)
    changes = dict(word.split("=", 1) for before, word in pairwise(run) if before == "--set")
    changes = {key: yaml.safe_load(value) for key, value in changes.items()}
    made = load_recipe(run[1], changes).resources
    assert made.launcher == "hosts"
    assert changes["resources.hosts"] == ["10.0.0.1 slots=8", "10.0.0.2 slots=8"]
    assert made.gpu_memory_gib == 139
    done, commands = shell(SEVERAL, tmp_path, SKYPILOT_NODE_RANK="1")
    assert (done.returncode, commands) == (0, [])


@every
@pytest.mark.parametrize("store", ["", "/scratch/store"])
def test_a_store_on_the_machine_is_refused(path, store, tmp_path):
    done, commands = shell(path, tmp_path, RADLADS_STORE=store)
    assert (done.returncode, commands) == (2, [])
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: RADLADS_STORE is '{store}'")


@every
def test_a_fault_that_doctor_finds_ends_the_job_before_it_costs(path, tmp_path):
    shell(path, tmp_path)
    (tmp_path / "radlads-env" / "bin" / "activate").write_text("radlads() { return 1; }\n")
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "RECIPE": "smoke", **GIVEN, **NODES}
    done = subprocess.run(["bash", "-c", task(path)["run"]], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1


@every
@pytest.mark.slow
def test_skypilot_takes_the_task(path, tmp_path):
    """In a process of its own: SkyPilot keeps a database in the home folder."""
    code = f"""
import json, yaml
import sky
given = yaml.safe_load(open({str(path)!r}))
given["envs"].update({GIVEN!r})
given["secrets"].update(AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b")
task = sky.Task.from_yaml_config(given)
print(json.dumps([[one.use_spot, one.accelerators, one.job_recovery] for one in task.resources]))
"""
    python = os.environ.get("SKY_PYTHON", sys.executable)
    if subprocess.run([python, "-P", "-c", "import sky"], capture_output=True, check=False).returncode:
        pytest.skip("SkyPilot is not installed (PyPI: skypilot; SKY_PYTHON names the Python that has it)")
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    done = subprocess.run(
        [python, "-P", "-c", code], env=env, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    spot, on_demand = yaml.safe_load(done.stdout.splitlines()[-1])
    assert (spot[0], on_demand[0]) == (True, False)
    assert spot[1] == on_demand[1]
    assert list(spot[1].values()) == [8]
    assert spot[2] == task(path)["resources"]["job_recovery"]
