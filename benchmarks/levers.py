"""Try levers one at a time against a baseline: runs of one recipe with changed keys, by seeds; a JSON file and a table.

    python benchmarks/levers.py benchmarks/smollm2_levers.yaml --set teacher.path=FILE --minutes 25
    python benchmarks/levers.py benchmarks/smollm2_levers.yaml --only hidden_weight,reverse --table pure

One run a GPU at a time; two (`--gpus 0,0`) fill the time in which one plans, reads and starts. All runs share one
store, so stages that are equal (tokenize, transplant, align) are made once, and the same command continues where the
last one stopped, in the middle of a stage too. A run that failed is recorded and tried again by the next call. Times
are then of runs beside others, and of a stage only where it was not reused.

The YAML file: `tables`, each with `name`, `recipe` (beside the file), `set` (keys of all its runs), `seeds`, `seeded`
(keys that get the seed) and `levers`: `name` and `set`, the first of which is the baseline; `same_as` in place of `set`
takes the results of another table's lever. A lever of the value null removes an optional key or section.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from convert import changes_of, convert_recipe, hardware

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.yaml_reader import read_yaml
from radlads.tasks.contracts.process_tree import end_with_me
from radlads.tasks.contracts.stages import DISTILL
from radlads.tasks.launchers.launcher import JobCrashed
from radlads.tasks.launchers.stopping import REQUEST, RunStopped

logger = logging.getLogger("levers")
GRACE_SECONDS = 40.0
STOPPED = 75
"""Exit status of a run that was asked to stop: the next call continues it."""
SEEDED = ("align.seed", "distill.seed")
# Column → metric of the manifests, and whether less is better.
COLUMNS: tuple[tuple[str, str, bool], ...] = (
    ("KL", "kl", True),
    ("bits per byte, of the teacher's", "bits_per_byte_ratio", True),
    ("WikiText-2, of the teacher's", "text/wikitext2/bits_per_byte_ratio", True),
    ("over chance", "relative_score", False),
    ("LAMBADA", "student/lambada_openai/acc", False),
    ("needle 512", "student/needle/512", False),
    ("needle 2,048", "student/needle/2048", False),
    ("RULER", "student/ruler", False),
)


@dataclass(frozen=True)
class Unit:
    """One run: a lever of a table with one seed."""

    table: str
    lever: str
    seed: int
    recipe: str
    changes: dict[str, Any] = field(compare=False)

    @property
    def key(self) -> str:
        """Its name among the results, and the run's name in the store."""
        return f"{self.table}-{self.lever}-seed{self.seed}"


def read_tables(path: Path) -> list[dict[str, Any]]:
    """The tables of a YAML file, with absolute recipes. Raises UserError for what it does not know."""
    tables: list[dict[str, Any]] = read_yaml(path.read_bytes(), where=str(path))["tables"]
    for table in tables:
        unknown = set(table) - {"name", "recipe", "set", "seeds", "seeded", "levers"}
        names = [lever["name"] for lever in table["levers"]]
        for lever in table["levers"]:
            unknown |= set(lever) - {"name", "set", "same_as"}
        if unknown or len(set(names)) < len(names):
            raise UserError(f"{path}: {table['name']}: {sorted(unknown) or 'a lever has the name of another'}")
        table["recipe"] = str((path.parent / table["recipe"]).resolve())
    return tables


def make_units(tables: list[dict[str, Any]], changes: dict[str, Any]) -> list[Unit]:
    """All runs: the first seed of every table's levers, then the next one. changes: of all of them."""
    found = []
    for number in range(max(len(table["seeds"]) for table in tables)):
        for table in tables:
            for lever in table["levers"] if number < len(table["seeds"]) else ():
                if "same_as" in lever:
                    continue
                seed = table["seeds"][number]
                own = dict.fromkeys(table.get("seeded", SEEDED), seed)
                all_changes = table.get("set", {}) | own | lever.get("set", {}) | changes
                found.append(Unit(table["name"], lever["name"], seed, table["recipe"], all_changes))
    return found


