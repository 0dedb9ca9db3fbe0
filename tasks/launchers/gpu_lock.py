"""At most one job at a time on a GPU of this machine, for all users, with and without a Prefect server.

Each GPU has a lock file in a folder that all users of the machine can read. It is held through `flock`, so the kernel
releases it when the process ends. The file names the holder, for the messages of waiting jobs.
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
    """Lock the first `count` visible GPUs during the block; wait for them if needed, and log the holder once. visible:
    CUDA_VISIBLE_DEVICES. purpose: shown to waiting jobs, e.g. "needle of run x". folder: of the lock files. Raises
    RunStopped if the user stops the run while it waits.
    """
    folder = folder or _shared_folder()
    with ExitStack() as held:
        for gpu in sorted(set(gpu_names(count, visible, _uuids()))):
            held.enter_context(_hold(folder / f"radlads-gpu-{gpu}.lock", gpu, purpose))
        yield


def gpu_names(count: int, visible: str | None, uuids: Sequence[str]) -> list[str]:
    """Unique names of the first `count` visible GPUs: the uuid if known, else the number.

    uuids: of the GPUs of this machine, by number.
    """
    candidates = list(visible_gpus(visible)) or [str(number) for number in range(count)]
    names = []
    for name in candidates[:count]:
        if name.isdigit():
            name = uuids[int(name)] if int(name) < len(uuids) else name
        else:  # the driver accepts the beginning of a uuid
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
        logged = False
        while not _take(handle):
            REQUEST.check()
            if not logged:
                _log.info("%s waits for GPU %s, %s", purpose, gpu, _holder(handle))
                logged = True
            time.sleep(_LOOK_SECONDS)
        _sign(handle, purpose)
        yield
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    """Open the lock file; create it if necessary. Another user's file may be read-only, which is enough to lock it."""
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
                    os.fchmod(handle, _MODE)  # independent of the umask
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
    with contextlib.suppress(OSError):  # read-only, or the disk is full: the lock is held nevertheless
        data = json.dumps(sheet).encode()
        os.pwrite(handle, data, 0)
        os.ftruncate(handle, len(data))


def _holder(handle: int) -> str:
    try:
        holder: Any = json.loads(os.pread(handle, 4096, 0))
        return f"held by {holder['for']} (process {holder['pid']} of {holder['user']} since {holder['since']})"
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
