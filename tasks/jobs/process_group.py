"""The process group of a job: joining the other ranks, and leaving without hanging them."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from radlads.tasks.contracts.process_tree import MARK

if TYPE_CHECKING:
    import torch
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

_LOOPBACK = "127.0.0.1"
# Longer than any upload by one rank that the others wait for. A dead rank is noticed by the launcher, not by this.
_TIMEOUT = timedelta(hours=3)
_PR_SET_PDEATHSIG = 1


def join_group(device: torch.device, rank: int, world_size: int) -> None:
    """Join the other ranks: nccl on a GPU, gloo on a CPU. A single process gets a group of one, without a port.

    Ranks meet on loopback: torch's store asks nobody who they are, and listens on every interface unless told.
    """
    import torch
    from torch import distributed
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    if distributed.is_initialized():
        return
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # DeepSpeed asks for it, also outside its launcher
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=HashStore() if world_size == 1 else _loopback_store(rank, world_size),
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
        device_id=device if on_gpu else None,
    )


def _loopback_store(rank: int, world_size: int) -> TCPStore:
    """The place where ranks find each other, at the port that the launcher gave them."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    port = int(os.environ["MASTER_PORT"])
    if rank > 0:
        return TCPStore(_LOOPBACK, port, world_size, is_master=False, timeout=_TIMEOUT)
    listener = socket.create_server((_LOOPBACK, port), backlog=world_size)
    return TCPStore(_LOOPBACK, port, world_size, True, timeout=_TIMEOUT, master_listen_fd=listener.detach())


def leave_group(*, orderly: bool) -> None:
    """Leave the group, if there is one. orderly: every rank leaves now; otherwise it is left as it is.

    Others may wait in a collective then, and leaving in good order would wait for them; once this process is gone, the
    launcher ends them.
    """
    torch = sys.modules.get("torch")  # a job that never needed torch is in no group
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    if orderly or torch.distributed.get_world_size() == 1:
        torch.distributed.destroy_process_group()


def end_process(exit_code: int) -> NoReturn:
    """End this process now: everything is written, and taking torch apart object by object takes over a second."""
    logging.shutdown()
    with contextlib.suppress(OSError):  # the log may lie on a full disk; the exit code still tells
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_code)


def die_with_launcher() -> None:
    """Have the kernel end this rank as soon as the process that started it is dead; where a supervisor started the
    job, and not a person, whose shell may go away."""
    if MARK in os.environ:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def set_threads(threads: int) -> None:
    """CPU threads of this process, whether torch is here already or comes later."""
    torch = sys.modules.get("torch")
    if torch is None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    else:
        torch.set_num_threads(threads)


def quiet_libraries() -> None:
    """Keep progress bars and advice about other people's models out of the log."""
    transformers = sys.modules.get("transformers")
    if transformers is not None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
