"""A connection to the agent on a host, through the user's own ssh: its configuration, its keys, never a password."""

from __future__ import annotations

import contextlib
import logging
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.document import one_line
from radlads.tasks.contracts.recipe.machines import Host, Remote
from radlads.tasks.launchers.remote.wire import BEAT_SECONDS, SILENCE_SECONDS, Message, Sender, receive

_log = logging.getLogger("prefect.radlads")
_AGENT = "radlads.tasks.launchers.remote.agent"
_CLOSE_SECONDS = 5.0
_STARTING_SECONDS = 60.0
"""From the start of ssh to the agent's greeting: jumps, slow logins and a first import from a network file system."""


class HostLost(Exception):  # noqa: N818 - named after what happened
    """The connection to a host ended, or was never made; the message is one line."""


class HostRefused(HostLost):
    """The host answered that it cannot do what it was asked, which a retry does not change."""


class Session:
    """One agent. Its messages are put into `inbox` as (number, message); {"lost": why} is the last one."""

    def __init__(self, number: int, host: Host, remote: Remote, inbox: queue.Queue[tuple[int, Message]]) -> None:
        self.host, self._number, self._inbox = host, number, inbox
        self.heard_at = time.monotonic()
        self.silence_seconds = _STARTING_SECONDS
        self._errors: deque[str] = deque(maxlen=20)
        try:
            self._process = subprocess.Popen(
                ssh_command(host, remote),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C reaches the job through the flow only
            )
        except FileNotFoundError:
            raise UserError(
                "there is no `ssh` on this machine: launcher `hosts` needs it where the flow runs"
            ) from None
        assert self._process.stdin is not None
        self._sender = Sender(self._process.stdin)
        self._error_reader = threading.Thread(target=self._read_errors, daemon=True)
        self._error_reader.start()  # first: the other waits for its end
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, **message: object) -> None:
        """Send the agent a message."""
        self._sender.send(**message)

    def check_silence(self) -> None:
        """End the connection if nothing has come for too long: the machine or the network is down."""
        if time.monotonic() - self.heard_at > self.silence_seconds and self._process.poll() is None:
            self._errors.append(f"nothing was heard of it for {self.silence_seconds:.0f} seconds")
            self._process.kill()

    def close(self) -> None:
        """Close the agent's stdin, which ends whatever it still runs, and wait shortly for its end."""
        self._sender.close(_CLOSE_SECONDS)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_SECONDS)
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for message in receive(stream):
                self.heard_at = time.monotonic()
                if message.get("hello"):
                    self.silence_seconds = SILENCE_SECONDS
                if not message.get("beat"):
                    self._inbox.put((self._number, message))
        code = self._process.wait()
        self._error_reader.join(_CLOSE_SECONDS)
        last = self._errors[-1] if self._errors else f"ssh ended with exit code {code}"
        self._inbox.put((self._number, {"lost": last}))

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            for line in stream:
                if text := one_line(line.decode(errors="replace").strip(), 300):
                    self._errors.append(text)


def ssh_command(host: Host, remote: Remote) -> list[str]:
    """The command line that starts the agent on a host."""
    config = ["-F", str(Path(remote.ssh_config).expanduser())] if remote.ssh_config else []
    agent = shlex.join([interpreter(remote), "-P", "-m", _AGENT])
    options = ["-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SILENCE_SECONDS:.0f}"]
    return ["ssh", *config, *options, "--", host.name, agent]


def interpreter(remote: Remote) -> str:
    """The Python of another machine: as configured, or at the path of this one's."""
    return remote.python or sys.executable


class Crew:
    """The agents of a job's hosts, in their order."""

    def __init__(self, hosts: Sequence[Host], remote: Remote) -> None:
        self.inbox: queue.Queue[tuple[int, Message]] = queue.Queue()
        self.sessions = [Session(number, host, remote, self.inbox) for number, host in enumerate(hosts)]
        self._looked_at = 0.0

    def listen(self, on_tick: Callable[[], None]) -> Iterator[tuple[int, Message]]:
        """Messages as they come, without end; once a second on_tick, then (-1, {})."""
        while True:
            if time.monotonic() - self._looked_at >= BEAT_SECONDS:
                self._looked_at = time.monotonic()
                for session in self.sessions:
                    session.check_silence()
                on_tick()
                yield -1, {}
            with contextlib.suppress(queue.Empty):
                yield self.inbox.get(timeout=BEAT_SECONDS / 4)

    def collect(
        self, kind: str, numbers: Sequence[int], on_tick: Callable[[], None], seconds: float = float("inf")
    ) -> dict[int, Message]:
        """Wait for a message with the key `kind` of each of these agents. Raises HostLost, also after `seconds`."""
        found: dict[int, Message] = {}
        end = time.monotonic() + seconds
        for number, message in self.listen(on_tick):
            late = [self.sessions[one].host.name for one in numbers if one not in found]
            if time.monotonic() > end and late:
                raise HostLost(f"host {late[0]}: it gave no answer within {seconds:.0f} seconds")
            if number < 0:
                continue
            if kind in message:
                found[number] = message
            name = f"host {self.sessions[number].host.name}"
            if "say" in message:
                _log.info("%s: %s", name, message["say"])
            if "refused" in message:
                raise HostRefused(f"{name}: {message['refused']}")
            if "lost" in message and number not in found:
                raise HostLost(f"{name}: {message['lost']}")
            if all(one in found for one in numbers):
                return found
        raise AssertionError("listen has no end")


@contextmanager
def open_crew(hosts: Sequence[Host], remote: Remote) -> Iterator[Crew]:
    """Start the agents; end them, and what they still run, at the end of the block."""
    crew = Crew(hosts, remote)
    with ExitStack() as stack:
        for session in crew.sessions:
            stack.callback(session.close)
        yield crew
