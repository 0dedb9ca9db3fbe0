"""Every block of commands, Python and YAML in README.md and docs/ is run, or at least parsed against what there is.

A block of bash is run, against a store with the runs `first`, `second` and `my-run`, unless a comment stands before it:
`<!-- not run: why -->`. Then its commands are parsed: options of radlads, names of recipes and their keys, targets of
the Makefile, files and options of benchmarks, modules, extras. docs/serving.md's Python is run in tests/model.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pytest
from composed import project, stages
from pydantic import TypeAdapter, ValidationError
from typer.main import get_command
from typer.testing import CliRunner

from radlads.flows import cli
from radlads.tasks.contracts.parsing.yaml_reader import parse_yaml
from radlads.tasks.contracts.recipe.recipe import list_recipes, load_recipe, parse_recipe
from radlads.tasks.contracts.recipe.sections import Recipe, Source
from radlads.tasks.graph import convert
from radlads.tasks.pipeline import open_pipeline
from radlads.tasks.plain_runner import PlainRunner

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md"))]
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
RUNS = ("first", "second", "my-run")
# What a shell or the system has; nothing of them is ours to check.
OTHERS = {
    "curl",
    "export",
    "git",
    "test",
    "prefect",
    "pip",
    "eval",
    ".",
    "python3",
    "python",
    "cd",
    "umask",
    "sed",
    "sky",
    "llama-cli",
    "wandb",
}
FENCE = re.compile(
    r"^(?P<indent> *)(?:<!-- not run: (?P<why>[^>]+) -->\n *)?```(?P<kind>\w+)\n(?P<text>.*?)^ *```$", re.M | re.S
)
# What a shell, a library or the page itself says.
OF_OTHERS = {
    "radlads: command not found",
    "We couldn't connect to 'https://huggingface.co",
    "trust_remote_code",
}
SUPPOSED = {"my-hybrid.yaml"}
"""Recipes of the reader's own."""


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    kind: str
    text: str
    why: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(*kinds: str) -> list[Block]:
    return [block for page in PAGES for block in _blocks(page) if block.kind in kinds]


def _blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        lines = [line.removeprefix(found["indent"]) for line in found["text"].splitlines()]
        number = text[: found.start("text")].count("\n") + 1
        yield Block(page.relative_to(ROOT).as_posix(), number, found["kind"], "\n".join(lines), found["why"])


