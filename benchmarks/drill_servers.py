"""Cases of the drill in which the MLflow or the Prefect server stops during `radlads run`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from drill_case import LIMIT_SECONDS, RECIPE, RUN, STEPS, Curve, Place, wait

_UP_SECONDS = 120.0


class Server:
    """A server of a case, which can be killed and started again on the same port with the same data."""

    def __init__(self, place: Place, name: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self._place, self._name = f"http://127.0.0.1:{port}", place, name
        address = ["--host", "127.0.0.1", "--port", str(port)]
        data = ["--backend-store-uri", f"sqlite:///{place.folder}/mlflow.db"]
        files = ["--artifacts-destination", str(place.folder / "artifacts"), "--workers", "1"]
        self._command = {
            "mlflow": [sys.executable, "-m", "mlflow", "server", *data, *files, *address],
            "prefect": [sys.executable, "-m", "prefect", "server", "start", *address],
        }[name]
        self._health = {"mlflow": f"{self.url}/health", "prefect": f"{self.url}/api/health"}[name]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers. Raises RuntimeError."""
        env = self._place.environment(
            PREFECT_HOME=str(self._place.folder / "prefect"), PREFECT_SERVER_ANALYTICS_ENABLED="false",
            MLFLOW_DISABLE_TELEMETRY="true",
        )  # fmt: skip
        with (self._place.folder / f"{self._name}.log").open("ab") as log:
            # Not in the case's folder: the check for remaining processes of the case must not count it.
            self._process = subprocess.Popen(
                self._command,
                cwd="/",
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end = time.monotonic() + _UP_SECONDS
        while time.monotonic() < end:
            try:
                if httpx.get(self._health, timeout=2.0, trust_env=False).is_success:
                    return
            except httpx.HTTPError:
                time.sleep(0.2)
        raise RuntimeError(f"{self._name} did not come up; see {self._place.folder}/{self._name}.log")

    def kill(self) -> None:
        """kill -9 of it and of its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)  # a session of its own: the group is the server's
            self._process.wait()
            self._process = None


def mlflow_outage(place: Place, whole: Curve) -> str:
    """The MLflow server dies in the middle of the stage and comes back after the run; the next run sends the missing
    metrics."""
    server = Server(place, "mlflow")
    server.start()
    try:
        flow = place.start(_run(place, server.url))
        _kill_at(place, flow, server, STEPS // 4)
        code = wait(flow)
        server.start()
        again = wait(place.start(_run(place, server.url)))
        _check_mirror(server.url, whole)
        return f"the run ended with {code}, the next with {again}; MLflow has every step once"
    finally:
        server.kill()


def prefect_outage(place: Place, _: Curve) -> str:
    """The Prefect server dies in the middle of the stage; it comes back, and the run is started again."""
    server = Server(place, "prefect")
    server.start()
    try:
        settings = {"PREFECT_API_URL": f"{server.url}/api", "PREFECT_HOME": str(place.folder / "prefect")}
        flow = place.start(_run(place, "none"), **settings)
        _kill_at(place, flow, server, STEPS // 4)
        code = wait(flow)
        server.start()
        again = wait(place.start(_run(place, "none"), **settings))
        if again:
            raise RuntimeError(f"the run ended with {code}, started again with {again}")
        return f"the run ended with {code}, started again with 0"
    finally:
        server.kill()


SERVER_CASES: dict[str, Callable[[Place, Curve], str]] = {
    "the MLflow server dies in a stage": mlflow_outage,
    "the Prefect server dies in a stage": prefect_outage,
}


def _run(place: Place, tracking: str) -> list[str]:
    radlads = str(Path(sys.executable).parent / "radlads")
    places = ["--store", place.store, "--work", str(place.folder / "work"), "--tracking", tracking]
    return [radlads, "run", str(RECIPE), "--run", RUN, *places]


def _kill_at(place: Place, flow: subprocess.Popen[bytes], server: Server, step: int) -> None:
    end = time.monotonic() + LIMIT_SECONDS
    while place.rows() < step:
        if flow.poll() is not None or time.monotonic() > end:
            raise RuntimeError("the run ended before the server could be killed")
        time.sleep(0.005)
    server.kill()


def _check_mirror(url: str, whole: Curve) -> None:
    """Raises RuntimeError unless MLflow has the loss of every step, once, in one run."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=url)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = [run for run in client.search_runs(experiments) if "loss" in run.data.metrics]
    actual = [
        sorted((point.step, "loss", point.value) for point in client.get_metric_history(run.info.run_id, "loss"))
        for run in runs
        if run.data.tags.get("mlflow.runName", "").endswith("distill")
    ]
    expected = [point for point in whole if point[1] == "loss"]
    if actual != [expected]:
        raise RuntimeError(f"MLflow has {[len(points) for points in actual]} points of {len(expected)}")
