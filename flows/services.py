"""The Prefect server, its worker and the MLflow server on loopback: started, watched over and stopped together.

What runs is written to `.radlads/services.json`; a process is ours only if it was started when that file says.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import psutil

from radlads.tasks.job import UserError

_HOST = "127.0.0.1"
_PORTS = {"prefect": 4200, "mlflow": 5000}
_HEALTH = {"prefect": "/api/health", "mlflow": "/health"}
_START_SECONDS = 240.0
_STOP_SECONDS = 15.0
_HEARTBEAT_SECONDS = "60"  # of a flow run; deployments/zombies.py waits for several
_QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Eleven processes and 2 GB otherwise, for a feature that is not used here.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


@dataclass(frozen=True)
class Service:
    """One background process. url: where it answers; None for the worker. started: its creation time, which tells it
    from another process that got its number."""

    name: str
    pid: int
    started: float
    url: str | None
    log: str

    def is_alive(self) -> bool:
        """Whether the very process runs."""
        try:
            process = psutil.Process(self.pid)
            same = abs(float(process.create_time()) - self.started) < 1
            return same and str(process.status()) != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


def services_up(home: Path, *, wait_seconds: float = _START_SECONDS) -> dict[str, Service]:
    """Start what does not run yet, wait until it answers, and make work pool and limits. Raises UserError."""
    home.mkdir(parents=True, exist_ok=True)
    running = read_services(home)
    for name in ("prefect", "mlflow"):
        if name not in running:
            running[name] = _start_server(home, name)
            _write(home, running)
    for name in ("prefect", "mlflow"):
        _wait_until_healthy(running[name], wait_seconds)
    use_services(running)
    from radlads.deployments.bootstrap import WORK_POOL, bootstrap  # reads the server's address as it is imported

    bootstrap()
    if "worker" not in running:
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", WORK_POOL, "--type", "process"]
        running["worker"] = _start(home, "worker", command, None, _environment(home) | service_settings(running))
        _write(home, running)
    return running


def services_down(home: Path) -> list[str]:
    """Stop what runs, the worker first so that it can hand back its runs; the names of what was stopped."""
    running = read_services(home)
    stopped: list[str] = [name for name in ("worker", "mlflow", "prefect") if name in running]
    for name in stopped:
        _stop(running[name])
    _state_file(home).unlink(missing_ok=True)
    return stopped


def read_services(home: Path) -> dict[str, Service]:
    """What was started from here and still runs."""
    try:
        known = json.loads(_state_file(home).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    services = {name: Service(**fields) for name, fields in known.items()}
    return {name: service for name, service in services.items() if service.is_alive()}


def is_healthy(service: Service) -> bool:
    """Whether a server answers; a worker is as healthy as its process."""
    if service.url is None:
        return service.is_alive()
    try:
        with httpx.Client(trust_env=False, timeout=5) as client:
            return client.get(service.url + _HEALTH[service.name]).status_code == 200
    except httpx.HTTPError:
        return False


def service_settings(running: Mapping[str, Service]) -> dict[str, str]:
    """Variables that point Prefect and the pipelines at the services."""
    settings = {**_QUIET, "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": _HEARTBEAT_SECONDS}
    if "prefect" in running:
        settings["PREFECT_API_URL"] = f"{running['prefect'].url}/api"
    if "mlflow" in running:
        settings["RADLADS_TRACKING"] = str(running["mlflow"].url)
    return settings


def use_services(running: Mapping[str, Service]) -> None:
    """Point this process at the services; before Prefect is imported. What the user set already stays."""
    _bypass_proxies(os.environ)
    for key, value in service_settings(running).items():
        os.environ.setdefault(key, value)
    # Without a server, Prefect starts one for the length of a run; a busy machine takes its time over that.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")


def _start_server(home: Path, name: str) -> Service:
    port = _free_port(_PORTS[name])
    url = f"http://{_HOST}:{port}"
    env = _environment(home)
    address = ["--host", _HOST, "--port", str(port)]
    if name == "prefect":
        command = [sys.executable, "-m", "prefect", "server", "start", *address]
        env["PREFECT_SERVER_UI_API_URL"] = f"{url}/api"  # the page asks port 4200 otherwise, whatever the server's is
    else:
        data = ["--backend-store-uri", f"sqlite:///{home}/mlflow.db"]
        files = ["--artifacts-destination", str(home / "mlflow-artifacts"), "--serve-artifacts"]
        command = [sys.executable, "-m", "mlflow", "server", *data, *files, *address, "--workers", "1"]
    return _start(home, name, command, url, env)


def _environment(home: Path) -> dict[str, str]:
    """What every service gets: the user's environment, a Prefect database of our own, places that do not depend on
    the working directory."""
    env = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    # Safe path: whatever lies in the working directory must not shadow a module.
    env |= {**_QUIET, "PREFECT_HOME": str(home / "prefect"), "RADLADS_HOME": str(home), "PYTHONSAFEPATH": "1"}
    _bypass_proxies(env)
    return env


def _bypass_proxies(env: MutableMapping[str, str]) -> None:
    known = env.get("NO_PROXY") or env.get("no_proxy") or ""
    if _HOST not in known:
        env["NO_PROXY"] = env["no_proxy"] = ",".join(part for part in (known, _HOST, "localhost") if part)


def _start(home: Path, name: str, command: list[str], url: str | None, env: dict[str, str]) -> Service:
    log = home / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command,
            cwd=home.parent,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            preexec_fn=_hear_interrupts,
        )
    return Service(name=name, pid=process.pid, started=psutil.Process(process.pid).create_time(), url=url, log=str(log))


def _hear_interrupts() -> None:
    """Started from a shell script's background, a process ignores SIGINT, and Prefect's worker, which stops itself by
    that signal, cannot be stopped any more."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait_until_healthy(service: Service, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        healthy = is_healthy(service)
        if not service.is_alive():  # asked second: another server may answer at a port that ours did not get
            raise UserError(f"{service.name} did not start; its log is {service.log}:\n{_log_end(service)}")
        if healthy:
            return
        if time.monotonic() >= end:
            raise UserError(f"{service.name} does not answer at {service.url} after {seconds:.0f} s; see {service.log}")
        time.sleep(0.5)


def _log_end(service: Service) -> str:
    lines = Path(service.log).read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"  {line[:200]}" for line in lines[-5:])


def _stop(service: Service) -> None:
    try:
        process = psutil.Process(service.pid)
        family = [process, *process.children(recursive=True)]
        process.terminate()
    except psutil.NoSuchProcess:
        return
    _, left = psutil.wait_procs(family, timeout=_STOP_SECONDS)
    for straggler in left:
        try:
            straggler.kill()
        except psutil.NoSuchProcess:
            continue


def _free_port(wanted: int) -> int:
    for port in (*range(wanted, wanted + 10), 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise UserError(f"no free port on {_HOST}")


def _state_file(home: Path) -> Path:
    return home / "services.json"


def _write(home: Path, running: Mapping[str, Service]) -> None:
    text = json.dumps({name: asdict(service) for name, service in running.items()}, indent=1)
    temporary = _state_file(home).with_suffix(".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(_state_file(home))
