"""The two servers, each behind its Door: `python -m radlads.flows.serve prefect|mlflow PORT HOME`.

services.py starts them, with their settings in the environment. They are the same applications that `prefect server
start` and `mlflow server` run; those commands offer no way to check a request's host and origin first.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import uvicorn

from radlads.flows.door import LOOPBACK, Door
from radlads.flows.service_password import read_password

_OPEN = {"/health", "/version"}


def prefect_app(port: int) -> Any:
    """Prefect's server. It checks the password itself, in its pages too."""
    from prefect.server.api.server import create_app

    return Door(create_app(final=True), port=port)


def mlflow_app(port: int, home: Path) -> Any:
    """MLflow's server over the database and the folder in `home`; the browser prompts for the password."""
    from mlflow.server.fastapi_app import app
    from mlflow.server.handlers import initialize_backend_stores

    initialize_backend_stores(f"sqlite:///{home}/mlflow.db", f"sqlite:///{home}/mlflow.db", "mlflow-artifacts:/")
    return Door(app, port=port, password=read_password(home), open_paths=_OPEN)


def main() -> None:
    """Serve until SIGTERM."""
    name, port, home = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    app = prefect_app(port) if name == "prefect" else mlflow_app(port, home)
    uvicorn.run(app, host=LOOPBACK[0], port=port, timeout_keep_alive=5, log_level="warning", server_header=False)


if __name__ == "__main__":
    main()
