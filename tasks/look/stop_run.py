"""Stops a run that is at work: its process on this machine by the signal that Ctrl-C stands for, any other one by a
request in the store."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from radlads.tasks.contracts.locks.holder import Holder
from radlads.tasks.contracts.locks.lease import LeaseSheet, held_by
from radlads.tasks.contracts.process_tree import read_proc
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.layout import run_key
from radlads.tasks.look.run_state import RunState
from radlads.tasks.look.stop_request import leave_request, read_request

_COMMANDS = (b"run", b"sweep", b"evaluate", b"resume")
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Asked:
    """How a run was asked. how: nothing: it is not at work. lease: that it had."""

    how: Literal["signal", "request", "nothing"]
    text: str
    lease: LeaseSheet | None = None


def ask_to_stop(store: Store, state: RunState) -> Asked:
    """Ask a run to save a checkpoint and stop. Raises StoreError."""
    lease = held_by(store, run_key(state.run))
    if not state.is_alive or lease is None:
        return Asked("nothing", f"the run '{state.run}' is not at work ({state.word}), so there is nothing to stop")
    if lease.holder.is_here and _signalled(lease.holder):
        return Asked("signal", f"asked process {lease.holder.pid} on this machine to stop, as Ctrl-C does", lease)
    leave_request(store, state.run, lease, socket.gethostname())
    where = f"{lease.holder.user}@{lease.holder.host}"
    return Asked("request", f"left a request in the store; the run on {where} looks for one every few seconds", lease)


def wait_until_stopped(store: Store, run: str, asked: Asked, seconds: float, tell: Callable[[str], None]) -> bool:
    """Whether the run has stopped within that time. tell: called once the request was taken."""
    end, taken = time.monotonic() + seconds, asked.how != "request"
    while time.monotonic() < end:
        now = held_by(store, run_key(run))
        if now is None or (asked.lease is not None and now.owner != asked.lease.owner):
            return True
        if now.holder.is_here and not now.holder.is_alive:
            return True
        if not taken and read_request(store, run) is None:
            taken = True
            tell("the run has taken the request; its jobs save a checkpoint")
        time.sleep(_LOOK_SECONDS)
    return False


def _signalled(holder: Holder) -> bool:
    """Whether a command `radlads` of this machine was signalled. Any other process, such as a flow under Prefect's
    worker, does something else upon a signal, and gets a request instead."""
    with suppress(OSError):  # it has just ended, or is another user's
        handle = os.pidfd_open(holder.pid)
        try:
            # Checked now that it is open: its pid cannot be reused any more.
            if holder.is_alive and _is_command(holder.pid):
                signal.pidfd_send_signal(handle, signal.SIGTERM)
                return True
        finally:
            os.close(handle)
    return False


def _is_command(pid: int) -> bool:
    words = read_proc(pid, "cmdline").split(b"\0")
    program = next((i for i, word in enumerate(words[:6]) if word.rsplit(b"/", 1)[-1] == b"radlads"), None)
    if program is None:
        program = next((i for i, word in enumerate(words) if word == b"radlads.flows.cli"), None)
    return program is not None and any(word in _COMMANDS for word in words[program + 1 : program + 2])
