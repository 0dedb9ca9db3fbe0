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

from radlads.tasks.contracts.process_tree import MARK, WARDEN, end_leftovers, job_id, new_mark, processes, read_proc

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
    command = [sys.executable, "-m", "radlads.tasks.launchers.supervise", "--parent", str(os.getpid()), *sys.argv[1:]]
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
    return subprocess.run([sys.executable, "-m", "radlads.tasks.launchers.supervise", *options, *command], check=False)


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
    done = subprocess.run([sys.executable, "-m", "radlads.tasks.launchers.supervise", *options], check=False)
    assert done.returncode == 143
    assert not (tmp_path / "ran").exists()


def test_nothing_survives_a_killed_supervisor(tree):
    """Not even ranks that have left for sessions of their own, with helpers of theirs."""
    parent, supervisor, pids = tree("stubborn", grace=600)
    began = time.monotonic()
    os.kill(supervisor, signal.SIGKILL)
    wait_until(lambda: gone(pids), seconds=10)
    assert time.monotonic() - began < 3
    assert parent.wait(timeout=10) == 256 - signal.SIGKILL


def test_the_warden_goes_with_an_ended_job(tree):
    parent, supervisor, _ = tree("dies", grace=5)
    (warden,) = [process.pid for process in processes() if process.parent == supervisor and comm(process.pid) == WARDEN]
    os.kill(supervisor, signal.SIGTERM)
    parent.wait(timeout=30)
    assert not alive(warden)


def test_a_server_goes_with_the_process_that_started_it(tmp_path):
    """Killed with -9: no handler, and no thread of it, is left to end anything."""
    script = (
        "import subprocess, time; from radlads.tasks.contracts.process_tree import end_with_me\n"
        "server = subprocess.Popen(['sleep', '1000']); end_with_me(server.pid); print(server.pid, flush=True)\n"
        "time.sleep(1000)"
    )
    starter = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    server = int(starter.stdout.readline())
    time.sleep(0.3)  # the guard is there
    assert read_proc(server, "stat")
    starter.kill()
    starter.wait()
    end = time.monotonic() + 5
    while any(process.pid == server for process in processes()):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_command_that_cannot_be_started_is_in_the_log(tmp_path):
    assert supervise(tmp_path, str(tmp_path / "no such program")).returncode == 127
    assert (tmp_path / "log.txt").read_text() == f"cannot start {tmp_path}/no such program: No such file or directory\n"


def orphan(tmp_path, mark):
    """A process in a session of its own with a mark; as a former attempt could leave one."""
    env = {**os.environ, MARK: mark} if mark else os.environ
    return subprocess.Popen(["sleep", "1000"], env=env, start_new_session=True, cwd=tmp_path)


def test_a_new_attempt_ends_what_a_former_one_left_and_nothing_else(tmp_path):
    job, other = job_id(tmp_path / "align"), job_id(tmp_path / "distill")
    left = [orphan(tmp_path, new_mark(job)) for _ in range(2)]
    spared = [orphan(tmp_path, mark) for mark in (new_mark(other), f"{job}x/1", f"x{job}/1", None)]
    assert end_leftovers(job, seconds=5) == 2
    assert [process.wait(timeout=5) for process in left] == [-signal.SIGKILL] * 2
    assert all(process.poll() is None for process in spared)
    assert end_leftovers(job, seconds=5) == 0
    for process in spared:
        process.kill()
        process.wait()


def test_a_job_that_somebody_runs_is_left_alone(tree, tmp_path, monkeypatch):
    job = job_id(tmp_path)
    monkeypatch.setenv(MARK, new_mark(job))
    parent, supervisor, pids = tree("saves", grace=20)
    with pytest.raises(BlockingIOError, match=f"process {parent.pid} runs it"):
        end_leftovers(job, seconds=5)
    assert all(alive(pid) for pid in pids.values())
    # Its parent is killed: the supervisor stops the job in order, and is waited for.
    parent.kill()
    parent.wait()
    wait_until(lambda: parent_of(supervisor) != parent.pid)
    assert end_leftovers(job, seconds=20) >= 1  # those that have not ended by themselves yet
    assert gone(pids)
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()


def comm(pid):
    return read_proc(pid, "comm").decode().strip()
