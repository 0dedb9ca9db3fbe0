"""The Prefect server, its worker and the MLflow server on loopback: started, monitored and stopped together.

The running processes are listed in `.radlads/services.json`; a process counts as one of them only if its start time is
the one in that file. Both servers require the password in `.radlads/services-password`, which only this user can read;
child processes get it in their environment, never on a command line, and it is never logged.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from radlads.flows.server_settings import QUIET, server_settings
from radlads.flows.service_password import make_password, read_password
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.credentials import learn, take_credentials
from radlads.tasks.contracts.parsing.files import file_errors, private_folder, write_private
from radlads.tasks.contracts.settings import HEARTBEAT_SECONDS

HOST = "127.0.0.1"
_PORTS = {"prefect": 4200, "mlflow": 5000}
_HEALTH = {"prefect": "/api/health", "mlflow": "/health"}
_START_SECONDS = 240.0
_STOP_SECONDS = 15.0


@dataclass(frozen=True)
class Service:
    """One background process. url: its address; None for the worker. started: its creation time, which distinguishes it
    from a later process with the same pid."""

    name: str
    pid: int
    started: float
    url: str | None
    log: str
    guarded: bool = False
    """Whether it requires the password. Servers started by an older release do not."""

    def is_alive(self) -> bool:
        """Whether this process, and not a later one with its pid, runs."""
        try:
            process = psutil.Process(self.pid)
            same = abs(float(process.create_time()) - self.started) < 1
            return same and str(process.status()) != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


def services_up(home: Path, *, wait_seconds: float = _START_SECONDS) -> dict[str, Service]:
    """Start the services that do not run yet, wait until they answer, create work pool and limits. Raises UserError."""
    with file_errors(f"the folder {home}"):
        home.mkdir(parents=True, exist_ok=True)
    password = make_password(home)
    if not all(service.guarded for service in read_services(home).values()):
        services_down(home)
    running = read_services(home)
    for name in ("prefect", "mlflow"):
        if name not in running:
            running[name] = _start_server(home, name)
            _write(home, running)
    for name in ("prefect", "mlflow"):
        _wait_until_healthy(running[name], wait_seconds)
    for stale in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):  # may point at earlier services
        os.environ.pop(stale, None)
    use_services(home)
    from radlads.deployments.bootstrap import WORK_POOL, bootstrap  # reads the server's address on import
    from radlads.flows.common import orchestrator

    with orchestrator():
        bootstrap()
    if "worker" not in running:
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", WORK_POOL, "--type", "process"]
        running["worker"] = _start(
            home, "worker", command, None, _environment(home) | service_settings(running, password)
        )
        _write(home, running)
    return running


def services_down(home: Path) -> list[str]:
    """Stop the running services, the worker first so that it can hand back its runs; returns their names."""
    running = read_services(home)
    stopped: list[str] = [name for name in ("worker", "mlflow", "prefect") if name in running]
    for name in stopped:
        _stop(running[name])
    _state_file(home).unlink(missing_ok=True)
    return stopped


def read_services(home: Path) -> dict[str, Service]:
    """The services that were started with this folder and still run."""
    try:
        known = json.loads(_state_file(home).read_text(encoding="utf-8"))
        services = {str(name): _service(fields) for name, fields in known.items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"cannot read {_state_file(home)}: {error.strerror}; is it another user's?") from None
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        raise UserError(f"{_state_file(home)} was altered after `radlads services up` wrote it; delete it, and end "
                        "by hand the services that still run") from None  # fmt: skip
    return {name: service for name, service in services.items() if service.is_alive()}


def is_healthy(service: Service) -> bool:
    """Whether a server answers; a worker is as healthy as its process."""
    if service.url is None:
        return service.is_alive()
    return answers(service.url + _HEALTH[service.name])


def answers(address: str) -> bool:
    """Whether a server answers a question after its health, without a proxy."""
    import httpx

    try:
        with httpx.Client(trust_env=False, timeout=5) as client:
            return client.get(address).status_code == 200
    except httpx.HTTPError:
        return False


def service_settings(running: Mapping[str, Service], password: str | None) -> dict[str, str]:
    """Variables that point Prefect and the pipelines at the services, the password in them."""
    settings = {**QUIET, "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS)}
    if "prefect" in running:
        settings["PREFECT_API_URL"] = f"{running['prefect'].url}/api"
        if password:
            settings["PREFECT_API_AUTH_STRING"] = password
    if "mlflow" in running:
        url = str(running["mlflow"].url)
        settings["RADLADS_TRACKING"] = url.replace("://", f"://{password}@", 1) if password else url
    return settings


def use_services(home: Path) -> None:
    """Point this process at the running services; call it before Prefect is imported. Variables that the user has set
    stay, and the password is sent to no server but these."""
    _bypass_proxies(os.environ)
    running = read_services(home)
    settings = service_settings(running, read_password(home) if running else None)
    if os.environ.get("PREFECT_API_URL", settings.get("PREFECT_API_URL")) != settings.get("PREFECT_API_URL"):
        settings.pop("PREFECT_API_AUTH_STRING", None)
    for key, value in settings.items():
        os.environ.setdefault(key, value)
    learn(os.environ)
    take_credentials(settings.get("RADLADS_TRACKING", ""))
    # Without a server, Prefect starts one for the duration of a run, which can be slow on a busy machine.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")


def shell_settings(home: Path) -> list[str]:
    """Shell lines that point `prefect`, and `radlads` in another folder, at the services. Raises UserError if they do
    not run."""
    running = read_services(home)
    if "prefect" not in running or "mlflow" not in running:
        raise UserError("the services do not run; start them with: radlads services up")
    settings = service_settings(running, read_password(home)) | {"NO_PROXY": _with_loopback(os.environ)}
    return [f"export {key}={shlex.quote(value)}" for key, value in settings.items()]


def _start_server(home: Path, name: str) -> Service:
    port = _free_port(_PORTS[name])
    url = f"http://{HOST}:{port}"
    env = _environment(home) | server_settings(name, home, port, password=make_password(home))
    command = [sys.executable, "-m", "radlads.flows.serve", name, str(port), str(home)]
    return _start(home, name, command, url, env)


def _environment(home: Path) -> dict[str, str]:
    """The environment of every service: the user's, a separate Prefect database, absolute paths."""
    other_servers = ("PREFECT_API_", "PREFECT_SERVER_", "MLFLOW_SERVER_", "MLFLOW_TRACKING_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(other_servers)}
    # Safe path: files in the working directory must not shadow a module.
    env |= {**QUIET, "PREFECT_HOME": str(home / "prefect"), "RADLADS_HOME": str(home), "PYTHONSAFEPATH": "1"}
    _bypass_proxies(env)
    return env


def _bypass_proxies(env: MutableMapping[str, str]) -> None:
    env["NO_PROXY"] = env["no_proxy"] = _with_loopback(env)


def _with_loopback(env: Mapping[str, str]) -> str:
    known = env.get("NO_PROXY") or env.get("no_proxy") or ""
    return known if HOST in known else ",".join(part for part in (known, HOST, "localhost") if part)


def _start(home: Path, name: str, command: list[str], url: str | None, env: dict[str, str]) -> Service:
    log = private_folder(home / "logs") / f"{name}.log"
    with file_errors(str(log)), log.open("ab") as stream:
        process = subprocess.Popen(
            command,
            cwd=home.parent,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            preexec_fn=_hear_interrupts,
            umask=-1 if url is None else 0o077,  # the worker's files follow the user's umask
        )
    started = psutil.Process(process.pid).create_time()
    return Service(name=name, pid=process.pid, started=started, url=url, log=str(log), guarded=True)


def _hear_interrupts() -> None:
    """Restore SIGINT's default action. A process started in the background of a shell script ignores SIGINT, and
    Prefect's worker stops itself by that signal."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait_until_healthy(service: Service, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        healthy = is_healthy(service)
        if not service.is_alive():  # checked after the answer, which may come from another server on the port
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


def _free_port(preferred: int) -> int:
    for port in (*range(preferred, preferred + 10), 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise UserError(f"no free port on {HOST}")


def _state_file(home: Path) -> Path:
    return home / "services.json"


def _write(home: Path, running: Mapping[str, Service]) -> None:
    write_private(_state_file(home), json.dumps({name: asdict(service) for name, service in running.items()}, indent=1))


def _service(fields: Any) -> Service:
    service = Service(**fields)
    if not (isinstance(service.pid, int) and service.pid > 0 and isinstance(service.started, int | float)):
        raise ValueError("not a process")
    return service