def run_one(unit: Unit, work: Path, out: Path) -> int:
    """Run a unit in this process and write its numbers; SIGTERM stops it with a checkpoint. Returns the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: REQUEST.ask())
    REQUEST.patience_seconds = GRACE_SECONDS - 5
    began = time.monotonic()
    try:
        with REQUEST.flow():
            REQUEST.check()
            numbers = convert_recipe(unit.recipe, unit.key, unit.changes, work)
    except RunStopped as stopped:
        logger.info("%s: %s", unit.key, stopped)
        return STOPPED
    except (UserError, JobCrashed) as error:
        out.write_text(json.dumps({"error": " ".join(str(error).split())[:400]}), encoding="utf-8")
        return 1
    out.write_text(json.dumps(numbers | {"seconds": round(time.monotonic() - began, 1)}), encoding="utf-8")
    return 0


class Results:
    """The JSON file of all runs, and the tables made of it, written anew after every run. Raises UserError while
    another process writes them."""

    def __init__(self, page: Path, tables: list[dict[str, Any]], head: str) -> None:
        self.page, self.file, self.tables, self.head = page, page.with_suffix(".json"), tables, head
        page.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self.file.with_suffix(".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another levers.py writes {self.file}; give this one another --out") from error
        self.runs: dict[str, Any] = json.loads(self.file.read_text()) if self.file.is_file() else {}

    def close(self) -> None:
        """Let another process write them."""
        self._lock.close()

    def has(self, unit: Unit) -> bool:
        """Whether this run is done with these changes; a failure does not count."""
        found = self.runs.get(unit.key)
        return found is not None and "error" not in found["numbers"] and found["changes"] == unit.changes

    def add(self, unit: Unit, numbers: dict[str, Any]) -> None:
        """Record a run and write both files."""
        self.runs[unit.key] = {"changes": unit.changes, "numbers": numbers}
        self._replace(self.file, json.dumps(self.runs, indent=1))
        self.write()

    def write(self) -> None:
        """Write the page."""
        sections = [f"## {table['name']}\n\n{self.table(table)}" for table in self.tables]
        self._replace(self.page, "\n\n".join([self.head, *sections]) + "\n")

    @staticmethod
    def _replace(path: Path, text: str) -> None:
        """At once: a call that is killed leaves the results of before or those of now."""
        beside = path.with_name(f".{path.name}.new")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)

    def numbers(self, table: dict[str, Any], lever: dict[str, Any], seed: int) -> dict[str, Any]:
        """Of a run; {} if it has none yet."""
        at, name = lever.get("same_as", f"{table['name']}/{lever['name']}").split("/")
        found: dict[str, Any] = self.runs.get(f"{at}-{name}-seed{seed}", {}).get("numbers", {})
        return found

    def table(self, table: dict[str, Any]) -> str:
        """Each lever's mean over its seeds and, in brackets, the difference from the baseline with each seed."""
        heads = [f"{head} {'↓' if less else '↑'}" for head, _, less in COLUMNS]
        lines = ["| lever | " + " | ".join([*heads, "tokens/s"]) + " |", "| --- |" + " --- |" * (len(heads) + 1)]
        for lever in table["levers"]:
            runs = {seed: self.numbers(table, lever, seed) for seed in table["seeds"]}
            errors = [run["error"] for run in runs.values() if "error" in run]
            cells = [self._cell(table, lever, runs, metric) for _, metric, _ in COLUMNS]
            told = [run.get("stage speed", {}).get(DISTILL.name) for run in runs.values()]
            speeds = [speed for speed in told if speed]
            cells.append(f"{max(speeds):,}" if speeds else "–")
            said = f" (failed: {errors[0]})" if errors else ""
            lines.append(f"| {lever['name']}{said} | " + " | ".join(cells) + " |")
        first = table["levers"][0]["name"]
        theirs = [run for seed in table["seeds"] if (run := self.numbers(table, table["levers"][0], seed))]
        shown = {name: metric.replace("student/", "teacher/") for name, metric, _ in COLUMNS if "student/" in metric}
        known = [f"{name} {theirs[0][metric]:.3f}" for name, metric in shown.items() if theirs and metric in theirs[0]]
        note = f"\n\nMeans over seeds {table['seeds']}; in brackets the difference from `{first}`, seed by seed."
        return "\n".join(lines) + note + (f" The teacher: {', '.join(known)}." if known else "")

    def _cell(self, table: dict[str, Any], lever: dict[str, Any], runs: dict[int, dict[str, Any]], metric: str) -> str:
        known = {seed: run[metric] for seed, run in runs.items() if metric in run}
        if not known:
            return "–"
        mean = f"{sum(known.values()) / len(known):.4f}"
        if lever is table["levers"][0]:
            return mean
        base = {seed: self.numbers(table, table["levers"][0], seed).get(metric) for seed in known}
        gaps = [f"{known[seed] - base[seed]:+.4f}" for seed in known if base[seed] is not None]
        return f"{mean} ({', '.join(gaps)})" if gaps else mean


