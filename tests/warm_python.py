"""A Python that has imported what programs need, and forks for each: starting one costs milliseconds, not ten seconds.

Run as a program, it is that Python: `python tests/warm_python.py MODULE...`, which answers lines of JSON on stdin.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Program:
    """A program that was started; its output, both streams, is in `log`."""

    server: WarmPython
    pid: int
    log: Path

    def wait(self) -> int:
        """Its exit code, negative for a signal."""
        code = int(self.server.ask({"wait": self.pid}))
        self.server.running.discard(self.pid)
        return code

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


class WarmPython:
    """Starts programs as `python` would, by fork from a process that has imported `modules`."""

    def __init__(self, folder: Path, modules: tuple[str, ...], **environment: str) -> None:
        self._folder, self._count = folder, 0
        self.running: set[int] = set()
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, *modules], env=os.environ | environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def start(self, *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> Program:
        """`arguments` as after `python`: `-m MODULE ...`, `-c CODE ...` or `FILE ...`; `env` comes on top."""
        self._count += 1
        log = self._folder / f"{self._count}.txt"
        log.touch()
        more = {"arguments": arguments, "env": env or {}, "cwd": str(cwd or self._folder), "log": str(log)}
        program = Program(self, int(self.ask(more)), log)
        self.running.add(program.pid)
        return program

    def run(self, *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
        """What the program printed; fails unless it ends well."""
        program = self.start(*arguments, env=env, cwd=cwd)
        code = program.wait()
        assert code == 0, (code, program.output[-4000:])
        return program.output

    def ask(self, task: dict[str, Any]) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(task), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BaseException:  # the test's time is up: the next answer would be to this question
            self.close()
            raise
        assert answer, f"it ended with {self._process.wait()}"
        return answer

    def close(self) -> None:
        """End it, and what a test that failed has left running."""
        for pid in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.running.clear()
        self._process.communicate()


def serve(answers: int) -> dict[str, Any] | None:
    """Answer tasks until there are no more; in the fork for a program, its task."""
    for line in sys.stdin:
        task: dict[str, Any] = json.loads(line)
        if "wait" in task:
            answer = os.waitstatus_to_exitcode(os.waitpid(task["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                os.close(answers)
                return task
        os.write(answers, f"{answer}\n".encode())
    return None


def become(task: dict[str, Any]) -> None:
    """The program itself; ends as Python ends, by an exception or without."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(task["log"], os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(task["env"])
    os.chdir(task["cwd"])
    random.seed()
    first, *rest = task["arguments"]
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    answers = os.dup(1)
    os.dup2(2, 1)  # imports may print
    for name in sys.argv[1:]:
        importlib.import_module(name)
    program = serve(answers)
    if program is not None:
        become(program)