def commands_of(text: str) -> list[list[str]]:
    """The simple commands of a block of bash, without variables set before them."""
    found: list[list[str]] = []
    for line in _whole_lines(text):
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;"):
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                found += [words] if words else []
                words = []
            else:
                words.append(word)
    return found


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, with those that go on in the next one: after a backslash, or within quotes."""
    begun = ""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        begun += line
        try:
            shlex.split(begun, comments=True)
        except ValueError:
            begun += "\n"
        else:
            yield begun
            begun = ""
    assert not begun, begun


def check_radlads(words: list[str]) -> None:
    """Raises for an option that does not exist, an argument too many, a recipe or one of its keys that is not there."""
    command, context = get_command(cli.app), None
    while isinstance(command, click.Group):
        context = click.Context(command, info_name=command.name, parent=context)
        name, command, words = command.resolve_command(context, words)
        assert command is not None, name
    params = command.make_context(command.name, list(words), parent=context).params
    recipe = params.get("recipe")
    if recipe and recipe not in SUPPOSED:
        assert recipe in list_recipes(), f"no recipe {recipe}"
        changes = cli.parse_overrides(params.get("overrides"))
        load_recipe(recipe, changes)


def check_command(words: list[str]) -> None:
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "radlads":
        check_radlads(rest)
    elif program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
        assert {word for word in rest if "=" not in word} <= targets, words
    elif program == "python" and rest and rest[0] == "-m":
        assert find_spec(rest[1]) is not None, words
        if rest[1] == "pip":
            check_packages(rest)
        if rest[1] == "pytest":
            assert all((ROOT / word).exists() for word in rest if word.startswith("tests")), words
    elif program == "python" and rest and rest[0].endswith(".py"):
        check_script(rest)
    elif program == "docker":
        check_docker(rest)
    elif program == "eval":
        check_command(shlex.split(rest[0].removeprefix("$(").removesuffix(")")))
    else:
        assert program in OTHERS, f"{program}: name it in OTHERS, if it is not ours"
        if program == "pip":
            check_packages(rest)


def check_docker(words: list[str]) -> None:
    """Targets, services, profiles and tags are those of deployments/containers; what they run is checked too."""
    services, version = project()["services"], f"radlads:{SETUP['project']['version']}-"
    text = " ".join(words)
    assert set(re.findall(r"--target (\S+)", text)) <= stages().keys(), words
    profiles = {profile for service in services.values() for profile in service.get("profiles", [])}
    assert set(re.findall(r"--profile (\S+)", text)) <= profiles, words
    for tag in re.findall(r"radlads:\d\S+", text):
        assert tag.startswith(version), words
        assert tag.removeprefix(version) in stages(), words
    if "exec" in words:
        rest = words[words.index("exec") + 1 :]
        assert rest[0] in services, words
        check_command(rest[1:])
    if words[0] == "run":
        check_radlads(words[[word.startswith(version) for word in words].index(True) + 1 :])


def check_packages(words: list[str]) -> None:
    extras = SETUP["project"]["optional-dependencies"]
    for found in re.findall(r"radlads\[([\w,]+)\]", " ".join(words)):
        assert set(found.split(",")) <= set(extras), words


def check_script(words: list[str]) -> None:
    script = ROOT / words[0]
    assert script.is_file(), words
    code = "".join(path.read_text() for path in (script, *script.parent.rglob("*_bench/*.py")))
    for word in words[1:]:
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in code, f"{words[0]} has no option {word}"


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_the_commands_exist(block: Block) -> None:
    commands = commands_of(block.text)
    assert commands
    for words in commands:
        check_command(words)


def test_what_can_be_run_runs(jobs: Any, recipe: str, places: dict[str, str], tmp_path: Path, monkeypatch: Any) -> None:
    for run in RUNS:
        with open_pipeline(recipe, run=run, run_id="x", **places) as pipeline:
            convert(pipeline.recipe, PlainRunner(pipeline))
    env = {"RADLADS_STORE": places["store"], "RADLADS_WORK": places["work"], "RADLADS_TRACKING": "none"}
    monkeypatch.chdir(tmp_path)
    ran = 0
    for block in blocks("bash"):
        if block.why is not None:
            continue
        for words in commands_of(block.text):
            assert words[0] == "radlads", f"{block}: say why it is not run, <!-- not run: why -->"
            done = CliRunner().invoke(cli.app, words[1:], env=env)
            # A machine that runs tests may lack something, and `doctor` then says so.
            allowed = (0, 1) if words[1] == "doctor" else (0,)
            assert done.exit_code in allowed, (str(block), words, done.output[-2000:], done.exception)
            ran += 1
    assert ran >= 12


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_is_python(block: Block) -> None:
    ast.parse(re.sub(r"^ +", "", block.text, count=1) if block.why else block.text)
    assert block.why or block.page == "docs/serving.md", "run it in a test, or say why it is not run"


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_has_keys_that_exist(block: Block) -> None:
    values = parse_yaml(block.text, where=str(block))
    if isinstance(values, list):
        values = {"data": {"some": {"sources": values}}}
    if "name" in values:
        parse_recipe(values)
        return
    for key, value in values.items():
        assert key in Recipe.model_fields, key
        faults = _faults(TypeAdapter(Recipe.model_fields[key].annotation), value)
        assert faults == [], faults


def _faults(adapter: TypeAdapter[Any], value: Any) -> list[str]:
    """What is wrong with a part of a recipe, but for what is left out of it."""
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        return [f"{fault['loc']}: {fault['msg']}" for fault in error.errors() if fault["type"] != "missing"]
    return []


def test_a_fault_in_a_part_of_a_recipe_is_found() -> None:
    assert _faults(TypeAdapter(Source), {"kind": "files", "path": ["x"]})
    assert not _faults(TypeAdapter(Source), {"kind": "recall"})


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_lines_are_json(block: Block) -> None:
    for line in block.text.splitlines():
        json.loads(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_sentences_exist(page: Path) -> None:
    names = set(get_command(cli.app).commands)  # type: ignore[attr-defined]
    for said in re.findall(r"`radlads (?!needs )([a-z][a-z-]*)", page.read_text(encoding="utf-8")):
        assert said in names, said
    for said in re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8")):
        check_command(["make", said])


def test_commands_before_their_output_exist() -> None:
    """Plain blocks: a command after `$ ` with what it printed; a block of commands alone says that it is bash."""
    found = 0
    for page in PAGES:
        for block in re.findall(r"^```\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
            assert not block.startswith(("radlads ", "make ", "python ")), f"{page.name}: begin this block with ```bash"
            for typed in re.findall(r"^\$ radlads (.*)$", block, re.M):
                check_radlads(shlex.split(typed))
                found += 1
    assert found >= 5


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


def test_messages_of_the_page_of_troubles_are_those_of_the_code() -> None:
    """All pieces between `…` of the messages in the first columns."""
    code = "\n".join(_texts(path) for top in ("tasks", "flows", "model") for path in (ROOT / top).rglob("*.py"))
    code += (ROOT / "Makefile").read_text()
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    told = [said for row in re.findall(r"^\| (`.*?) \|", page, re.M) for said in re.findall(r"`([^`]+)`", row)]
    pieces = {piece.strip(" .:,;'()") for said in told for piece in said.split("…")}
    assert len(told) > 50
    lost = {piece for piece in pieces if len(piece) > 4 and piece not in code and piece not in OF_OTHERS}
    assert lost == set()


def _texts(path: Path) -> str:
    """All texts of a module, those of f-strings with `…` for their values."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
    return "\n".join(found)


def test_the_picture_is_drawn_from_the_measured_rows() -> None:
    code = (ROOT / "benchmarks" / "decoding_picture.py").read_text(encoding="utf-8")
    names: dict[str, Any] = {"__file__": str(ROOT / "benchmarks" / "decoding_picture.py"), "__name__": "picture"}
    exec(compile(code, "decoding_picture.py", "exec"), names)
    drawn = names["draw"](names["ratios"](names["RESULTS"].read_text(encoding="utf-8")))
    assert drawn == names["PICTURE"].read_text(encoding="utf-8"), "run python benchmarks/decoding_picture.py"
    assert "16.5 ×" in drawn
    assert len(drawn) < 6000


def test_costs_of_the_readme_are_those_of_the_page_of_costs() -> None:
    numbers = {}
    for page in ("README.md", "docs/costs.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        rows = re.findall(r"^\| \d+B?M? \| `([\w.-]+)`.*?\|( [\d.]+ \| [\d.]+ \| \$\d+) \|$", text, re.M)
        numbers[page] = dict(rows)
    assert len(numbers["README.md"]) == 5
    assert numbers["README.md"].items() <= numbers["docs/costs.md"].items()
