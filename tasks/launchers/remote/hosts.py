"""The launcher `hosts`: the ranks of a job on several machines, each reached by ssh.

On each the agent runs DeepSpeed's launcher under a supervisor, as on one machine. When the flow, a connection or a host
dies, the ranks on the others are ended within seconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources, JobSpec
from radlads.tasks.contracts.parsing.files import file_errors
from radlads.tasks.contracts.recipe.machines import Host, parse_hosts
from radlads.tasks.contracts.recipe.recipe import Resources
from radlads.tasks.contracts.store.open import Store
from radlads.tasks.launchers.launcher import JobCrashed, JobFailed, Launcher
from radlads.tasks.launchers.local import LocalLauncher, attempt, has_ranks
from radlads.tasks.launchers.progress import Progress
from radlads.tasks.launchers.remote.facts import expected, fault_of
from radlads.tasks.launchers.remote.follow import follow
from radlads.tasks.launchers.remote.placing import forwarded, machines_resources, on_this_machine, runs_here
from radlads.tasks.launchers.remote.ssh import HostLost, HostRefused, interpreter, open_crew
from radlads.tasks.launchers.stopping import REQUEST

_FACTS_SECONDS = 120.0


class HostsLauncher(Launcher):
    """Stages without a device run on the flow's machine; those of one process run on the first host."""

    def __init__(self, requested: Resources) -> None:
        self._requested, self._remote = requested, requested.remote
        self._hosts = read_hosts(requested.hosts or ())
        self._local = LocalLauncher()

    def resources(self, requested: Resources) -> JobResources:
        """As the hostfile says; this machine is not looked at. Raises UserError."""
        return machines_resources(requested, sum(host.slots for host in self._hosts), "the hostfile")

    def check(self, store: Store, work: Path) -> None:
        """Ask every host, at the same time, for what a job needs there. Raises UserError that names the first host that
        lacks something."""
        request = {"do": "facts", "environment": forwarded(os.environ), "store": store.ref.model_dump(mode="json")}
        folder = self._remote.work or str(work)
        on_gpu = self._requested.device != "cpu"
        wanted = [expected(store, host.slots if on_gpu else 0, folder) for host in self._hosts]
        began = time.time()
        try:
            with open_crew(self._hosts, self._remote) as crew:
                for session in crew.sessions:
                    session.send(**request, work=folder)
                found = crew.collect("facts", range(len(self._hosts)), REQUEST.check, _FACTS_SECONDS)
        except HostLost as error:
            raise UserError(
                f"{error}; `ssh -o BatchMode=yes` must reach it without a password, and find radlads at "
                f"{interpreter(self._remote)} there (resources.remote.python)"
            ) from None
        for number, host in enumerate(self._hosts):
            fault = fault_of(found[number]["facts"], wanted[number], time.time(), late=time.time() - began)
            if fault is not None:
                raise UserError(f"host {host.name} {fault}")

    def hold_devices(self, resources: JobResources, purpose: str) -> AbstractContextManager[None]:
        """Wait for exclusive use of the GPUs of all hosts; each host has its own locks, taken in one order."""
        return nullcontext() if resources.device == "cpu" else self._hold(purpose)

    @contextmanager
    def _hold(self, purpose: str) -> Iterator[None]:
        with ExitStack() as stack:
            for host in sorted(self._hosts, key=lambda host: host.name):
                crew = stack.enter_context(open_crew([host], self._remote))
                crew.sessions[0].send(do="hold", count=host.slots, purpose=purpose)
                try:
                    crew.collect("held", [0], REQUEST.check)
                except HostLost as error:
                    raise JobCrashed(str(error)) from None
            yield

    def run(
        self, spec: JobSpec, *, on_progress: Callable[[Progress], None] | None = None, grace_seconds: float = 60.0
    ) -> None:
        """As Launcher.run."""
        if runs_here(spec):
            self._local.run(on_this_machine(spec), on_progress=on_progress, grace_seconds=grace_seconds)
            return
        hosts = self._hosts if has_ranks(spec) else (Host(self._hosts[0].name, 1),)
        names = ", ".join(f"{host.name} slots={host.slots}" for host in hosts)

        def work(log: Path, on_tick: Callable[[], None]) -> int:
            try:
                with open_crew(hosts, self._remote) as crew:
                    return follow(crew, spec, self._requested, on_tick, grace_seconds)
            except HostRefused as error:
                raise JobFailed(f"{spec.stage}: {error}") from None
            except HostLost as error:
                raise JobCrashed(f"{spec.stage} could not start: {error}") from None

        attempt(spec, f"over ssh on {names}", on_progress, work)


def read_hosts(asked: str | tuple[str, ...]) -> tuple[Host, ...]:
    """The hosts of a recipe. asked: a hostfile, or its lines. Raises UserError."""
    if isinstance(asked, tuple):
        return parse_hosts(asked)
    with file_errors(f"resources.hosts: {asked}"):
        data = Path(asked).expanduser().read_bytes()
    try:
        return parse_hosts(data.decode("utf-8-sig").splitlines())
    except UnicodeDecodeError:
        raise UserError(
            f"resources.hosts: {asked}: not a text file (UTF-8); a line of a hostfile is `name slots=8`"
        ) from None
    except ValueError as error:
        raise UserError(f"resources.hosts: {asked}: {error}") from None
