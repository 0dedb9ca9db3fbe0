"""Default places of store, scratch and tracking. Only this module turns the environment into settings."""

from __future__ import annotations

import errno
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import StoreRef
from radlads.tasks.contracts.parsing.credentials import has_credentials, hide, learn, take_credentials
from radlads.tasks.contracts.parsing.document import one_line
from radlads.tasks.contracts.parsing.files import file_errors

HEARTBEAT_SECONDS = 60
"""Seconds between two heartbeats of a flow run; deployments/zombies.py waits for several."""
API_KEY = "RADLADS_API_KEY"
"""The key that clients of `radlads serve` must send."""
SERVICES_PASSWORD = "RADLADS_SERVICES_PASSWORD"
"""`user:password` of the servers of Prefect and MLflow where they serve a network of containers."""
_SERVICES_PASSWORD = re.compile(r"[A-Za-z0-9_-]+:[A-Za-z0-9_-]{16,}")
_KEY = re.compile(r"[!-~]+")
_SHORTEST_KEY = 8
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_BUCKET = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{1,253}[a-zA-Z0-9]")
_DATABASE = re.compile(r"(postgresql|mysql|mssql)(\+[a-z0-9_]+)?://")
_WANDB = re.compile(r"wandb:(?:[A-Za-z0-9_.-]{1,64}/)?[A-Za-z0-9_.-]{1,128}")
_LONGEST_PLACE = 1024
_LARGEST_NUMBER = 1e6


@dataclass(frozen=True)
class Settings:
    """home: folder of all local files. work: scratch of running jobs. tracking: MLflow's uri, or "" for none.
    grace_seconds: time for a stopped job to save a checkpoint. retries: of a crashed stage, before the run fails."""

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
        """File that caches hashes of large files, so that a teacher is not read in full at every start."""
        return self.work / "content.json"


