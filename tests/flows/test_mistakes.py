"""Mistakes that people make, and the one line that each gets: what, where, and what to do. Exit code 2, no traceback."""

# ruff: noqa: E501 - tables, a mistake a line

import os
import subprocess
import sys
import time

import pytest
from prefect.states import Failed

from radlads.flows import cli, plan_view
from radlads.flows.foreground import failure_of
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.store.open import CorruptArtifact, StoreError, StoreUnusable
from radlads.tasks.launchers import local as launch

PLAN_OFFLINE = plan_view.plan_offline

GOOD = """\
name: mine
teacher: {path: demo}
data:
  train:
    sources:
      - {kind: files, paths: [corpus.txt]}
align: {tokens: 4096, context: 64, batch: 4}
"""
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(8)
)

RECIPES = {
    "empty": ("", "a recipe must be a mapping of sections, but this is empty"),
    "list": ("- a\n", "a recipe must be a mapping of sections, but this is a list"),
    "text": ("hello\n", "a recipe must be a mapping of sections, but this is text"),
    "number": ("7\n", "a recipe must be a mapping of sections, but this is 7"),
    "not utf-8": (b"name: m\xfcll\n", ":1: byte 0xfc is not UTF-8 text; save the file as UTF-8"),
    "utf-16": ("name: x".encode("utf-16"), ":1: byte 0xff is not UTF-8 text"),
    "nul": ("name: a\0b\n", ":1:8: the character U+0000 is not allowed in YAML"),
    "escape": ("name: \x1b[31mred\n", ":1:7: the character U+001B is not allowed in YAML"),
    "half a character": ('name: "\\ud800"\n', ":1:10: not valid YAML: while parsing a quoted scalar, found invalid Unicode"),
    "tab": ("name: x\n\tteacher: y\n", ":2:1: not valid YAML: "),
    "unclosed": ("name: [x\n", ":2:1: not valid YAML: while parsing a flow sequence"),
    "unquoted colon": ("name: a: b\n", ":1:8: not valid YAML: mapping values are not allowed in this context"),
    "no space": (GOOD.replace("name: mine", "name:mine"), ":2:8: not valid YAML: "),
    "equal keys": (GOOD + "align: {tokens: 8, context: 64, batch: 4}\n", ":8:1: duplicate key 'align'; it is first in line 7"),
    "equal keys inside": (GOOD.replace("batch: 4", "batch: 4, tokens: 1"), ":7:46: duplicate key 'tokens'; it is first in line 7"),
    "octal": (GOOD.replace("batch: 4", "batch: 010"), ":7:43: 010 is octal in YAML 1.1 and decimal in 1.2; write 10, or '010' for text"),
    "sixty-based": (GOOD.replace("batch: 4", "batch: 1:30"), "align.batch: Input should be a valid integer, unable to parse string as an integer (given: '1:30')"),
    "infinite": (GOOD.replace("tokens: 4096", "tokens: .inf"), ":7:17: .inf is not a finite number"),
    "not a number": (GOOD.replace("tokens: 4096", "tokens: .nan"), ":7:17: .nan is not a finite number"),
    "overflow": (GOOD.replace("tokens: 4096", "tokens: 1e999"), ":7:17: 1e999 is too large for a number"),
    "huge": (GOOD.replace("tokens: 4096", "tokens: 1" + "0" * 400), ":7:17: 1000000000000000000000000000000000000000… is too large"),
    "yes for a number": (GOOD.replace("batch: 4", "batch: yes"), "align.batch: Input should be a valid integer"),
    "on for a name": (GOOD.replace("name: mine", "name: On"), "name: String should match pattern"),
    "tag": (GOOD.replace("name: mine", "name: !!bool x"), ":1:7: the tag !!bool is not supported; write the value itself"),
    "python": ("!!python/object/apply:os.system [id]\n", ":1:1: the tag !!python/object/apply:os.system is not supported"),
    "impossible date": (GOOD.replace("name: mine", "name: 2024-13-45x"), None),
    "itself": ("name: &a [*a]\n", ":1:11: *a is inside &a itself, so it would be infinite"),
    "nowhere": (GOOD.replace("demo", "*demo"), ":2:17: *demo has no anchor &demo before it"),
    "deep": ("name: " + "[" * 5000, ":1:46: nested more than 40 deep"),
    "deep block": ("- " * 5000, ":1:81: nested more than 40 deep"),
    "bomb": (BOMB, ":5:1"),
    "many keys": ("".join(f"k{n}: 1\n" for n in range(11_000)), ":10000:8: more than 20,000 values"),
    "300,000 keys": ("".join(f"key{n}: 1\n" for n in range(300_000)), "too large: the limit is 262,144 bytes"),
    "100 MB": ("x" * 1000, "too large: the limit is 262,144 bytes"),
    "a number for a key": (GOOD.replace("train:", "2024:"), ":4:3: this key is 2024, not text; put it in quotes"),
    "a list for a key": ("? [a]\n: b\n", ":1:3: this key is a list or a mapping; put it in quotes"),
    "two documents": (GOOD + "---\n" + GOOD, ":8:1: a second document starts here; only one is allowed"),
    "bad merge": ("name: {<<: x}\n", ":1:12: << needs the anchor of a mapping"),
    "bom": ("\ufeff" + GOOD, None),
    "unknown key": (GOOD.replace("align", "aling"), "aling: unknown key 'aling'; did you mean 'align'?"),
    "password": (GOOD.replace("demo", "https://ann:opensesame@models.example/x"), "teacher.path: this contains a password in an address"),
    "empty path": (GOOD.replace("path: demo", 'path: ""'), "teacher.path: String should have at least 1 character"),
    "line break in a path": (GOOD.replace("path: demo", 'path: "a\\nb"'), "teacher.path: a location must not contain control characters"),
    "negative seed": (GOOD.replace("batch: 4", "batch: 4, seed: -1"), "align.seed: Input should be greater than or equal to 0"),
    "a name that is too long": (GOOD.replace("mine", "m" * 200), "name: String should have at most 100 characters"),
    "a dataset's name": (GOOD.replace("train:", "a/b:"), "data.a/b"),
    "stars": (GOOD.replace("corpus.txt", '"a**b"'), "paths: not a usable path: Invalid pattern: '**'"),
    "nobody's home": (GOOD.replace("corpus.txt", "~nobody-at-all/x"), "paths: not a usable path: Could not determine home"),
    "long path": (GOOD.replace("corpus.txt", "a" * 300), "paths: the name is too long"),
    "markup": (GOOD + "description: '[/bold] [red]x'\n", None),
}  # fmt: skip


