"""Full disks, on a real one of a megabyte where this user may mount one; folders that cannot be written."""

import errno
import json
import os
import subprocess
import sys
import textwrap

import pytest
from safetensors.numpy import save_file

from radlads.tasks.contracts.disk import DiskFull, explain_disk, need_space
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources, JobSpec, StoreRef
from radlads.tasks.jobs.common import execute, open_job
from radlads.tasks.jobs.exit_reasons import EXIT_CODES
from radlads.tasks.launchers import local as launching
from radlads.tasks.launchers.local import JobFailed, launch


@pytest.fixture
def mounted(tmp_path):
    """mounted(option, ...) → an empty file system of one megabyte."""
    places = []

    def mount(*options):
        place = tmp_path / f"disk{len(places)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join(["size=1m", *options]), "tmpfs", str(place)]
        if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a file system")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", str(place)], check=True)


def spec(scratch):
    recipe = {"name": "x", "teacher": {"path": "t"}, "data": {"d": {"sources": [{"kind": "sample", "tokens": 1}]}}}
    return JobSpec(
        stage="publish", run="r", recipe="x", digest="d", spec={"section": {}, "recipe": recipe},
        output_uri="/nowhere/runs/r/publish", store=StoreRef(uri="/nowhere"),
        resources=JobResources(device="cpu", processes=1, threads=1), scratch=str(scratch),
    )  # fmt: skip


def fill(folder):
    with (folder / "big").open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()


def weights(folder):
    import numpy

    save_file({"w": numpy.zeros(1 << 20, numpy.float32)}, folder / "model.safetensors")


@pytest.mark.parametrize("write", [fill, weights])
def test_a_job_on_a_full_disk_says_so(mounted, write):
    place = mounted()
    scratch = place / "scratch"
    scratch.mkdir()
    (scratch / "job.json").write_text(spec(scratch).model_dump_json())
    job = open_job(scratch / "job.json")

    def main(job):
        job.record.log(1, {"loss": 1.0})
        try:
            write(job.scratch)
        finally:
            with pytest.raises(OSError, match="No space left"):
                fill(job.scratch)

    assert execute(main, job) == "disk-full"
    ending = json.loads((scratch / "exit.json").read_text())
    assert ending["message"].startswith("the disk is full at ")
    assert str(scratch) in ending["message"]
    assert "0.0 MiB of 1.0 MiB are free" in ending["message"]
    assert len(ending["message"].splitlines()) == 1


def fake_program(monkeypatch, tmp_path, text):
    (tmp_path / "program.py").write_text(textwrap.dedent(text))
    monkeypatch.setattr(launching, "render_command", lambda *_, **__: [sys.executable, str(tmp_path / "program.py")])


def test_an_ending_for_which_there_was_no_room_is_in_the_exit_code(tmp_path, monkeypatch):
    fake_program(monkeypatch, tmp_path, f"import sys; sys.exit({EXIT_CODES['disk-full']})")
    with pytest.raises(JobFailed, match=f"publish: the disk is full at {tmp_path}/work: .* are free"):
        launch(spec(tmp_path / "work"))


def test_need_is_said_before_it_is_met(tmp_path):
    need_space(tmp_path, 1000, "the model")
    with pytest.raises(DiskFull, match=r"the disk is full: the model needs 1073741824\.0 GiB, "):
        need_space(tmp_path, 1 << 60, "the model")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full at {place}: "),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "{place}/x"), "the disk is full at {place}/x: "),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full at {place}: "),
        (
            OSError(errno.EROFS, "Read-only file system", "{place}/x"),
            "{place}/x: the file system is read-only; ",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "{place}/x"),
            "{place}/x: permission denied; choose another location",
        ),
    ],
)
def test_errors_in_one_line(tmp_path, error, words):
    if isinstance(error, OSError) and error.filename:
        error.filename = error.filename.format(place=tmp_path)
    told = explain_disk(error, tmp_path)
    assert str(told).startswith(words.format(place=tmp_path))
    assert isinstance(told, DiskFull) == ("full" in words)
    assert isinstance(told, UserError)
    assert explain_disk(FileNotFoundError(errno.ENOENT, "No such file", "x"), tmp_path) is None
    assert explain_disk(ValueError("x"), tmp_path) is None


def test_the_cause_may_lie_below(tmp_path):
    error = KeyError("while handling it")
    error.__context__ = OSError(errno.ENOSPC, "No space left on device")
    assert isinstance(explain_disk(error, tmp_path), DiskFull)


def test_a_scratch_that_cannot_be_written(mounted):
    with pytest.raises(UserError, match="work: the file system is read-only; choose another location"):
        launch(spec(mounted("ro") / "work"))
