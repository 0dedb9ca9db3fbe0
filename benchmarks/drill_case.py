"""One case of the drill: a folder and environment of its own, the flow in it, the kill, and the checks afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fault_proxy import FaultProxy, Rule

from radlads.tasks.contracts.job import StoreRef
from radlads.tasks.contracts.store.layout import product_key
from radlads.tasks.contracts.store.open import Store, open_store
from radlads.tasks.contracts.store.pointers import read_pointer
from radlads.tasks.stage import scratch_folder

HERE = Path(__file__).resolve().parent
RECIPE = HERE / "recipes" / "drill.yaml"
RUN, STAGE, STEPS = "r", "distill", 24
BUCKET = "drill"
LIMIT_SECONDS = 300.0
ORPHAN_SECONDS = 60.0
Curve = list[tuple[int, str, float]]


@dataclass
class Place:
    """A store and a scratch folder of one case, and the environment that its processes get. extra: part of that."""

    folder: Path
    kind: str
    proxy: FaultProxy | None = None
    recipe: Path = RECIPE
    extra: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def store(self) -> str:
        """Its uri."""
        return str(self.folder / "store") if self.proxy is None else f"s3://{BUCKET}/{self.folder.name}"

    @property
    def scratch(self) -> Path:
        """Of the stage that is killed; a folder that does not exist before the stage is requested."""
        return scratch_folder(self.folder / "work", STAGE, self.digest or "none")

    @property
    def digest(self) -> str | None:
        """Of the product of the stage that is killed; None before the run has requested it."""
        pointer = read_pointer(self.open(), RUN, STAGE)
        return None if pointer is None else pointer.digest

    @property
    def product(self) -> str:
        """Its key in the store."""
        return product_key(STAGE, self.digest or "none")

    def open(self) -> Store:
        """The store, without the fault proxy."""
        endpoint = self.proxy.endpoint if self.proxy else None
        return open_store(StoreRef(uri=self.store, endpoint_url=endpoint))

    def environment(self, **more: str) -> dict[str, str]:
        """Of the flow and everything below it."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RADLADS_", "PREFECT_", "MLFLOW_"))}
        kept |= {"RADLADS_HOME": str(self.folder / "home"), "RADLADS_GRACE_SECONDS": "20", "RADLADS_RETRIES": "0"}
        if self.proxy is not None:
            kept["RADLADS_S3_ENDPOINT"] = self.proxy.endpoint
        return kept | self.extra | more

    def start(self, command: list[str] | None = None, **more: str) -> subprocess.Popen[bytes]:
        """Start the flow, or another command that runs it."""
        places = [str(self.recipe), RUN, self.store, str(self.folder / "work")]
        command = command or [sys.executable, str(HERE / "drill_flow.py"), *places]
        with (self.folder / "flow.log").open("ab") as log:
            return subprocess.Popen(
                command, cwd=self.folder, env=self.environment(**more), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def processes(self) -> dict[int, list[str]]:
        """pid → command line of all processes of this case."""
        found = {}
        for entry in os.listdir("/proc"):
            if not entry.isdigit() or int(entry) == os.getpid():
                continue
            try:
                words = Path("/proc", entry, "cmdline").read_bytes().decode(errors="replace").split("\0")
                state = Path("/proc", entry, "stat").read_text().rsplit(")", 1)[1].split()[0]
                cwd = os.readlink(f"/proc/{entry}/cwd")
            except OSError:
                continue
            mine = cwd.startswith(str(self.folder)) or any(str(self.folder) in word for word in words)
            if mine and state != "Z":
                found[int(entry)] = words
        return found

    def rows(self) -> int:
        """Steps on record in the scratch folder."""
        try:
            return (self.scratch / "metrics.jsonl").read_bytes().count(b'"loss"')
        except FileNotFoundError:
            return 0


def find_victim(place: Place, victim: str, flow: int) -> int | None:
    """The process id of the flow, the job's supervisor, DeepSpeed's launcher or the rank; None if it is not running."""
    if victim == "flow":
        return flow
    found: dict[str, int] = {}
    for pid, words in sorted(place.processes().items()):
        if not any(STAGE in word for word in words):
            continue
        if "radlads.tasks.launchers.supervise" in words:
            found["supervisor"] = pid
        elif "radlads.tasks.jobs.train.engines.ranks" in words:
            found["launcher"] = pid
        elif "radlads.tasks.jobs.train.train" in words:
            found["rank"] = pid
    return found.get(victim)


def kill_when(
    place: Place, flow: subprocess.Popen[bytes], victim: str, moment: Callable[[], bool], delay: float
) -> bool:
    """Wait for the moment and a short delay, then kill -9 the victim; False if the flow ended before."""
    while flow.poll() is None:
        if moment():
            time.sleep(delay)
            pid = find_victim(place, victim, flow.pid)
            if pid is not None:
                os.kill(pid, signal.SIGKILL)
                return True
        time.sleep(0.001)
    return False


def wait(process: subprocess.Popen[bytes]) -> int:
    """Its exit code; -999 for one that did not end in time, and was killed."""
    try:
        return process.wait(LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return -999


def wait_for_nobody(place: Place) -> list[str]:
    """Command lines of processes of this case that still run after a while."""
    end = time.monotonic() + ORPHAN_SECONDS
    while place.processes() and time.monotonic() < end:
        time.sleep(0.1)
    left = place.processes()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return [" ".join(words)[:120] for words in left.values()]


def curve_of(place: Place, key: str | None = None) -> Curve:
    """(step, metric, value) of the training metrics, from the product's own record or from the one at a key."""
    store = place.open()
    data = store.get_bytes(key) if key else store.read_file(place.product, "metrics.jsonl")
    rows = [json.loads(line) for line in (data or b"").decode().splitlines()]
    kinds = ("loss", "grad_norm", "heldout/loss")
    return [(row["step"], kind, row[kind]) for row in rows for kind in kinds if kind in row]


def check(place: Place, whole: Curve) -> list[str]:
    """Failed checks after the last attempt of a case; empty if all hold."""
    faults = [f"still runs: {words}" for words in wait_for_nobody(place)]
    store, product = place.open(), place.product
    if store.read_manifest(product) is None:
        return [*faults, "nothing is committed"]
    if curve_of(place) != whole:
        faults.append("the product's curve is not the unbroken run's")
    if curve_of(place, f"{product}/job/metrics.jsonl") != whole:
        faults.append("the record is not the unbroken run's")
    if store.list(f"{product}/checkpoints"):
        faults.append("checkpoints of the committed stage are left")
    manifests = [key.rpartition("/")[0] for key in store.list("products") if key.endswith("/manifest.json")]
    with tempfile.TemporaryDirectory(prefix="radlads-drill-") as into:
        for prefix in manifests:
            store.fetch(prefix, Path(into, "product"))
    if len(manifests) < 4:
        faults.append(f"only {len(manifests)} products are there")
    for prefix in (f"runs/{RUN}", product):
        if not json.loads(store.get_bytes(f"{prefix}/lease.json") or b"{}").get("released"):
            faults.append(f"the lease on {prefix} was not given back")
    return faults


def copy_base(base: Path, place: Place) -> None:
    """Make the products of the stages before the killed one, so that no case repeats them."""
    store = place.open()
    for path in sorted(base.rglob("*")):
        key = path.relative_to(base).as_posix()
        if path.is_file() and not key.startswith((f"products/{STAGE}/", ".locks")) and not key.endswith("lease.json"):
            store.put_file(key, path)


@contextmanager
def open_place(folder: Path, kind: str, s3: str) -> Iterator[Place]:
    """A place with a store of the kind: `folder`, or `s3` behind a proxy."""
    folder.mkdir(parents=True)
    if kind == "folder":
        yield Place(folder, kind)
        return
    with FaultProxy(s3) as proxy:
        yield Place(folder, kind, proxy)


def hook(place: Place, flow: list[subprocess.Popen[bytes]], victim: str, done: threading.Event) -> Callable[[], None]:
    """For a rule of the proxy: kill -9 the victim, the first time."""

    def kill() -> None:
        pid = find_victim(place, victim, flow[0].pid) if flow and not done.is_set() else None
        if pid is not None:
            done.set()
            os.kill(pid, signal.SIGKILL)

    return kill


def remove(place: Place) -> None:
    """Free the disk."""
    shutil.rmtree(place.folder, ignore_errors=True)


def rule_for(moment: str, step: int, act: str, kill: Callable[[], None]) -> Rule:
    """The proxy's rule for a moment that only requests show."""
    place = f"checkpoints/step-{step:06d}/"
    pattern = {
        "save": rf"^[^?]*{place}",
        "upload": rf"^[^?]*{place}(state|random|metrics|checkpoint)",
        "checkpoint's manifest": rf"^[^?]*{place}manifest",
        "commit": rf"^[^?]*{STAGE}/[0-9a-f]+/(model/|train\.json|metrics\.jsonl)",
        "product's manifest": rf"^[^?]*{STAGE}/[0-9a-f]+/manifest",
    }[moment]
    return Rule("PUT|POST", pattern, act, hook=kill)
