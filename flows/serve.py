"""The two servers, each behind its Door: `python -m radlads.flows.serve prefect|mlflow PORT HOME`.

services.py starts them on loopback, with their settings in the environment. With `--network NAME` a server listens on
all interfaces, sets itself up, and answers at that name too, for containers whose port the host publishes on loopback;
the password is then RADLADS_SERVICES_PASSWORD. They are the same applications that `prefect server start` and `mlflow
server` run; those commands offer no way to check a request's host and origin first.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn

from radlads.flows.door import LOOPBACK, Door
from radlads.flows.server_settings import QUIET, server_settings
from radlads.flows.service_password import read_password
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.settings import services_password

_OPEN = {"/health", "/version"}


def prefect_app(port: int, names: Sequence[str] = ()) -> Any:
    """Prefect's server. It checks the password itself, in its pages too."""
    from prefect.server.api.server import create_app

    return Door(create_app(final=True), port=port, names=names)


def mlflow_app(port: int, home: Path, password: str | None, names: Sequence[str] = ()) -> Any:
    """MLflow's server over the database and the folder in `home`; the browser prompts for the password."""
    from mlflow.server.fastapi_app import app
    from mlflow.server.handlers import initialize_backend_stores

    initialize_backend_stores(f"sqlite:///{home}/mlflow.db", f"sqlite:///{home}/mlflow.db", "mlflow-artifacts:/")
    return Door(app, port=port, password=password, open_paths=_OPEN, names=names)


def parser() -> argparse.ArgumentParser:
    """The arguments of this program."""
    made = argparse.ArgumentParser(prog="python -m radlads.flows.serve")
    made.add_argument("server", choices=["prefect", "mlflow"])
    made.add_argument("port", type=int)
    made.add_argument("home", type=Path, help="Folder of the server's data.")
    made.add_argument("--network", metavar="NAME", help="Listen on all interfaces, and answer at this name too.")
    made.add_argument("--page", help="Address of its page for browsers, if not the port of loopback.")
    return made


def main() -> None:
    """Serve until SIGTERM."""
    asked = parser().parse_args()
    names = [asked.network] if asked.network else []
    if names:
        try:
            password = services_password()
        except UserError as error:
            sys.exit(f"error: {error}")
        made = server_settings(
            asked.server, asked.home, asked.port, password=password, page=asked.page, names=names
        )  # before Prefect and MLflow are imported
        os.environ.update({**QUIET, "PREFECT_HOME": str(asked.home / "prefect"), **made})
    app = (
        prefect_app(asked.port, names)
        if asked.server == "prefect"
        else mlflow_app(asked.port, asked.home, password if names else read_password(asked.home), names)
    )
    host = "0.0.0.0" if names else LOOPBACK[0]
    uvicorn.run(app, host=host, port=asked.port, timeout_keep_alive=5, log_level="warning", server_header=False)


if __name__ == "__main__":
    main()
