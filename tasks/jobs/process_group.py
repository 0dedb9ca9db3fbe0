"""The process group of a job: joining the other ranks, what they share, and leaving without hanging them."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import secrets
import signal
import socket
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from radlads.tasks.contracts.process_tree import MARK

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup, TCPStore  # type: ignore[attr-defined]

RANK_PIPE = "RADLADS_RANK_PIPE"
"""In the environment of a rank: the file descriptor from which it reads the rest of its environment."""
_LOOPBACK = "127.0.0.1"
# Longer than any upload by one rank that the others wait for. The launcher detects a dead rank, not this timeout.
_TIMEOUT = timedelta(hours=3)
_PR_SET_PDEATHSIG = 1


def join_group(device: torch.device, rank: int, world_size: int) -> None:
    """Join the other ranks: nccl on a GPU, gloo on a CPU. A single process gets a group of one, without a port.

    torch's store has no authentication, and by default listens on every interface: ours listens on the address where
    the ranks meet, which is loopback unless they are on several hosts.
    """
    import torch
    from torch import distributed
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    if distributed.is_initialized():
        return
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # DeepSpeed reads it, also outside its launcher
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=HashStore() if world_size == 1 else _meeting_store(rank, world_size),
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
        device_id=device if on_gpu else None,
    )


def row_group(size: int) -> ProcessGroup:
    """The group of this rank and those that share its rows: `size` consecutive ranks. All ranks call it."""
    from torch import distributed

    group: ProcessGroup = distributed.new_subgroups(group_size=size, timeout=_TIMEOUT)[0]
    return group


def _meeting_store(rank: int, world_size: int) -> TCPStore:
    """The rendezvous store of the ranks, at the address and port that the launcher set."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address, port = os.environ.get("MASTER_ADDR", _LOOPBACK), int(os.environ["MASTER_PORT"])
    if rank > 0:
        return TCPStore(address, port, world_size, is_master=False, timeout=_TIMEOUT)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, port), family=family, backlog=world_size)
    return TCPStore(address, port, world_size, True, timeout=_TIMEOUT, master_listen_fd=listener.detach())


def gather(value: Any, num_ranks: int) -> list[Any]:
    """Every rank's value, in the order of ranks. All ranks call it."""
    if num_ranks == 1:
        return [value]
    from torch import distributed

    gathered: list[Any] = [None] * num_ranks
    distributed.all_gather_object(gathered, value)
    return gathered


def same_draw(device: torch.device) -> str:
    """Eight random hexadecimal digits, drawn by the first rank. All ranks call it."""
    import torch
    from torch import distributed

    drawn = torch.tensor([secrets.randbits(32)], device=device)
    distributed.broadcast(drawn, src=0)
    return f"{int(drawn.item()):08x}"


def leave_group(*, orderly: bool) -> None:
    """Leave the group, if there is one. orderly: every rank leaves now; otherwise the group is not closed.

    Other ranks may then wait in a collective, and closing would wait for them; once this process has exited, the
    launcher ends them.
    """
    torch = sys.modules.get("torch")  # a job that never loaded torch has no group
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    if orderly or torch.distributed.get_world_size() == 1:
        torch.distributed.destroy_process_group()


def end_process(exit_code: int) -> NoReturn:
    """End this process now: everything is written, and torch's normal shutdown takes over a second."""
    logging.shutdown()
    with contextlib.suppress(OSError):  # the log may be on a full disk; the exit code still reports the reason
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_code)


def follow_launcher() -> None:
    """Take this rank's environment from a launcher that started it earlier (engines/ranks.py), and end with it.

    The kernel ends a rank as soon as its parent process is dead. Only if a supervisor started the job, not a person,
    whose shell may exit.
    """
    pipe = os.environ.pop(RANK_PIPE, None)
    if pipe is not None:
        with open(int(pipe), encoding="utf-8") as stream:
            told = stream.read()
        if not told:
            sys.exit("the launcher ended before it had started this rank")
        os.environ.update(json.loads(told))
    if MARK in os.environ:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def set_threads(threads: int) -> None:
    """Set the CPU threads of this process, whether torch is loaded already or later."""
    torch = sys.modules.get("torch")
    if torch is None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    else:
        torch.set_num_threads(threads)


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and advice out of the log."""
    transformers = sys.modules.get("transformers")
    if transformers is not None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
