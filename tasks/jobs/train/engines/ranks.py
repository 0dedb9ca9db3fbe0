"""DeepSpeed's launcher of ranks (`deepspeed.launcher.launch`) as a program that does not hold up the ranks.

The launcher imports torch and DeepSpeed before it starts a rank, which imports them again. Here the ranks start at
once, and wait for their environment (`process_group.follow_launcher`), which the launcher determines meanwhile.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from contextlib import suppress

from radlads.tasks.jobs.process_group import RANK_PIPE


class WaitingRanks:
    """Stands in for the module `subprocess` in DeepSpeed's launcher; its processes were started before."""

    def __init__(self, arguments: Sequence[str]) -> None:
        """Start this node's ranks. arguments: the launcher's command line, whose options are written `--name=value`."""
        parser = ArgumentParser(allow_abbrev=False)
        parser.add_argument("--world_info", required=True)
        parser.add_argument("--node_rank", type=int, default=0)
        known, rest = parser.parse_known_args(arguments)
        nodes = [len(devices) for devices in json.loads(base64.urlsafe_b64decode(known.world_info)).values()]
        first = sum(nodes[: known.node_rank])
        program = next(place for place, word in enumerate(rest) if word == "--module" or not word.startswith("--"))
        module = ["-m"] if rest[program] == "--module" else []
        self._command = [sys.executable, "-u", *module, *rest[program + len(module) :]]
        self._waiting = [self._start(first + local) for local in range(nodes[known.node_rank])]

    def _start(self, rank: int) -> tuple[subprocess.Popen[bytes], int]:
        reader, writer = os.pipe()
        environment = os.environ | {RANK_PIPE: str(reader), "RANK": str(rank)}  # for who looks from outside
        process = subprocess.Popen(self._command, env=environment, pass_fds=(reader,))
        os.close(reader)
        return process, writer

    def Popen(self, command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:  # noqa: N802
        """The next rank, which now gets its environment. Raises RuntimeError for another command than it runs."""
        if list(command) != self._command:
            raise RuntimeError(f"DeepSpeed's launcher wants to run {command}; the ranks run {self._command}")
        process, writer = self._waiting.pop(0)
        # A rank that has died already is reported by the launcher, which looks at its exit code.
        with suppress(BrokenPipeError), os.fdopen(writer, "w", encoding="utf-8") as stream:
            json.dump(dict(env), stream)
        return process


def main() -> None:
    """Start the ranks and wait for them, with the command line of `deepspeed.launcher.launch`."""
    ranks = WaitingRanks(sys.argv[1:])
    # torch is imported only now, while the ranks import it too.
    importlib.import_module("radlads.tasks.jobs.train.engines.deepspeed_import").import_deepspeed()
    launch = importlib.import_module("deepspeed.launcher.launch")
    launch.subprocess = ranks  # type: ignore[attr-defined]
    launch.main()


if __name__ == "__main__":
    main()
