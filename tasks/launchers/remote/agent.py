"""The program on a host of a job: `python -m radlads.tasks.launchers.remote.agent`, started over ssh.

It reads one request and then beats and stop requests from stdin, and writes messages to stdout (wire.py); a job's
description and credentials arrive there too, never on a command line. Requests: `facts` answers what `fault_of` judges,
`hold` locks GPUs until stdin ends, `run` runs this host's part in a job. When stdin ends or falls silent (the ssh
connection is lost, the flow or its machine is dead) the ranks get a few seconds to save a checkpoint, then are killed.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from typing import NoReturn

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobSpec, StoreRef
from radlads.tasks.contracts.parsing.credentials import hide, learn
from radlads.tasks.launchers.gpu_lock import hold_gpus
from radlads.tasks.launchers.local import LOOPBACK, Meeting, free_port
from radlads.tasks.launchers.remote.facts import address_of, address_toward, facts_of, interface_of
from radlads.tasks.launchers.remote.papers import Papers
from radlads.tasks.launchers.remote.part import HostPart
from radlads.tasks.launchers.remote.wire import BEAT_SECONDS, SILENCE_SECONDS, Message, Sender, receive
from radlads.tasks.launchers.stopping import ORDERLY_SECONDS, REQUEST, RunStopped

_LAST_WORDS_SECONDS = 10.0


class Caller:
    """The flow's machine, at the other end. heard_at: monotonic seconds of its last message. is_gone: the connection
    has ended."""

    def __init__(self) -> None:
        self.sender = Sender(sys.stdout.buffer)
        self.heard_at = time.monotonic()
        self.is_gone = threading.Event()
        self._messages = receive(sys.stdin.buffer)

    def request(self) -> Message | None:
        """The first message that is more than a beat; None if the connection ends before."""
        return next((message for message in self._messages if "do" in message), None)

    def listen(self) -> None:
        """Follow later messages, in threads: `stop` ends the job, which gets `seconds` to save a checkpoint."""
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()

    def _listen(self) -> None:
        for message in self._messages:
            self.heard_at = time.monotonic()
            if message.get("do") == "stop":
                REQUEST.patience_seconds = message["seconds"]
                REQUEST.ask()
        self._lose()

    def _watch(self) -> None:
        while not self.is_gone.wait(BEAT_SECONDS):
            if time.monotonic() - self.heard_at > SILENCE_SECONDS:
                self._lose()

    def _lose(self) -> None:
        self.is_gone.set()
        REQUEST.patience_seconds = min(ORDERLY_SECONDS, REQUEST.patience_seconds)
        REQUEST.ask()


class _Telling(logging.Handler):
    """Passes log messages on to the caller."""

    def __init__(self, caller: Caller) -> None:
        super().__init__(logging.INFO)
        self._caller = caller

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        self._caller.sender.send(say=hide(record.getMessage()))


def main() -> int:
    """Answer one request. Exit code 0, also for a job that failed."""
    caller = Caller()
    sys.stdout = sys.stderr  # whatever prints must not write among the messages
    # Where ssh reached this machine: the other hosts are likely to reach it there, too.
    connection = os.environ.get("SSH_CONNECTION", "").split()
    caller.sender.send(hello=True, address=connection[2] if len(connection) == 4 else LOOPBACK)
    request = caller.request()
    if request is None:
        return 0
    os.environ.update(request.get("environment", {}))
    learn(os.environ)
    caller.listen()
    logging.basicConfig(handlers=[_Telling(caller)], level=logging.INFO)
    for name in ("boto3", "botocore", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        {"facts": _facts, "hold": _hold, "run": _run}[request["do"]](request, caller)
    except RunStopped:
        pass
    except (UserError, OSError) as error:
        caller.sender.send(refused=hide(" ".join(str(error).split())))
    caller.sender.close(_LAST_WORDS_SECONDS)
    return 0


def _facts(request: Message, caller: Caller) -> None:
    store = StoreRef.model_validate(request["store"])
    caller.sender.send(facts=facts_of(store, request["work"], os.environ.get("CUDA_VISIBLE_DEVICES")))


def _hold(request: Message, caller: Caller) -> None:
    with hold_gpus(request["count"], os.environ.get("CUDA_VISIBLE_DEVICES"), request["purpose"]):
        caller.sender.send(held=True)
        caller.is_gone.wait()


def _run(request: Message, caller: Caller) -> None:
    spec = JobSpec.model_validate(request["spec"])
    meeting = _meeting(request)
    part = HostPart(spec, meeting, os.environ, request["threads"])
    part.prepare(request["record"])
    papers = Papers(part.scratch, part.log, records=meeting.node == 0)
    caller.sender.send(meeting=[meeting.address, meeting.port])

    def look() -> None:
        if caller.sender.is_idle:
            for change in papers.changes():
                caller.sender.send(**change)

    code, ending = part.run(look, request["grace"])
    while changes := papers.changes():
        for change in changes:
            caller.sender.send(**change)
    caller.sender.send(ended=code, exit=ending)
    if code == 0:
        part.remove()


def _meeting(request: Message) -> Meeting:
    """Where the ranks meet: at the first host, on the interface that reaches the others. Raises OSError."""
    slots, node, peer = tuple(request["slots"]), int(request["node"]), request["peer"]
    if len(slots) == 1:
        return Meeting(LOOPBACK, free_port(), slots, 0, "lo")
    here = address_of(request["interface"]) if request["interface"] else address_toward(peer)
    interface = request["interface"] or interface_of(here)
    if node == 0:
        return Meeting(here, free_port(here), slots, 0, interface)
    address, port = request["meeting"]
    return Meeting(address, port, slots, node, interface)


def _end() -> NoReturn:
    """Run main and exit without waiting for the thread that reads stdin."""
    try:
        code = main()
    except Exception:  # noqa: BLE001 - the outermost handler: its last line is what the flow's machine reports
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _end()
