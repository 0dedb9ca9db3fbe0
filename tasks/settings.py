"""Where things are kept unless a run says otherwise. The one place that turns the environment into settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from radlads.tasks.job import StoreRef, UserError


@dataclass(frozen=True)
class Settings:
    """home: folder of everything that is kept locally. work: scratch of running jobs. tracking: MLflow's uri, or ""
    for none. grace_seconds: what a stopped job gets to save a checkpoint. retries: of a stage that crashed, before
    the run fails and waits for a person."""

    home: Path
    store: StoreRef
    tracking: str
    work: Path
    grace_seconds: float
    retries: int
    gpu_limit: str = "radlads-gpu"
    """Prefect's global concurrency limit that a job on a GPU holds."""

    @property
    def content_cache(self) -> Path:
        """File that remembers what large files hold, so that a teacher is not read whole at every start."""
        return self.work / "content.json"


def resolve_settings(
    *,
    store: str | None = None,
    tracking: str | None = None,
    work: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """Arguments win over RADLADS_* variables, which win over `.radlads` in the working directory.

    store: `s3://bucket/prefix` or a folder (RADLADS_STORE; the endpoint of S3 is RADLADS_S3_ENDPOINT). tracking:
    `http://server`, `sqlite:///file`, or `none` (RADLADS_TRACKING). work: RADLADS_WORK. Raises UserError.
    """
    env = os.environ if environment is None else environment
    home = Path(env.get("RADLADS_HOME", ".radlads")).expanduser().absolute()
    return Settings(
        home=home,
        store=_store_ref(store or env.get("RADLADS_STORE") or str(home / "store"), env),
        tracking=_tracking_uri(tracking or env.get("RADLADS_TRACKING") or f"sqlite:///{home}/mlflow.db"),
        work=Path(work or env.get("RADLADS_WORK") or home / "work").expanduser().absolute(),
        grace_seconds=_number(env, "RADLADS_GRACE_SECONDS", 60.0),
        retries=int(_number(env, "RADLADS_RETRIES", 1)),
    )


def _store_ref(uri: str, env: Mapping[str, str]) -> StoreRef:
    if not uri.startswith("s3://"):
        return StoreRef(uri=uri if "://" in uri else str(Path(uri).expanduser().absolute()))
    endpoint = env.get("RADLADS_S3_ENDPOINT") or env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL")
    return StoreRef(uri=uri.rstrip("/"), endpoint_url=endpoint, region=env.get("AWS_DEFAULT_REGION"))


def _tracking_uri(uri: str) -> str:
    if uri == "none":
        return ""
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///")).expanduser().absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{path}"
    if uri.startswith(("http://", "https://", "postgresql://", "mysql://")):
        return uri
    raise UserError(
        f"tracking '{uri}' is not an MLflow server (http://...), a database (sqlite:///file.db) or 'none'; "
        "MLflow no longer keeps runs in a plain folder"
    )


def _number(env: Mapping[str, str], name: str, default: float) -> float:
    text = env.get(name)
    try:
        number = float(text) if text else default
    except ValueError:
        number = -1.0
    if number < 0:
        raise UserError(f"{name} is '{text}', which is not a number of 0 or more")
    return number
