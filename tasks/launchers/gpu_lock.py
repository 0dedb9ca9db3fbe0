"""One job at a time on a GPU of this machine, whoever starts it and whether or not there is a Prefect server.

A lock is a file of its own for each GPU, in a place that all users of the machine see, and held through `flock`: it
goes with the process, however that ends. Who holds it is written inside, for those who wait.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from radlads.tasks.contracts.locks.holder import user_name
from radlads.tasks.launchers.devices import visible_gpus
from radlads.tasks.launchers.stopping import REQUEST

_log = logging.getLogger("prefect.radlads")
_PLACES = (Path("/run/lock"), Path("/tmp"))
_LOOK_SECONDS = 0.5
_MODE = 0o666


@contextmanager
def hold_gpus(count: int, visible: str | None, purpose: str, *, folder: Path | None = None) -> Iterator[None]:
    """Have the first `count` of the visible GPUs to oneself during the block; wait for them, and say for whom, once.

    visible: CUDA_VISIBLE_DEVICES. purpose: what others are told, e.g. "needle of run x". folder: of the lock files.
    Raises RunStopped when a person stops the run meanwhile.
    """
    folder = folder or _shared_folder()
    with ExitStack() as held:
        for gpu in sorted(set(gpu_names(count, visible, _uuids()))):
            held.enter_context(_hold(folder / f"radlads-gpu-{gpu}.lock", gpu, purpose))
        yield


def gpu_names(count: int, visible: str | None, uuids: Sequence[str]) -> list[str]:
    """The first `count` visible GPUs by what is theirs alone: the uuid where one is known, their number otherwise.

    uuids: of the GPUs of this machine, by number.
    """
    wanted = list(visible_gpus(visible)) or [str(number) for number in range(count)]
    names = []
    for name in wanted[:count]:
        if name.isdigit():
            name = uuids[int(name)] if int(name) < len(uuids) else name
        else:  # the driver takes the beginning of a uuid for the whole
            name = next((uuid for uuid in uuids if uuid.startswith(name)), name)
        names.append(re.sub(r"[^A-Za-z0-9-]", "_", name))
    return names


@contextmanager
def _hold(path: Path, gpu: str, purpose: str) -> Iterator[None]:
    try:
        handle = _open(path)
    except OSError as error:
        _log.warning("GPU %s is not locked against other jobs of this machine: %s: %s", gpu, path, error.strerror)
        yield
        return
    try:
        told = False
        while not _take(handle):
            REQUEST.check()
            if not told:
                _log.info("%s waits for GPU %s, %s", purpose, gpu, _holder(handle))
                told = True
            time.sleep(_LOOK_SECONDS)
        _sign(handle, purpose)
        yield
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    """The lock file, made if need be. One that another user made may only be readable, which is enough to lock it."""
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    for mode in (os.O_RDWR, os.O_RDWR | os.O_CREAT, os.O_RDONLY):
        try:
            handle = os.open(path, flags | mode, _MODE)
        except (FileNotFoundError, PermissionError):
            continue
        found = os.fstat(handle)
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
            if mode & os.O_CREAT:
                with contextlib.suppress(PermissionError):
                    os.fchmod(handle, _MODE)  # whatever the umask is
            return handle
        os.close(handle)
    raise PermissionError(errno.EACCES, "cannot open the lock of a GPU", str(path))


def _take(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sign(handle: int, purpose: str) -> None:
    sheet = {
        "user": user_name(),
        "pid": os.getpid(),
        "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "for": purpose,
    }
    with contextlib.suppress(OSError):  # only readable, or the disk is full: it is locked all the same
        data = json.dumps(sheet).encode()
        os.pwrite(handle, data, 0)
        os.ftruncate(handle, len(data))


def _holder(handle: int) -> str:
    try:
        told: Any = json.loads(os.pread(handle, 4096, 0))
        return f"held by {told['for']} (process {told['pid']} of {told['user']} since {told['since']})"
    except (ValueError, KeyError, TypeError):
        return "held by another process"


def _shared_folder() -> Path:
    return next((place for place in _PLACES if place.is_dir() and os.access(place, os.W_OK)), _PLACES[-1])


def _uuids() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split() if done.returncode == 0 else []
