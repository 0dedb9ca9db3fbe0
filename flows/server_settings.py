"""Settings of the two servers, as variables that Prefect and MLflow read on import."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from radlads.flows.door import LOOPBACK, own_origins
from radlads.tasks.contracts.parsing.files import private_folder

QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Otherwise it starts eleven processes that take 2 GB, for a feature that is not used here.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


def server_settings(
    name: str, home: Path, port: int, *, password: str, page: str | None = None, names: Sequence[str] = ()
) -> dict[str, str]:
    """Of the server `prefect` or `mlflow`, which keeps its data in `home` and listens on `port`; makes its folder.

    password: `user:password`, which Prefect checks itself. page: its address for a browser, where that is not the port
    of loopback. names: those of a network at which it is asked besides loopback's.
    """
    page = page or f"http://{LOOPBACK[0]}:{port}"
    origins = ",".join(dict.fromkeys([*own_origins(port), page]))
    if name == "prefect":
        private_folder(home / "prefect")
        return {
            "PREFECT_SERVER_API_AUTH_STRING": password,
            "PREFECT_SERVER_API_HOST": LOOPBACK[0],
            "PREFECT_SERVER_API_PORT": str(port),
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": origins,
            "PREFECT_SERVER_UI_API_URL": f"{page}/api",  # the page would call port 4200 otherwise
            "PREFECT_UI_URL": page,  # in notices
        }
    private_folder(home / "mlflow-artifacts")
    return {
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{home}/mlflow.db",
        "_MLFLOW_SERVER_REGISTRY_STORE": f"sqlite:///{home}/mlflow.db",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(home / "mlflow-artifacts"),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(f"{host},{host}:*" for host in (*LOOPBACK[:2], *names)),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": origins,
    }
