"""The launchers by their names in a recipe (`resources.launcher`)."""

from __future__ import annotations

from radlads.tasks.launchers.launcher import Launcher
from radlads.tasks.launchers.local import LocalLauncher

LAUNCHERS: dict[str, Launcher] = {"local": LocalLauncher()}


def find_launcher(name: str) -> Launcher:
    """The launcher with a name that `Resources.launcher` allows."""
    return LAUNCHERS[name]
