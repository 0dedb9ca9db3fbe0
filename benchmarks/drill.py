"""Fault-injection test: kill processes of a run repeatedly and check that nothing is lost: `make drill`.

    python benchmarks/drill.py --kills 25 --seed 0 --out benchmarks/results/drill.md

Random kill -9s of the flow, the supervisor, DeepSpeed's launcher and the rank, at random moments (start-up, a step, a
save, an upload, a commit), over a store in a folder and one behind S3; then network faults of an S3 store,
and outages of the MLflow and the Prefect server. After each the run is started again. It must end with the curve of an
unbroken run, bit for bit, in the product and in the record; no process may remain, every product must verify.

The same seed draws the same victims, stores and moments; the progress of a process at that moment depends on the
machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import boto3
from botocore.config import Config
from drill_case import (
    BUCKET,
    STEPS,
    Curve,
    Place,
    check,
    copy_base,
    curve_of,
    hook,
    kill_when,
    open_place,
    remove,
    rule_for,
    wait,
)
from drill_hosts import HOSTS_CASES, TWO_RANKS, on_hosts, set_resources
from drill_servers import SERVER_CASES
from drill_slurm import SLURM_CASES, Cluster, on_slurm
from fault_proxy import Rule
from moto.server import ThreadedMotoServer
from slurm_lab import slurm_cluster, why_no_slurm
from ssh_lab import Lab, two_machines, why_not

logger = logging.getLogger("drill")
VICTIMS = ("flow", "supervisor", "launcher", "rank")
MOMENTS = ("start", "step", "save", "upload", "checkpoint's manifest", "commit", "product's manifest")
OBJECT = r"^[^?]*"
FAULTS: dict[str, list[Rule]] = {
    "the PUT of every manifest is altered": [Rule("PUT", OBJECT + r"manifest\.json", "flip-request", times=2)],
    "PUTs of a checkpoint are altered": [Rule("PUT", OBJECT + "checkpoints/.*safetensors", "flip-request", times=2)],
    "answers are cut short, as if whole": [Rule("GET", OBJECT + "(model/|bin|manifest)", "short", times=3)],
    "answers break off": [Rule("GET", OBJECT + "(model/|bin|manifest)", "cut", times=3)],
    "answers are altered": [Rule("GET", OBJECT + "(model/|bin|manifest)", "flip-answer", times=3)],
    "404 for what is there": [Rule("GET|HEAD", OBJECT + "(model/|bin|manifest|lease)", "missing", times=3)],
    "503, slow down": [Rule("GET|HEAD|PUT|POST", "", "busy", times=20, skip=20)],
    "answers to PUTs are lost": [Rule("PUT|POST", OBJECT, "lose", times=12, skip=5)],
    "requests are lost": [Rule("GET|HEAD|PUT|POST", "", "drop", times=12, skip=15)],
    "PUTs of the product arrive late": [Rule("PUT", OBJECT + "distill/[0-9a-f]+/model/", "late", delay=3.0, times=4)],
}


class MissedError(Exception):
    """The moment for a kill passed before the kill."""


@dataclass
class Row:
    """The result of one case."""

    what: str
    store: str
    first: str
    seconds: float
    faults: list[str]


@dataclass(frozen=True)
class Kill:
    """A randomly drawn kill. step: of the checkpoint, or of the training; share: of the delay that the moment
    allows, from 0 to 1; drop: whether the request that shows the moment still arrives."""

    number: int
    kind: str
    victim: str
    moment: str
    step: int
    share: float
    drop: bool


def draw(kills: int, seed: int) -> list[Kill]:
    """Both stores, every victim and every moment about equally often, in a random order of pairs."""
    dice = random.Random(seed)
    kinds = [("folder", "s3")[i % 2] for i in range(kills)]
    victims = [VICTIMS[i % len(VICTIMS)] for i in range(kills)]
    moments = [MOMENTS[i % len(MOMENTS)] for i in range(kills)]
    for deck in (kinds, victims, moments):
        dice.shuffle(deck)
    return [
        Kill(
            i + 1, kinds[i], victims[i], moments[i], 4 * dice.randint(1, STEPS // 4), dice.random(), dice.random() < 0.5
        )
        for i in range(kills)
    ]


class Drill:
    """Shared parts of all cases: the S3 server, the products of earlier stages, the unbroken run's curve."""

    def __init__(self, work: Path, s3: str) -> None:
        self.work, self.s3 = work, s3
        self.base = work / "base" / "store"
        self.whole: Curve = []
        self._stack, self._clusters = ExitStack(), threading.Lock()
        self._lab: Lab | None = None
        self._cluster: Cluster | None = None
        self._whole_of_two: Curve = []

    def close(self) -> None:
        """Remove what cases share."""
        self._stack.close()

    def prepare(self) -> None:
        """The unbroken run. Raises RuntimeError if it fails."""
        with open_place(self.work / "base", "folder", self.s3) as place:
            code = wait(place.start())
            if code:
                raise RuntimeError(f"the unbroken run ended with {code}; see {place.folder}/flow.log")
            self.whole = curve_of(place)
        losses = [step for step, kind, _ in self.whole if kind == "loss"]
        if losses != list(range(1, STEPS + 1)):
            raise RuntimeError(f"the unbroken run has the steps {losses}")

    def case(self, name: str, kind: str, what: str, act: Callable[[Place], str], *, whole: Curve | None = None) -> Row:
        """Run a case in a place of its own: `act` makes the first attempt and returns a description of it; then the run
        is continued. whole: the unbroken run's curve."""
        folder, began = self.work / name, time.monotonic()
        with open_place(folder, kind, self.s3) as place:
            try:
                copy_base(self.base, place)
                first = act(place)
                for _ in range(2):  # the second only if the first waited for remains of the killed attempt
                    code = wait(place.start())
                    if code == 0:
                        break
                faults = [f"going on ended with {code}"] if code else check(place, whole or self.whole)
            except MissedError:
                remove(place)
                raise
            except Exception as error:  # noqa: BLE001 - a case that breaks is a row of the report
                first, faults = "?", [f"{type(error).__name__}: {error}"]
            seconds = time.monotonic() - began
            if not faults:
                remove(place)
        logger.info("%s: %s (%.0f s)", what, "; ".join(faults) or f"held, {first}", seconds)
        return Row(what, kind, first, seconds, faults)

    def kill(self, kill: Kill) -> Row:
        """A kill at its moment. A missed moment is awaited again, then replaced by a step."""
        for suffix, drawn in (("", kill), ("-again", kill), ("-step", replace(kill, moment="step"))):
            what = f"{drawn.victim} at {drawn.moment}"
            if drawn.moment not in ("start", "commit", "product's manifest"):
                what += f" {drawn.step}"
            try:
                return self.case(f"kill-{kill.number:02d}{suffix}", drawn.kind, what, partial(self._kill, kill=drawn))
            except MissedError as error:
                logger.info("%s: %s", what, error)
        return Row(what, kill.kind, "?", 0.0, ["no moment to kill at was seen"])

    def _kill(self, place: Place, kill: Kill) -> str:
        done, flows = threading.Event(), []
        requests = place.proxy is not None and kill.moment in MOMENTS[2:]
        if place.proxy is not None and requests:
            act = "drop" if kill.drop else "call"
            place.proxy.rules.append(rule_for(kill.moment, kill.step, act, hook(place, flows, kill.victim, done)))
        flows.append(flow := place.start())
        if not requests and kill_when(place, flow, kill.victim, self._seen(place, kill), self._delay(kill)):
            done.set()
        at = ""
        if kill.victim != "flow" or not done.is_set():
            at = f", the flow ended with {wait(flow)}"
        if not done.is_set():
            raise MissedError(f"nobody was killed{at}")
        flow.poll()  # a killed flow is reaped; a zombie does not hold the lease in either case
        return f"{place.rows()} steps on record{at}"

    @staticmethod
    def _seen(place: Place, kill: Kill) -> Callable[[], bool]:
        step = f"step-{kill.step:06d}"

        def product() -> Path:
            return place.folder / "store" / place.product

        def arriving() -> Path:
            return product() / "checkpoints" / step

        return {
            "start": lambda: (place.scratch / "job.json").exists(),
            "step": lambda: place.rows() >= kill.step - 1,
            "save": lambda: arriving().exists(),
            "upload": lambda: any(arriving().glob("state*")),
            "checkpoint's manifest": lambda: (arriving() / "checkpoint.json").exists(),
            "commit": lambda: (product() / "model").exists(),
            "product's manifest": lambda: any(product().glob("model/*.safetensors")),
        }[kill.moment]

    @staticmethod
    def _delay(kill: Kill) -> float:
        return kill.share * {"start": 8.0, "step": 0.2}.get(kill.moment, 0.03)

    def fault(self, number: int, name: str) -> Row:
        """A case of the S3 proxy: a network fault during one run."""

        def act(place: Place) -> str:
            assert place.proxy is not None
            place.proxy.rules.extend(Rule(r.method, r.pattern, r.act, r.times, r.skip, r.delay) for r in FAULTS[name])
            code = wait(place.start())
            hits = sum(rule.hits for rule in place.proxy.rules)
            place.proxy.rules.clear()
            if not hits:
                raise RuntimeError("the fault did not occur")
            return f"{hits} times, the flow ended with {code}"

        return self.case(f"fault-{number:02d}", "s3", name, act)

    def hosts(self, number: int, name: str) -> Row:
        """A case on two hosts over ssh."""
        with self._clusters:
            self._lab = self._lab or self._stack.enter_context(two_machines(self.work / "lab"))
            lab = self._lab

            def act(place: Place) -> str:
                on_hosts(place, lab)
                return HOSTS_CASES[name](place, lab)

            return self.case(f"hosts-{number:02d}", "folder", name, act, whole=self._two_ranks())

    def slurm(self, number: int, name: str) -> Row:
        """A case on a Slurm cluster of two nodes."""
        with self._clusters:
            self._cluster = self._cluster or self._stack.enter_context(slurm_cluster(self.work / "slurm"))
            cluster = self._cluster

            def act(place: Place) -> str:
                on_slurm(place, cluster)
                return SLURM_CASES[name](place, cluster)

            return self.case(f"slurm-{number:02d}", "folder", name, act, whole=self._two_ranks())

    def _two_ranks(self) -> Curve:
        """The curve of an unbroken run of two ranks on this machine."""
        if not self._whole_of_two:
            with open_place(self.work / "base-two", "folder", self.s3) as place:
                copy_base(self.base, place)
                set_resources(place, TWO_RANKS)
                if code := wait(place.start()):
                    raise RuntimeError(f"the unbroken run of two ranks ended with {code}; see {place.folder}")
                self._whole_of_two = curve_of(place)
        return self._whole_of_two

    def server(self, number: int, name: str) -> Row:
        """An outage of a server during the run."""
        return self.case(f"server-{number:02d}", "folder", name, lambda place: SERVER_CASES[name](place, self.whole))


