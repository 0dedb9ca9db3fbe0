"""The commands that look at runs, stop and continue them, and at the machine; runs are made by jobs without work."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from radlads.flows import cli
from radlads.flows.run_view import ago
from radlads.tasks.contracts.locks.holder import _started, this_process
from radlads.tasks.contracts.locks.lease import held_by, product_lease, run_lease
from radlads.tasks.contracts.settings import resolve_settings
from radlads.tasks.contracts.store.layout import product_key, run_key
from radlads.tasks.contracts.store.open import open_store
from radlads.tasks.contracts.store.pointers import point, read_pointers
from radlads.tasks.graph import convert, judge
from radlads.tasks.launchers.launcher import JobCrashed, JobPreempted
from radlads.tasks.look import stop_run
from radlads.tasks.look.doctor import machine
from radlads.tasks.look.doctor.places import clock_finding
from radlads.tasks.look.note import ProgressNote, note_key
from radlads.tasks.look.record import keep_places
from radlads.tasks.look.resume import how_to_resume
from radlads.tasks.look.run_state import look
from radlads.tasks.pipeline import open_pipeline, students_to_judge
from radlads.tasks.plain_runner import PlainRunner

ROOT = Path(__file__).resolve().parent.parent.parent
RUNNER = CliRunner()
HEAVY = {"torch", "transformers", "prefect", "mlflow", "deepspeed", "datasets"}


def make(recipe, places, run, **overrides):
    with open_pipeline(recipe, run=run, run_id="x", overrides=overrides or None, **places) as pipeline:
        return convert(pipeline.recipe, PlainRunner(pipeline))


def typed(*arguments, **env):
    return RUNNER.invoke(cli.app, [str(word) for word in arguments], env=env)


def in_a_process(*arguments, home, code=None, **env):
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "radlads.flows.cli"]
    env = {**os.environ, "RADLADS_HOME": str(home), **env}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, env=env, cwd=ROOT)


def commands():
    """Name as typed → command, of all commands."""
    found, waiting = {}, {"": get_command(cli.app)}
    while waiting:
        name, one = waiting.popitem()
        inner = {f"{name} {key}".strip(): value for key, value in getattr(one, "commands", {}).items()}
        waiting |= inner
        if not inner:
            found[name] = one
    return found


# A finished run


def test_status_of_a_finished_run(jobs, recipe, places):
    make(recipe, places, "first")
    store = open_store(resolve_settings(store=places["store"]).store)
    state = look(store, "first")
    assert (state.word, state.done) == ("finished", len(state.stages))
    assert {stage.label for stage in state.stages} == set(read_pointers(store, "first"))
    shown = typed("status", "--store", places["store"])  # the only run there is
    assert shown.exit_code == 0
    assert "first · tiny · finished" in shown.stdout
    assert "radlads report first" in shown.stdout
    read = json.loads(typed("status", "first", "--json", "--store", places["store"]).stdout)
    assert (read["run"], read["state"], read["stages"][0]["state"]) == ("first", "finished", "done")
    assert typed("status", "first", "--watch", "--store", places["store"]).exit_code == 0
    assert "first" in typed("runs", "--store", places["store"]).stdout
    listed = json.loads(typed("runs", "--json", "--store", places["store"]).stdout)
    assert [run["run"] for run in listed] == ["first"]


def test_stages_of_a_run_that_shares_and_of_one_that_changed(jobs, recipe, places):
    make(recipe, places, "first")
    make(recipe, places, "second", **{"distill.tokens": 8192})
    store = open_store(resolve_settings(store=places["store"]).store)
    by = {stage.label: stage.made_by for stage in look(store, "second").stages}
    assert (by["align"], by["distill"]) == ("first", "")
    with open_pipeline(recipe, run="first", run_id="x", overrides={"align.tokens": 8192}, **places) as pipeline:
        spec = pipeline.request("align", PlainRunner(pipeline)._pipeline.plan_spec(pipeline.recipe), {})
        point(store, "first", "align", "align", spec.digest, pipeline.lease)  # the new align has begun
    words = {stage.label: stage.word for stage in look(store, "first").stages}
    assert (words["transplant"], words["align"], words["distill"]) == ("done", "begun", "outdated")


def test_logs(jobs, recipe, places):
    make(recipe, places, "first")
    shown = typed("logs", "first", "align", "--store", places["store"], "--work", places["work"])
    assert "align is working" in shown.stdout
    from_store = typed("logs", "first", "align", "--store", places["store"], "--work", "/tmp/none", "-n", 1)
    assert from_store.stdout == "align is working\n"
    assert typed("logs", "first", "tokenize", "--store", places["store"]).exit_code == 0
    followed = typed("logs", "first", "--follow", "--store", places["store"], "--work", places["work"])
    assert "publish is working" in followed.stdout
    wrong = in_a_process("logs", "first", "aling", "--store", places["store"], home=places["work"])
    assert wrong.returncode == 2
    assert "has no stage 'aling'; did you mean 'align'?" in wrong.stderr


def test_compare(jobs, recipe, places):
    numbers = {"kl": 0.5, "kl_stderr": 0.03, "student/arc/acc": 0.7, "student/arc/acc_stderr": 0.01}
    jobs.metrics["evaluate"] = lambda _: numbers
    make(recipe, places, "first")
    numbers = {"kl": 0.4, "kl_stderr": 0.04, "student/arc/acc": 0.69, "student/arc/acc_stderr": 0.01}
    make(recipe, places, "second", **{"distill.tokens": 8192})
    read = json.loads(typed("compare", "first", "second", "--json", "--store", places["store"]).stdout)
    assert read["recipe"] == {"distill.tokens": [4096, 8192]}
    assert read["results"]["KL"] == [{"value": 0.5, "stderr": 0.03}, {"value": 0.4, "stderr": 0.04}]
    assert read["difference"]["KL"]["stderr"] == pytest.approx(0.05)
    assert (read["difference"]["KL"]["is_better"], read["difference"]["KL"]["is_sure"]) == (True, False)
    assert read["shared"] == ["tokenize-train", "transplant", "align"]
    assert read["judged_alike"] is True
    for width in ("60", "160"):
        shown = typed("compare", "first", "second", "--store", places["store"], COLUMNS=width).stdout
        assert "0.5 ± 0.03" in shown
        assert "-0.1 ± 0.05 (within error)" in " ".join(shown.split())
        assert max(map(len, shown.splitlines())) <= int(width)
    page = Path(places["work"]) / "page.html"
    assert typed("compare", "first", "second", "--html", page, "--store", places["store"]).exit_code == 0
    assert "0.5000 ± 0.0300" in page.read_text()
    assert "-0.1000 ± 0.0500, within error" in page.read_text()
    nowhere = in_a_process("compare", "first", "second", "--html", "/no/where.html", "--store", places["store"],
                           home=places["work"])  # fmt: skip
    assert nowhere.returncode == 2
    assert len(nowhere.stderr.splitlines()) == 1
    make(recipe, places, "third", **{"evaluate.heldout_tokens": 1000})
    assert "judged by other data or settings" in " ".join(
        typed("compare", "first", "third", "--store", places["store"]).stdout.split()
    )
    for wrong in (["first"], ["first", "first"], ["first", "second", "first"]):
        assert typed("compare", *wrong, "--store", places["store"]).exit_code == 1


def test_report(jobs, recipe, places, monkeypatch):
    make(recipe, places, "first")
    shown = typed("report", "first", "--no-open", "--store", places["store"])
    assert Path(shown.stdout.strip()).read_text() == "<h1>Report</h1>"
    jobs.failures["evaluate"] = ["crash"]
    with pytest.raises(JobCrashed):
        make(recipe, places, "second", **{"distill.tokens": 8192})
    made = typed("report", "second", "--no-open", "--store", places["store"], "--work", places["work"])
    assert Path(made.stdout.splitlines()[-1]).is_file()
    assert set(jobs.specs["publish"].inputs) == {
        "plan", "train data", "transplant", "align", "distill", "finetune", "needle",
    } - ({"needle"} if jobs.launched["needle"] < 2 else set())  # fmt: skip


# One at work, or one that ended otherwise


def note(store, key, lease, **values):
    known = {"run": "r1", "began": "2026-01-01T00:00:00Z", "device": "cuda", "processes": 8, "seconds": 3600,
             "dollars_per_gpu_hour": 2.0, "done": 500.0, "total": 2000.0, "unit": "steps", "rate": 0.5,
             "metrics": {"loss": 1.5, "tokens_per_second": 90000.0}}  # fmt: skip
    sheet = ProgressNote.model_validate(known | {"token": lease.ref.token} | values)
    store.put_bytes(note_key(key), sheet.model_dump_json().encode())


@pytest.fixture
def training(jobs, recipe, places, tmp_path):
    """The run r1 with a distill at work, in this process."""
    jobs.failures["distill"] = ["preempted"]
    with pytest.raises(JobPreempted):
        make(recipe, places, "r1")
    store = open_store(resolve_settings(store=places["store"]).store)
    digest = read_pointers(store, "r1")["distill"].digest
    with run_lease(store, "r1", tmp_path), product_lease(store, "distill", digest, tmp_path, run="r1") as lease:
        note(store, product_key("distill", digest), lease)
        yield store


def test_status_of_a_run_at_work(training, places):
    shown = typed("status", "r1", "--store", places["store"], COLUMNS="100").stdout
    assert "running" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("distill")]
    assert line.split() == ["distill", "running", "500/2,000", "steps", "25%", "1.5", "90k", "60", "min", "50", "min",
                            "$16.00"]  # fmt: skip
    assert "8.0 GPU hours, $16.00 so far" in shown
    narrow = typed("status", "r1", "--store", places["store"], COLUMNS="60").stdout
    table = [row for row in narrow.splitlines() if row.startswith(("stage", "distill", "align", "publish"))]
    assert len(table) == 4
    assert max(map(len, table)) <= 60
    assert "25%" in narrow
    plain = typed("status", "r1", "--store", places["store"], NO_COLOR="1", FORCE_COLOR="", TERM="dumb").stdout
    assert "\x1b[3" not in plain
    listed = typed("runs", "--store", places["store"], COLUMNS="60").stdout
    assert max(map(len, listed.splitlines())) <= 60


def test_a_run_that_waits_for_another_and_one_that_failed(jobs, recipe, places, tmp_path, training):
    jobs.failures["align"] = ["config"]
    with pytest.raises(Exception, match="no luck with align"):
        make(recipe, places, "r2", **{"align.tokens": 8192})
    shown = typed("status", "r2", "--store", places["store"]).stdout
    assert "r2 · tiny · failed" in shown
    assert "align: no luck with align" in shown
    assert "radlads resume r2; radlads logs r2" in shown
    with run_lease(training, "r3", tmp_path) as lease:
        digest = read_pointers(training, "r1")["distill"].digest
        point(training, "r3", "distill", "distill", digest, lease)
        training.put_bytes("runs/r3/recipe.yaml", training.get_bytes("runs/r1/recipe.yaml"))
        assert "distill waits for r1" in typed("runs", "--store", places["store"], COLUMNS="120").stdout


def test_stop_and_resume_say_what_they_cannot_do(jobs, recipe, places, training, tmp_path):
    home = tmp_path / "home"
    refused = in_a_process("resume", "r1", "--store", places["store"], home=home)
    assert refused.returncode == 2
    assert "error: the run 'r1' is at work, by " in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    before = held_by(training, run_key("r1")).owner
    late = typed("stop", "r1", "--wait", "0.1", "--store", places["store"])
    assert late.exit_code == 1  # this process looks for no request
    assert "left a request in the store" in late.output
    assert held_by(training, run_key("r1")).owner == before
    make(recipe, places, "done", **{"align.tokens": 8192})
    assert "not at work (finished)" in typed("stop", "done", "--store", places["store"]).stdout
    assert "nothing left to do" in typed("resume", "done", "--store", places["store"]).stdout
    for command in ("status", "logs", "stop", "resume", "report"):
        wrong = in_a_process(command, "doen", "--store", places["store"], home=home)
        assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1), wrong.stderr
        assert "there is no run 'doen'" in wrong.stderr
        assert "did you mean 'done'?" in wrong.stderr


def test_an_evaluation_is_resumed_as_one(jobs, recipe, places):
    make(recipe, places, "first")
    with open_pipeline(recipe, run="judged", run_id="x", overrides={"needle.trials": 7}, **places) as pipeline:
        students = students_to_judge(pipeline, "first")
        keep_places(pipeline.store, "judged", pipeline.settings, judged="first", other_teacher=True)
        jobs.failures["needle"] = ["crash"]
        with pytest.raises(JobCrashed):
            judge(pipeline.recipe, PlainRunner(pipeline), students)
    store = open_store(resolve_settings(store=places["store"]).store)
    how = how_to_resume(store, "judged")
    assert (how.judged, how.other_teacher, how.work) == ("first", True, places["work"])
    assert "trials: 7" in how.recipe
    assert [stage.label for stage in look(store, "judged").stages] == ["plan", "tokenize-train", "evaluate", "needle"]


@pytest.mark.slow
def test_resume_runs_the_recorded_recipe(jobs, recipe, places, prefect_server):
    jobs.failures["distill"] = ["config"]
    with pytest.raises(Exception, match="no luck with distill"):
        make(recipe, places, "first", **{"distill.tokens": 8192})
    launched = jobs.launched.copy()
    done = typed("resume", "first", "--store", places["store"])
    assert done.exit_code == 0, done.output
    assert jobs.launched["plan"] == launched["plan"]
    assert jobs.specs["distill"].spec["section"]["tokens"] == 8192
    assert look(open_store(resolve_settings(store=places["store"]).store), "first").word == "finished"


def test_a_command_of_this_machine_is_signalled_and_nothing_else():
    program = "import time; print(flush=True); time.sleep(1000)"
    for words, is_command in ((("radlads.flows.cli", "run"), True), (("prefect", "run"), False)):
        process = subprocess.Popen([sys.executable, "-c", program, *words], stdout=subprocess.PIPE)
        process.stdout.readline()
        holder = this_process(Path()).model_copy(update={"pid": process.pid, "started": _started(process.pid)})
        assert stop_run._signalled(holder) is is_command
        if is_command:
            assert process.wait(30) == -signal.SIGTERM
        process.kill()
        process.wait()
        assert not stop_run._signalled(holder)


# The machine


def test_doctor(tmp_path, monkeypatch):
    monkeypatch.setenv("RADLADS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "store").mkdir()
    good = typed("doctor", "--no-kernels", "--store", tmp_path / "store")
    assert good.exit_code == 0, good.output
    assert "written, read and deleted" in good.stdout
    assert list((tmp_path / "store").rglob("*doctor*")) == []
    found = json.loads(typed("doctor", "--no-kernels", "--json", "--store", tmp_path / "store").stdout)
    assert {"python", "packages", "gpu", "disk", "store", "servers", "hub"} <= {one["what"] for one in found}
    (tmp_path / "store" / "layout").write_text("99")
    bad = typed("doctor", "--no-kernels", "--store", tmp_path / "store")
    assert bad.exit_code == 1
    assert "has layout '99'" in bad.stdout


def test_doctor_reads_what_the_driver_says(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 570.1, 81559, 60000'\n")
    program.chmod(0o755)
    (one,) = machine.check_gpus()
    assert (one.level, one.text) == ("warning", "0: NVIDIA H100 80GB HBM3, driver 570.1, 60000 of 81559 MiB in use")
    program.write_text("#!/bin/sh\necho 'Driver/library version mismatch' >&2; exit 18\n")
    (one,) = machine.check_gpus()
    assert one.level == "fault"
    assert "mismatch" in one.text
    assert one.cure


def test_doctor_judges_kernels_and_clocks(monkeypatch):
    fine = {"operator": "wkv7", "good": True, "worst": "d r", "error": 1e-6, "baseline": 1e-7, "form": "triton"}
    assert machine._kernel(fine, "bfloat16").level == "good"
    assert "is wrong" in machine._kernel(fine | {"good": False, "error": None}, "bfloat16").text
    assert machine._kernel({"operator": "wkv7", "fault": "no ptxas"}, "bfloat16").level == "fault"
    assert [clock_finding(ahead, "it").level for ahead in (0.4, -60.0, 1000.0)] == ["good", "warning", "fault"]
    (late,) = machine.check_kernels(0.01)
    assert "no answer within" in late.text


@pytest.mark.slow
def test_every_kernel_agrees_with_its_reference_here():
    found = list(machine.check_kernels(300))
    assert [one.level for one in found] == ["good"] * 7, found


# The command line itself


@pytest.mark.parametrize(
    "arguments", [("--help",), ("status", "--help"), ("status", "first"), ("runs",), ("--version",)]
)
def test_looking_imports_nothing_heavy(jobs, recipe, places, arguments, tmp_path):
    make(recipe, places, "first")
    code = (
        "import sys\nfrom radlads.flows import cli\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"sys.exit(', '.join(sorted({HEAVY!r} & set(sys.modules))) or 0)"
    )
    done = in_a_process(*arguments, home=tmp_path / "home", code=code, RADLADS_STORE=places["store"])
    assert done.returncode == 0, done.stderr


def test_the_version_and_the_completion(tmp_path):
    assert typed("--version").stdout.startswith("radlads ")
    for shell in ("bash", "zsh", "fish"):
        env = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
        script = in_a_process("--show-completion", shell, home=tmp_path, **env)
        assert "_RADLADS_COMPLETE" in script.stdout


def test_runs_are_completed(jobs, recipe, places, tmp_path):
    make(recipe, places, "first")
    env = {"_RADLADS_COMPLETE": "complete_bash", "COMP_WORDS": "radlads status fi", "COMP_CWORD": "2"}
    assert in_a_process(home=tmp_path, RADLADS_STORE=places["store"], **env).stdout.split() == ["first"]
    assert in_a_process(home=tmp_path, RADLADS_STORE=str(tmp_path / "none"), **env).stdout.strip() == ""


@pytest.mark.parametrize("name", list(commands()))
def test_every_command_is_in_the_page_of_commands_and_helps_on_a_narrow_terminal(name):
    page = (ROOT / "docs" / "commands.md").read_text()
    assert f"radlads {name}" in page
    shown = typed(*name.split(), "--help", COLUMNS="60", TERMINAL_WIDTH="60")
    assert shown.exit_code == 0
    assert "Example: " in shown.stdout
    assert f"radlads {name.split()[0]}" in " ".join(shown.stdout.split())


def test_ago():
    assert [ago(seconds) for seconds in (5, 600, 7200, 3 * 86400)] == [
        "5 s ago",
        "10 min ago",
        "2.0 h ago",
        "3 days ago",
    ]


def test_the_first_output_comes_soon(tmp_path):
    times = []
    for _ in range(3):
        began = time.process_time_ns(), os.times().children_user
        assert in_a_process("--help", home=tmp_path).returncode == 0
        times.append(os.times().children_user - began[1])
    assert min(times) < 2.0  # half a second on an idle machine; processor time, for one that is not
