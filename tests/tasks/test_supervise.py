"""No descendant outlives its job, however it ends and wherever it hides. Real processes, no torch."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

# A stand-in for DeepSpeed's launcher: it puts two ranks into sessions of their own, as torchrun does, and each rank has
# a helper. `mode` says how a rank takes SIGTERM.
LAUNCHER = """
    import os, subprocess, sys, time
    folder, mode = sys.argv[1:3]
    ranks = [
        subprocess.Popen([sys.executable, "rank.py", folder, mode], start_new_session=True,
                         env={**os.environ, "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    open(f"{folder}/pid-launcher", "w").write(str(os.getpid()))
    sys.exit(max(abs(rank.wait()) for rank in ranks))
"""
RANK = """
    import os, signal, subprocess, sys, time
    folder, mode = sys.argv[1:3]
    me = os.environ["LOCAL_RANK"]
    if mode == "saves":
        def save(*_):
            time.sleep(0.5)
            open(f"{folder}/saved-{me}", "w").close()
            helper.kill()
            os._exit(0)
        signal.signal(signal.SIGTERM, save)
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    helper = subprocess.Popen(["sleep", "1000"])
    open(f"{folder}/pid-helper{me}", "w").write(str(helper.pid))
    open(f"{folder}/pid-rank{me}", "w").write(str(os.getpid()))
    time.sleep(1000)
"""
PARENT = """
    import os, subprocess, sys
    command = [sys.executable, "-m", "radlads.tasks.supervise", "--parent", str(os.getpid()), *sys.argv[1:]]
    sys.exit(subprocess.Popen(command, start_new_session=True).wait())
"""


@pytest.fixture
def tree(tmp_path):
    """Starts the launcher above under the supervisor, under a parent; waits until everybody is there."""
    for name, text in (("launcher.py", LAUNCHER), ("rank.py", RANK), ("parent.py", PARENT)):
        (tmp_path / name).write_text(textwrap.dedent(text))
    started = []

    def start(mode, grace=20.0):
        command = [
            sys.executable, "parent.py", "--grace", str(grace), "--log", "log.txt", "--",
            sys.executable, "launcher.py", str(tmp_path), mode,
        ]  # fmt: skip
        parent = subprocess.Popen(command, cwd=tmp_path)
        started.append(parent)
        names = ["pid-launcher", *(f"pid-{kind}{rank}" for kind in ("rank", "helper") for rank in range(2))]
        wait_until(lambda: all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in names))
        pids = {name: int((tmp_path / name).read_text()) for name in names}
        return parent, parent_of(pids["pid-launcher"]), pids

    yield start
    for parent in started:
        parent.kill()
        parent.wait()


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def gone(pids):
    return not any(alive(pid) for pid in pids.values())


def supervise(tmp_path, *command, grace=5):
    options = ["--parent", str(os.getpid()), "--grace", str(grace), "--log", str(tmp_path / "log.txt"), "--"]
    return subprocess.run([sys.executable, "-m", "radlads.tasks.supervise", *options, *command], check=False)


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 137), ("kill -15 $$", 143)])
def test_exit_codes(tmp_path, script, code):
    assert supervise(tmp_path, "sh", "-c", f"echo hello; echo there >&2; {script}").returncode == code
    assert (tmp_path / "log.txt").read_text() == "hello\nthere\n"


def test_the_log_is_appended_to(tmp_path):
    for word in ("one", "two"):
        supervise(tmp_path, "echo", word)
    assert (tmp_path / "log.txt").read_text() == "one\ntwo\n"


def test_stragglers_are_ended_with_the_command(tmp_path):
    script = f"setsid sleep 1000 & echo $! > {tmp_path}/pid; setsid sh -c 'sleep 1000 & wait' & exit 7"
    assert supervise(tmp_path, "sh", "-c", script).returncode == 7
    assert not alive(int((tmp_path / "pid").read_text()))


def test_ranks_may_save_before_anybody_is_ended(tree, tmp_path):
    _, supervisor, pids = tree("saves")
    os.kill(supervisor, signal.SIGTERM)
    wait_until(lambda: gone(pids))
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()


def test_a_stubborn_job_is_killed_after_its_grace(tree):
    parent, supervisor, pids = tree("stubborn", grace=0.5)
    began = time.monotonic()
    os.kill(supervisor, signal.SIGTERM)
    assert parent.wait(timeout=30) == 143
    assert gone(pids)
    assert 0.5 <= time.monotonic() - began < 15


def test_a_second_signal_cuts_the_grace_short(tree):
    parent, supervisor, pids = tree("stubborn", grace=600)
    os.kill(supervisor, signal.SIGTERM)
    wait_until(lambda: b"SigCgt" in Path(f"/proc/{supervisor}/status").read_bytes())
    time.sleep(0.3)
    os.kill(supervisor, signal.SIGTERM)
    parent.wait(timeout=30)
    assert gone(pids)


def test_nothing_survives_a_killed_parent(tree):
    parent, _, pids = tree("dies", grace=5)
    parent.kill()
    wait_until(lambda: gone(pids))


def test_nothing_survives_a_killed_launcher(tree):
    parent, _, pids = tree("dies", grace=5)
    os.kill(pids["pid-launcher"], signal.SIGKILL)
    assert parent.wait(timeout=30) == 137
    assert gone(pids)


def test_a_parent_that_is_already_dead(tmp_path):
    options = ["--parent", "1", "--grace", "1", "--log", str(tmp_path / "log"), "--", "touch", str(tmp_path / "ran")]
    done = subprocess.run([sys.executable, "-m", "radlads.tasks.supervise", *options], check=False)
    assert done.returncode == 143
    assert not (tmp_path / "ran").exists()