def report(rows: dict[str, list[Row]], command: str, seconds: float) -> str:
    """Markdown."""
    packages = ("torch", "deepspeed", "boto3", "moto", "mlflow", "prefect")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    every = [row for part in rows.values() for row in part]
    held = sum(not row.faults for row in every)
    lines = [
        "# The drill",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores of {_processor()}, "
        f"Python {platform.python_version()}, {versions}; commit {done.stdout.strip() or 'unknown'}.",
        "",
        f"    {command}",
        "",
        f"{held} of {len(every)} cases held, in {seconds / 60:.0f} minutes. Held: started again, the run ended with "
        "the curve of an unbroken run, bit for bit, in the product and in the record; nothing still ran; no checkpoint "
        "was left; every product verified; the lease was given back.",
    ]
    for part, cases in rows.items():
        lines += [
            "",
            f"## {part}",
            "",
            "| case | store | first attempt | seconds | result |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {r.what} | {r.store} | {r.first} | {r.seconds:.0f} | {_cell('; '.join(r.faults)) or 'held'} |"
            for r in cases
        ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def _processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return found.group(1) if found else platform.machine()


def main() -> int:
    """Command line; 1 where a case did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=2, help="concurrent cases")
    parser.add_argument("--only", default="", help="regular expression: only the cases whose name matches")
    parser.add_argument("--out", type=Path, help="markdown file to write")
    parsed = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    logging.getLogger("botocore").setLevel(logging.ERROR)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        os.environ[name] = "drilldrill"
    work, began = Path(tempfile.mkdtemp(prefix="radlads-drill-")), time.monotonic()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    drill = Drill(work, endpoint)
    try:
        config = Config(s3={"addressing_style": "path"}, proxies={})
        boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", config=config).create_bucket(Bucket=BUCKET)
        drill.prepare()
        parts: dict[str, list[tuple[str, Callable[[], Row]]]] = {
            f"{parsed.kills} kills, seed {parsed.seed}": [
                (f"{k.victim} {k.moment} {k.kind}", lambda k=k: drill.kill(k)) for k in draw(parsed.kills, parsed.seed)
            ],
            "The network before S3": [(n, lambda i=i, n=n: drill.fault(i, n)) for i, n in enumerate(FAULTS)],
            "Two hosts over ssh, two ranks": [
                (n, lambda i=i, n=n: drill.hosts(i, n)) for i, n in enumerate(HOSTS_CASES) if why_not() is None
            ],
            "A Slurm cluster of two nodes, two ranks": [
                (n, lambda i=i, n=n: drill.slurm(i, n)) for i, n in enumerate(SLURM_CASES) if why_no_slurm() is None
            ],
            "Servers beside the run": [(n, lambda i=i, n=n: drill.server(i, n)) for i, n in enumerate(SERVER_CASES)],
        }
        rows = {}
        with ThreadPoolExecutor(parsed.parallel) as pool:
            waiting = {
                part: [pool.submit(case) for name, case in cases if re.search(parsed.only, name)]
                for part, cases in parts.items()
            }
            rows = {part: [future.result() for future in futures] for part, futures in waiting.items() if futures}
    finally:
        drill.close()
        server.stop()
    text = report(rows, f"python {' '.join(sys.argv)}", time.monotonic() - began)
    if parsed.out:
        parsed.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    failed = any(row.faults for part in rows.values() for row in part)
    if failed:
        logger.error("what did not hold is kept in %s", work)
    else:
        shutil.rmtree(work, ignore_errors=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
