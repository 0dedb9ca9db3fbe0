"""The launchers by their names in a recipe (`resources.launcher`)."""

from __future__ import annotations

from collections.abc import Callable

from radlads.tasks.contracts.recipe.recipe import Resources
from radlads.tasks.launchers.launcher import Launcher
from radlads.tasks.launchers.local import LocalLauncher
from radlads.tasks.launchers.remote.hosts import HostsLauncher
from radlads.tasks.launchers.remote.slurm import SlurmLauncher

LAUNCHERS: dict[str, Callable[[Resources], Launcher]] = {
    "local": lambda _: LocalLauncher(),
    "hosts": HostsLauncher,
    "slurm": SlurmLauncher,
}


def find_launcher(requested: Resources) -> Launcher:
    """The launcher that a recipe names, for the machines that it names. Raises UserError."""
    return LAUNCHERS[requested.launcher](requested)
