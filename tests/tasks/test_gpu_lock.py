"""One job at a time on a GPU, among threads, processes and users; who waits is told for whom."""

import logging
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

from radlads.tasks.contracts.job import JobResources
from radlads.tasks.launchers import gpu_lock
from radlads.tasks.launchers import local as launch
from radlads.tasks.launchers.gpu_lock import gpu_names, hold_gpus
from radlads.tasks.launchers.stopping import RunStopped, StopRequest

UUIDS = ["GPU-aa11", "GPU-bb22", "GPU-cc33"]
HOLDER = """
    import sys, time
    from pathlib import Path
    from radlads.tasks.launchers.gpu_lock import hold_gpus
    with hold_gpus(1, "0", "align of other", folder=Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(1000)
"""


@pytest.mark.parametrize(
    ("count", "visible", "names"),
    [
        (2, None, ["GPU-aa11", "GPU-bb22"]),
        (1, "2,0", ["GPU-cc33"]),
        (2, "GPU-bb,1", ["GPU-bb22", "GPU-bb22"]),
        (1, "7", ["7"]),
        (1, "MIG-x/1", ["MIG-x_1"]),
    ],
)
def test_a_gpu_has_one_name_whatever_it_is_called(count, visible, names):
    assert gpu_names(count, visible, UUIDS) == names


def test_one_at_a_time_and_only_on_the_same_gpu(tmp_path, caplog):
    order = []

    def job(name, visible, seconds):
        with hold_gpus(1, visible, name, folder=tmp_path):
            order.append(f"{name} begins")
            time.sleep(seconds)
            order.append(f"{name} ends")

    caplog.set_level(logging.INFO, logger="prefect.radlads")
    with hold_gpus(1, "0", "align of one", folder=tmp_path):
        waiting = threading.Thread(target=job, args=("needle of two", "0", 0))
        waiting.start()
        job("evaluate of three", "1", 0.7)
    waiting.join()
    assert order == ["evaluate of three begins", "evaluate of three ends", "needle of two begins", "needle of two ends"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"needle of two waits for GPU 0, held by align of one (process {os.getpid()} of ")


def test_the_lock_goes_with_its_holder(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="prefect.radlads")
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    threading.Timer(0.7, holder.kill).start()
    with hold_gpus(1, "0", "needle of mine", folder=tmp_path):
        assert holder.wait(timeout=10) == -9
    assert f"held by align of other (process {holder.pid}" in caplog.text


def test_a_stop_ends_the_wait(tmp_path, monkeypatch):
    request = StopRequest()
    monkeypatch.setattr(gpu_lock, "REQUEST", request)
    with hold_gpus(1, "0", "align", folder=tmp_path):
        threading.Timer(0.3, request.ask).start()
        with pytest.raises(RunStopped), hold_gpus(1, "0", "needle", folder=tmp_path):
            pytest.fail("both have it")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize("mode", [0o666, 0o644])
def test_other_users_wait_too(monkeypatch, mode):
    """Also where they may only read the file."""
    monkeypatch.setattr(gpu_lock, "_MODE", mode)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o1777)
        with hold_gpus(1, "0", "align", folder=folder):
            child = os.fork()
            if child == 0:
                os.setuid(65534)
                handle = gpu_lock._open(folder / "radlads-gpu-0.lock")
                told = gpu_lock._holder(handle)
                os._exit(0 if not gpu_lock._take(handle) and told.startswith("held by align (process ") else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_link_is_not_written_through(tmp_path, caplog):
    target = tmp_path / "precious"
    target.write_text("as it was")
    (tmp_path / "radlads-gpu-0.lock").symlink_to(target)
    with hold_gpus(1, "0", "align", folder=tmp_path):
        assert target.read_text() == "as it was"
    assert "GPU 0 is not locked" in caplog.text


def test_nothing_is_locked_on_a_cpu(monkeypatch):
    monkeypatch.setattr(launch, "hold_gpus", lambda *_: pytest.fail("a lock on a CPU"))
    with launch.LocalLauncher().hold_devices(JobResources(device="cpu", processes=2, threads=1), "align"):
        pass
