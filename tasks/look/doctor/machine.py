"""Checks of this machine: Python and its packages, GPUs and their driver, disks, and the kernels in a process with
torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from radlads.tasks.contracts.errors import error_text
from radlads.tasks.look.doctor.finding import Finding, Level

_PACKAGES = ("torch", "transformers", "deepspeed", "datasets", "prefect", "mlflow", "pydantic", "boto3")
_OLDEST_PYTHON = (3, 11)
_GIB = 1 << 30
_FEW_GIB, _TOO_FEW_GIB = 20.0, 1.0
_SMI_SECONDS = 20
_SELF_TEST = "radlads.tasks.jobs.doctor.self_test"
_INSTALL = "install the project again: pip install -e ."


def check_python() -> Iterator[Finding]:
    """The interpreter, and the packages that jobs import."""
    number = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < _OLDEST_PYTHON:
        yield Finding("python", "fault", f"{number} is too old", "use Python 3.11 or later")
    else:
        yield Finding("python", "good", f"{number}, {sys.executable}")
    found, missing = [], []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        yield Finding("packages", "fault", f"{', '.join(missing)} missing", _INSTALL)
    yield Finding("packages", "good", ", ".join(found))


def check_gpus() -> Iterator[Finding]:
    """GPUs as the driver lists them; torch's view is part of the self-test."""
    query = "name,driver_version,memory.total,memory.used"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=False)
    except FileNotFoundError:
        done = None
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Finding(
            "gpu", "fault", f"nvidia-smi: {error_text(error)}", "load the driver again, or reboot the machine"
        )
        return
    if done is not None and done.returncode:
        said = " ".join((done.stdout or done.stderr).split())[:200]
        cure = "install the driver that fits the kernel's module, or reboot after an update of it"
        yield Finding("gpu", "fault", f"nvidia-smi: {said}", cure)
    elif done is not None and done.stdout.strip():
        for number, line in enumerate(done.stdout.strip().splitlines()):
            name, driver, total, used = (part.strip() for part in line.split(",", 3))
            yield _gpu(number, name, driver, total, used)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            yield Finding("gpu", "note", f"CUDA_VISIBLE_DEVICES is '{visible}': jobs use these alone")
    elif Path("/dev/kfd").exists():
        yield Finding("gpu", "good", "an AMD GPU (ROCm)")
    else:
        yield Finding("gpu", "note", "none: jobs run on the CPU, which is enough for the demo and the tests")


def _gpu(number: int, name: str, driver: str, total: str, used: str) -> Finding:
    busy = used.isdigit() and total.isdigit() and int(used) > 0.1 * int(total)
    text = f"{number}: {name}, driver {driver}, {used} of {total} MiB in use"
    return Finding("gpu", "warning" if busy else "good", text, "see who uses it: nvidia-smi" if busy else "")


def check_disks(home: Path, work: Path) -> Iterator[Finding]:
    """Free space where jobs write, and shared memory, through which ranks exchange tensors."""
    cache = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    places = {"home": home, "work": work, "temporary files": Path(tempfile.gettempdir()), "hub cache": cache}
    seen: dict[int, str] = {}
    for what, place in places.items():
        folder = next((parent for parent in (place, *place.parents) if parent.is_dir()), Path("/"))
        device = folder.stat().st_dev
        if device in seen:
            continue
        seen[device] = what
        free = shutil.disk_usage(folder).free / _GIB
        level: Level = "fault" if free < _TOO_FEW_GIB else "warning" if free < _FEW_GIB else "good"
        cure = "" if level == "good" else "free some, or choose another place (RADLADS_HOME, --work, TMPDIR, HF_HOME)"
        if not os.access(folder, os.W_OK) and what in ("home", "work"):
            level, cure = "fault", "change its permissions, or choose another place (RADLADS_HOME, --work)"
        yield Finding("disk", level, f"{what}: {free:,.1f} GiB free at {folder}", cure)
    shared = Path("/dev/shm")
    if shared.is_dir() and (total := shutil.disk_usage(shared).total / _GIB) < 1:
        cure = "start the container with --shm-size=16g or --ipc=host"
        yield Finding("disk", "warning", f"shared memory: {total:.2f} GiB in all, too little for several GPUs", cure)


def check_kernels(seconds: float) -> Iterator[Finding]:
    """Torch, its devices, and each kernel against its reference, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="radlads-doctor-") as folder:
        out = Path(folder, "found.json")
        try:
            done = subprocess.run(
                [sys.executable, "-m", _SELF_TEST, str(out)],
                capture_output=True, text=True, timeout=seconds, check=False, cwd=folder,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            cure = "try it on an idle machine; on a GPU, see whether another process uses it (nvidia-smi)"
            yield Finding("kernels", "fault", f"no answer within {seconds:.0f} s", cure)
            return
        if done.returncode or not out.is_file():
            last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
            yield Finding("torch", "fault", f"exit code {done.returncode}: {last[:200]}", _INSTALL)
            return
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    yield _torch(found)
    for kernel in found["kernels"]:
        yield _kernel(kernel, found["dtype"])


def _torch(found: dict[str, Any]) -> Finding:
    build = f"CUDA {found['cuda']}" if found["cuda"] else f"ROCm {found['hip']}" if found["hip"] else "CPU only"
    text = f"{found['torch']} ({build}), {len(found['devices'])} device(s)"
    if not found["devices"] and any(Path("/dev").glob("nvidia[0-9]*")):
        cure = "install a build of torch for this driver's CUDA (pytorch.org); nvidia-smi shows which that is"
        return Finding("torch", "fault", f"{text}, though this machine has a GPU", cure)
    return Finding("torch", "good", text)


def _kernel(kernel: dict[str, Any], dtype: str) -> Finding:
    name = kernel["operator"]
    cure = (
        "delete the cache of compiled kernels (TRITON_CACHE_DIR, or triton/ in the work folder) and try again; if it "
    )
    cure += "stays, report it with this output"
    if "fault" in kernel:
        return Finding("kernels", "fault", f"{name} does not run: {kernel['fault']}", cure)
    errors = f"error {_sci(kernel['error'])} of {kernel['worst']} in {dtype}, the reference {_sci(kernel['baseline'])}"
    if not kernel["good"]:
        return Finding("kernels", "fault", f"{name} is wrong: {errors}", cure)
    form = f"{kernel['form']}; " if kernel["form"] else ""
    return Finding("kernels", "good", f"{name}: {form}{errors}")


def _sci(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"