def resolve_settings(
    *,
    store: str | None = None,
    tracking: str | None = None,
    work: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """Arguments take precedence over RADLADS_* variables, these over `.radlads` in the working directory.

    store: `s3://bucket/prefix` or a folder (RADLADS_STORE; the endpoint of S3 is RADLADS_S3_ENDPOINT). tracking:
    `http://server`, `sqlite:///file`, `wandb:PROJECT`, or `none` (RADLADS_TRACKING). work: RADLADS_WORK. User and
    password are removed from addresses and kept in memory (credentials.py): settings contain none. Raises UserError.
    """
    env = os.environ if environment is None else environment
    learn(env)
    home = _folder("RADLADS_HOME", env.get("RADLADS_HOME") or ".radlads")
    return Settings(
        home=home,
        store=_store_ref(_first(store, env.get("RADLADS_STORE"), str(home / "store")), env),
        tracking=_tracking_uri(_first(tracking, env.get("RADLADS_TRACKING"), f"sqlite:///{home}/mlflow.db")),
        work=_folder("the work folder", _first(work, env.get("RADLADS_WORK"), str(home / "work"))),
        grace_seconds=_number(env, "RADLADS_GRACE_SECONDS", 60.0),
        retries=int(_number(env, "RADLADS_RETRIES", 1, whole=True)),
    )


def serving_key(variable: str | None, environment: Mapping[str, str] | None = None) -> str | None:
    """The key that clients of a server must send, from a variable by its name, or from RADLADS_API_KEY; None if that is
    not set. Raises UserError, without the key."""
    env = os.environ if environment is None else environment
    key = env.get(variable or API_KEY) or None
    learn({API_KEY: key or ""})
    if key is None and variable is not None:
        raise UserError("--api-key takes the name of a variable that has the key, and there is no such variable")
    if key is not None and not (_SHORTEST_KEY <= len(key) <= _LONGEST_PLACE and _KEY.fullmatch(key)):
        raise UserError(
            f"{variable or API_KEY}: a key has {_SHORTEST_KEY} or more letters, digits and signs of ASCII, no spaces"
        )
    return key


def services_password(environment: Mapping[str, str] | None = None) -> str:
    """`user:password` from RADLADS_SERVICES_PASSWORD. Raises UserError, without the password."""
    env = os.environ if environment is None else environment
    learn(env)
    if not _SERVICES_PASSWORD.fullmatch(env.get(SERVICES_PASSWORD, "")):
        raise UserError(
            f"{SERVICES_PASSWORD} is needed: write it as user:password, the password of 16 or more letters, digits, "
            "'_' and '-', which an address takes as they are"
        )
    return env[SERVICES_PASSWORD]


@dataclass(frozen=True)
class Notices:
    """Who is told of a run that failed or waits. url: a webhook, which is a secret. block: kind and name of one of
    Prefect's notification blocks, e.g. `sendgrid-email` and `me`."""

    url: str | None = field(default=None, repr=False)
    block: tuple[str, str] | None = None


def resolve_notices(environment: Mapping[str, str] | None = None) -> Notices:
    """RADLADS_NOTIFY_URL and RADLADS_NOTIFY_BLOCK. Raises UserError, without the address."""
    env = os.environ if environment is None else environment
    learn(env)
    url, block = env.get("RADLADS_NOTIFY_URL") or None, env.get("RADLADS_NOTIFY_BLOCK") or None
    if url is not None and not re.fullmatch(r"https?://[^\s/]+\S*", url):
        raise UserError("RADLADS_NOTIFY_URL is not an address; write it as https://host/path")
    kind, slash, name = (block or "").partition("/")
    if block is not None and not (kind and slash and name):
        raise UserError(
            f"RADLADS_NOTIFY_BLOCK is '{one_line(block, 60)}'; write it as kind/name, e.g. slack-webhook/team"
        )
    return Notices(url, (kind, name) if block is not None else None)


def check_run_name(name: str) -> str:
    """The name, if it is valid as a folder and a label. Raises UserError."""
    if not _RUN_NAME.fullmatch(name):
        raise UserError(
            f"'{one_line(name, 60)}' cannot be a run's name: letters, digits, '.', '_' and '-', at most 128 of them, a "
            "letter or digit first"
        )
    return name


def refuse_credentials(**addresses: str | None) -> None:
    """Refuse addresses with a user and a password in arguments that are stored, such as a flow's parameters. Raises
    UserError."""
    for what, address in addresses.items():
        if address is not None and has_credentials(address):
            raise UserError(
                f"{what}: the address contains a user and a password, and a run's parameters are stored in Prefect's "
                f"database; leave them out here, and set RADLADS_{what.upper()} with them where the worker runs"
            )


def _first(argument: str | None, variable: str | None, default: str) -> str:
    """An empty variable counts as unset; an empty argument is an error."""
    return argument if argument is not None else variable or default


def _check_text(what: str, text: str) -> None:
    if not text.strip() or len(text) > _LONGEST_PLACE or not text.isprintable():
        raise UserError(f"{what} is '{one_line(hide(text), 60)}', which is not a place; leave it out for the default")


def _folder(what: str, text: str) -> Path:
    _check_text(what, text)
    if "://" in text:
        raise UserError(f"{what} is '{one_line(hide(text), 60)}': it must be a folder of this machine")
    with file_errors(f"{what} '{one_line(text, 60)}'"):
        path = Path(text).expanduser().absolute()
        if path.exists() and not path.is_dir():
            raise UserError(f"{what} is {path}, which is a file; give a folder")
    return path


def _store_ref(uri: str, env: Mapping[str, str]) -> StoreRef:
    _check_text("the store", uri)
    if "://" not in uri or uri.startswith("file://"):
        return StoreRef(uri=str(_folder("the store", uri.removeprefix("file://"))))
    if has_credentials(uri):
        raise UserError(
            "the store's address contains a user and a password; give s3://bucket/prefix, and the keys in "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    scheme, _, rest = uri.partition("://")
    bucket, _, prefix = rest.rstrip("/").partition("/")
    parts = prefix.split("/") if prefix else []
    if scheme != "s3" or not _BUCKET.fullmatch(bucket) or any(part in ("", ".", "..") for part in parts):
        raise UserError(f"the store '{one_line(uri, 60)}' is neither s3://bucket/prefix nor a folder")
    endpoint = env.get("RADLADS_S3_ENDPOINT") or env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL")
    return StoreRef(
        uri=uri.rstrip("/"),
        endpoint_url=_web_address("the S3 endpoint (RADLADS_S3_ENDPOINT)", endpoint) if endpoint else None,
        region=env.get("AWS_DEFAULT_REGION"),
    )


def _tracking_uri(uri: str) -> str:
    _check_text("tracking", uri)
    if uri == "none":
        return ""
    if uri.startswith("sqlite:///"):
        where = f"tracking '{one_line(uri, 80)}'"
        with file_errors(where):
            path = Path(uri.removeprefix("sqlite:///")).expanduser().absolute()
            if not uri.removeprefix("sqlite:///") or path.is_dir():
                raise UserError(f"{where} names no file; write sqlite:///file.db")
            if path.is_file():
                with path.open("rb") as stream:
                    head = stream.read(16)
                if head and head != b"SQLite format 3\0":
                    raise UserError(f"{where} is a file of another kind, not an SQLite database")
            folder = next(parent for parent in path.parents if parent.exists())  # missing ones are made at first use
            if not folder.is_dir() or not os.access(folder, os.W_OK):
                number = errno.EACCES if folder.is_dir() else errno.EEXIST
                raise OSError(number, os.strerror(number))
        return f"sqlite:///{path}"
    if uri.startswith("wandb:"):
        if not _WANDB.fullmatch(uri):
            raise UserError(f"tracking '{one_line(uri, 80)}': write W&B as wandb:PROJECT or wandb:ENTITY/PROJECT")
        found = importlib.util.find_spec("wandb")
        if found is None or found.origin is None:  # W&B's own folder of files is no package
            raise UserError(f"tracking '{uri}' needs a package that is not installed: pip install 'radlads[wandb]'")
        return uri
    if uri.startswith(("http://", "https://")):
        return _web_address("tracking", uri)
    if _DATABASE.match(uri):
        clean = take_credentials(uri)
        if has_credentials(clean) or not urlsplit(clean).netloc:
            raise UserError("tracking: write a database as postgresql://user:password@host/name, without ?password=")
        return clean
    raise UserError(
        f"tracking '{one_line(hide(uri), 80)}' is not an MLflow server (http://...), a database (sqlite:///file.db), "
        "wandb:PROJECT or 'none'; MLflow no longer keeps runs in a plain folder"
    )


def _web_address(what: str, text: str) -> str:
    """An http(s) address without its user and password, which are kept in memory. Raises UserError."""
    clean = take_credentials(text)
    try:
        parts = urlsplit(clean)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        good = good and re.fullmatch(r"[A-Za-z0-9._:\[\]-]+", parts.netloc) and not (parts.query or parts.fragment)
    except ValueError:
        good = None
    if not good:
        raise UserError(
            f"{what} is '{one_line(hide(clean), 80)}', which is not a valid address; write it as http://host:port"
        )
    return clean


def _number(env: Mapping[str, str], name: str, default: float, *, whole: bool = False) -> float:
    text = env.get(name)
    try:
        number = float(text or default)
    except ValueError:
        number = math.nan
    if not 0 <= number <= _LARGEST_NUMBER or (whole and not number.is_integer()):
        raise UserError(f"{name} is '{one_line(text or '', 40)}', which is not a {'whole ' * whole}number of 0 or more")
    return number