def run_units(todo: list[Unit], results: Results, gpus: list[str], command: list[str], work: Path, end: float) -> None:
    """One run at each of `gpus` until all are done, or `end` (monotonic) comes: then all stop with a checkpoint."""
    running: dict[int, tuple[Unit, subprocess.Popen[bytes], Path]] = {}
    asked = False
    try:
        while running or (todo and not asked):
            for place, gpu in enumerate(gpus if not asked else ()):
                if todo and place not in running:
                    unit = todo.pop(0)
                    running[place] = (unit, *_start(unit, gpu, command, work))
            for place, (unit, process, out) in list(running.items()):
                if process.poll() is not None:
                    del running[place]
                    _note(unit, process.returncode, out, results)
            if not asked and time.monotonic() > end - GRACE_SECONDS:
                asked = True
                for _, process, _ in running.values():
                    process.terminate()
            if asked and time.monotonic() > end + GRACE_SECONDS:
                break
            time.sleep(0.5)
    finally:
        for unit, process, _ in running.values():
            process.kill()
            logger.info("%s: killed; its last checkpoint is where the next call goes on", unit.key)


def _start(unit: Unit, gpu: str, command: list[str], work: Path) -> tuple[subprocess.Popen[bytes], Path]:
    out, log = (work / "levers" / f"{unit.key}.{end}" for end in ("json", "log"))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu != "cpu" else {})
    logger.info("%s: started on %s, log %s", unit.key, gpu, log)
    with log.open("ab") as stream:
        one = [*command, "--one", unit.key, "--one-out", str(out)]
        process = subprocess.Popen(one, env=environment, stdout=stream, stderr=stream)
    end_with_me(process.pid)
    return process, out


def _note(unit: Unit, status: int, out: Path, results: Results) -> None:
    if status in (STOPPED, -signal.SIGTERM):  # the latter before it listens
        logger.info("%s: stopped in time; the next call goes on", unit.key)
        return
    numbers = json.loads(out.read_text()) if out.is_file() else {"error": f"its process ended with status {status}"}
    results.add(unit, numbers)
    kl = numbers.get("kl", math.nan)
    logger.info("%s: %s", unit.key, numbers.get("error") or f"KL {kl:.4f}, {numbers['seconds']:.0f} s")


def visible_gpus() -> list[str]:
    """Of this machine, or of CUDA_VISIBLE_DEVICES; `cpu` where there is none."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    count = torch.cuda.device_count()
    return given.split(",")[:count] if given and count else [str(number) for number in range(count)] or ["cpu"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of all runs")
    parser.add_argument("--table", help="names of tables, comma between; all by default")
    parser.add_argument("--only", help="names of levers, comma between; the baseline is always among them")
    parser.add_argument("--gpus", help="as in CUDA_VISIBLE_DEVICES, or cpu; all by default. 0,0: two at a time on one")
    parser.add_argument("--minutes", type=float, default=600.0, help="after which all runs are stopped")
    parser.add_argument("--work", type=Path, default=Path(".radlads/levers"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/smollm2_levers.md"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--one-out", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    began, work = time.monotonic(), parsed.work.absolute()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    tables = read_tables(parsed.file)
    if parsed.table:
        tables = [table for table in tables if table["name"] in parsed.table.split(",")]
    if not tables:
        parser.error(f"--table {parsed.table}: no such table")
    units = make_units(tables, changes_of(parsed.set))
    if parsed.one:
        sys.exit(run_one(next(unit for unit in units if unit.key == parsed.one), work, parsed.one_out))
    if parsed.only:
        firsts = {(table["name"], table["levers"][0]["name"]) for table in tables}
        wanted = parsed.only.split(",")
        units = [unit for unit in units if unit.lever in wanted or (unit.table, unit.lever) in firsts]
    command = shlex.join([Path(sys.executable).name, *sys.argv])
    head = f"# Levers, one at a time\n\n{datetime.now(UTC):%Y-%m-%d}, {hardware()}\n\n    {command}"
    results = Results(parsed.out, tables, head)
    todo = [unit for unit in units if not results.has(unit)]
    logger.info("%d of %d runs to do", len(todo), len(units))
    gpus = parsed.gpus.split(",") if parsed.gpus else visible_gpus()
    same = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
    run_units(todo, results, gpus, same, work, began + 60 * parsed.minutes)
    results.write()
    left = sum(not results.has(unit) for unit in units)
    logger.info("%s and %s: %d of %d runs done", results.page, results.file, len(units) - left, len(units))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"levers.py: error: {error}")