def typed(capsys, monkeypatch, *arguments):
    """Exit code, and what stood on stderr, of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["radlads", *arguments])
    began = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert time.monotonic() - began < 10
    return ended.value.code or 0, capsys.readouterr().err


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("RADLADS_", "AWS_")):
            monkeypatch.delenv(name)
    # What comes after reading is for other tests: no job is launched, no orchestrator is started here.
    monkeypatch.setattr(
        "radlads.flows.plan_view.plan_offline", lambda *_, **__: (_ for _ in ()).throw(launch.JobFailed("it was read"))
    )


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name, tmp_path, capsys, monkeypatch):
    written, told = RECIPES[name]
    data = written if isinstance(written, bytes) else written.encode()
    if name == "100 MB":
        data = 100_000 * data
    (tmp_path / "mine.yaml").write_bytes(data)
    code, err = typed(capsys, monkeypatch, "plan", "mine.yaml")
    assert code == 2
    if told is None:
        assert err == "error: it was read\n"
        return
    lines = err.splitlines()
    assert len(lines) == 1 or name == "unknown key", err
    assert f"error: mine.yaml{'' if told.startswith(':') else ': '}{told}" in err
    assert "opensesame" not in err
    assert all(line.isprintable() for line in lines)


COMMANDS = {
    "no such recipe": (["plan", "smok"], "no recipe named 'smok'; did you mean 'smoke'?"),
    "no such file": (["plan", "none.yaml"], "no recipe file at none.yaml"),
    "a folder": (["plan", "folder.yaml"], "folder.yaml is a folder, not a recipe file"),
    "a long name": (["plan", "x" * 5000 + ".yaml"], "the name is too long"),
    "a name with NUL": (["plan", "x\0.yaml"], "no recipe file at x\\x00.yaml"),
    "no equals sign": (["plan", "smoke", "--set", "tokens"], "--set tokens: write it as KEY=VALUE"),
    "half a list": (["plan", "smoke", "--set", "a=[1"], "--set a: not valid YAML: while parsing a flow sequence"),
    "octal": (["plan", "smoke", "--set", "align.seed=007"], "--set align.seed: 007 is octal in YAML 1.1 and decimal in 1.2; write 7"),
    "nan": (["plan", "smoke", "--set", "align.tokens=.nan"], "--set align.tokens: .nan is not a finite number"),
    "huge": (["plan", "smoke", "--set", f"align.seed={'9' * 5000}"], "is too large: the limit for integers is 2**53"),
    "tag": (["plan", "smoke", "--set", "name=!!python/name:os.system"], "--set name: the tag !!python"),
    "twice": (["plan", "smoke", "--set", "name=a", "--set", "name=b"], "--set name is given twice"),
    "two dots": (["plan", "smoke", "--set", "align..tokens=1"], "override 'align..tokens': separate keys by single dots"),
    "into a number": (["plan", "smoke", "--set", "align.tokens.x=1"], "'tokens' is not a section with keys"),
    "a password": (["plan", "smoke", "--set", "teacher.path=http://ann:opensesame@h/x"], "teacher.path: this contains a password in an address"),
    "no run name": (["run", "smoke", "--run", ""], "'' cannot be a run's name"),
    "a bad run name": (["run", "smoke", "--run", "a/b"], "'a/b' cannot be a run's name"),
    "a long run name": (["demo", "--run", "x" * 200], "cannot be a run's name"),
    "no store": (["run", "smoke", "--store", ""], "the store is '', which is not a place"),
    "no bucket": (["run", "smoke", "--store", "s3://"], "the store 's3://' is neither s3://bucket/prefix nor a folder"),
    "odd bucket": (["run", "smoke", "--store", "s3://a b/c"], "is neither s3://bucket/prefix nor a folder"),
    "another kind of store": (["run", "smoke", "--store", "gs://x"], "the store 'gs://x' is neither"),
    "a store's password": (["run", "smoke", "--store", "s3://ann:opensesame@b"], "AWS_SECRET_ACCESS_KEY"),
    "a file for a store": (["run", "smoke", "--store", "file.txt"], "which is a file; give a folder"),
    "tracking in a folder": (["run", "smoke", "--tracking", "mlruns"], "tracking 'mlruns' is not an MLflow server"),
    "no sqlite file": (["run", "smoke", "--tracking", "sqlite:///"], "tracking 'sqlite:///' names no file"),
    "another file": (["run", "smoke", "--tracking", "sqlite:///file.txt"], "is a file of another kind, not an SQLite database"),
    "below a file": (["run", "smoke", "--tracking", "sqlite:///file.txt/a.db"], "a file exists where a folder is needed"),
    "no host": (["run", "smoke", "--tracking", "http://"], "tracking is 'http://', which is not a valid address"),
    "a bad port": (["run", "smoke", "--tracking", "http://ann:opensesame@h:99999"], "tracking is 'http://h:99999'"),
    "work in a bucket": (["run", "smoke", "--work", "s3://b"], "the work folder is 's3://b': it must be a folder of this machine"),
    "half a list in a grid": (["sweep", "smoke", "--grid", "align.tokens=[1"], "error: --grid align.tokens=[1: not valid YAML: while parsing a flow sequence"),
    "octal in a grid": (["sweep", "smoke", "--grid", "align.seed=1,007"], "error: --grid align.seed=1,007: 007 is octal"),
    "a letter in a grid": (["sweep", "smoke", "--grid", "align.seed=1,\x01"], ": the character U+0001 is not allowed"),
    "no GPU memory": (["plan", "smoke", "--gpus", "2"], "it was read"),
    "a budget that is none": (["init", "demo", "--gpus", "H100", "--budget", "nan"], "--budget: give the dollars that there are"),
    "an infinite price": (["init", "demo", "--price", "inf"], "--price: dollars an hour for one GPU, 0 or more"),
    "too many GPUs": (["init", "demo", "--gpus", "5000xH100"], "--gpus '5000xH100': 1 to 4096 GPUs can be planned for"),
    "a recipe that is there": (["init", "demo", "--gpus", "cpu", "--out", "folder.yaml"], "folder.yaml exists already; give another file with --out"),
    "a GGUF file in a bucket": (["export", "mine", "--to", "s3://b/x.GGUF"], "--to s3://b/x.GGUF: a GGUF file is written on this machine"),
    "an approval of nothing": (["run", "smoke", "--approve-over", "nan"], "--approve-over: give dollars, 0 or more"),
    "a negative approval": (["resume", "mine", "--approve-over", "-1"], "--approve-over: give dollars, 0 or more"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(name, tmp_path, capsys, monkeypatch):
    arguments, told = COMMANDS[name]
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "file.txt").write_text("x" * 100)
    code, err = typed(capsys, monkeypatch, *arguments)
    assert code == 2, err
    assert len(err.splitlines()) == 1
    assert told in err
    assert "opensesame" not in err


VARIABLES = {
    "an endpoint": ({"RADLADS_STORE": "s3://bucket", "RADLADS_S3_ENDPOINT": "nonsense"}, "the S3 endpoint (RADLADS_S3_ENDPOINT) is 'nonsense'"),
    "infinite grace": ({"RADLADS_GRACE_SECONDS": "inf"}, "RADLADS_GRACE_SECONDS is 'inf', which is not a number"),
    "no grace": ({"RADLADS_GRACE_SECONDS": "nan"}, "RADLADS_GRACE_SECONDS is 'nan', which is not a number"),
    "half a retry": ({"RADLADS_RETRIES": "1.5"}, "RADLADS_RETRIES is '1.5', which is not a whole number"),
    "many retries": ({"RADLADS_RETRIES": "1e300"}, "RADLADS_RETRIES is '1e300'"),
    "home in a file": ({"RADLADS_HOME": "file.txt"}, "which is a file; give a folder"),
    "a line break": ({"RADLADS_STORE": "a\nb"}, "the store is 'a b', which is not a place"),
    "nobody's home": ({"RADLADS_HOME": "~nobody-at-all/x"}, "not a usable path"),
    "a read-only home": ({"RADLADS_HOME": "/proc/radlads"}, "/proc/radlads"),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIABLES)
def test_variables(name, tmp_path, capsys, monkeypatch):
    variables, told = VARIABLES[name]
    (tmp_path / "file.txt").write_text("x" * 100)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    code, err = typed(capsys, monkeypatch, "run", "smoke")
    assert code == 2, err
    assert len(err.splitlines()) == 1
    assert told in err


@pytest.mark.parametrize(
    ("number", "expected", "told"),
    [
        (28, 2, "no space left on the device; free some, or choose another location"),
        (5, 1, "Input/output error"),
    ],
)
def test_what_the_system_refuses_is_said_in_one_line(capsys, monkeypatch, number, expected, told):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number), "/data/plan.json")

    monkeypatch.setattr("radlads.flows.plan_view.plan_offline", refuse)
    code, err = typed(capsys, monkeypatch, "plan", "smoke")
    assert (code, err) == (expected, f"error: /data/plan.json: {told}\n")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("a typo"), 2),
        (StoreUnusable("no such bucket"), 2),
        (StoreError("the endpoint is away"), 1),
        (CorruptArtifact("a file is missing"), 1),
    ],
)
@pytest.mark.parametrize("in_a_run", [False, True])
def test_a_failure_at_work_and_something_to_change_have_codes_of_their_own(
    capsys, monkeypatch, error, expected, in_a_run
):
    def fail(*_, **__):
        raise failure_of(Failed(message=str(error), data=error), "radlads run x") if in_a_run else error

    monkeypatch.setattr("radlads.flows.plan_view.plan_offline", fail)
    code, err = typed(capsys, monkeypatch, "plan", "smoke")
    assert code == expected
    assert err.startswith("error: ")
    assert ("to continue where it stopped: radlads run x" in err) == (in_a_run and expected == 1)


def test_a_crash_of_the_plan_job_names_its_log(capsys, monkeypatch):
    def crash(command, *, env, cwd, log, on_tick, grace_seconds):
        log.write_text("Traceback: a bug\n")
        return 139

    monkeypatch.setattr(plan_view, "plan_offline", PLAN_OFFLINE)
    monkeypatch.setattr(launch, "run_process", crash)
    code, err = typed(capsys, monkeypatch, "plan", "smoke")
    assert code == 1
    (line,) = err.splitlines()
    assert line.startswith("error: plan crashed: ended with exit code 139 (SIGSEGV) and gave no reason; its log is /")
    with open(line.rpartition(" ")[2]) as log:
        assert "a bug" in log.read()


def test_a_reader_that_leaves_and_a_narrow_locale(tmp_path):
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "COLUMNS": "20"}
    command = f"{sys.executable} -m radlads.flows.cli recipes | head -c 1"
    done = subprocess.run(["bash", "-c", command], env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr
    (tmp_path / "é.yaml").write_text("name: [\n")
    command = [sys.executable, "-m", "radlads.flows.cli", "plan", "é.yaml"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: ")
    assert b":2:1: not valid YAML" in done.stderr
    assert len(done.stderr.splitlines()) == 1
