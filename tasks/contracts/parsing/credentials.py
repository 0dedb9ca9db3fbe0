"""Credentials in addresses: removed on input, kept in memory, never stored.

The remaining address may be shown and stored. Child processes get the credentials through their environment, which
only their own user can read. All output (messages, logs, records) passes through `hide`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

VARIABLE = "RADLADS_CREDENTIALS"
"""Environment variable of jobs: JSON, scheme://host → user:password, percent-encoded as in an address."""
HIDDEN = "***"
_SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "PREFECT_API_KEY",
    "RADLADS_API_KEY",
    "RADLADS_NOTIFY_URL",
    "RADLADS_SERVICES_PASSWORD",
    "WANDB_API_KEY",
    "PREFECT_API_AUTH_STRING",
    "PREFECT_SERVER_API_AUTH_STRING",
)
_SHORTEST_SECRET = 6
_SURELY_SECRET = 16
"""Minimum length of a secret that cannot occur in a recipe by chance."""
_ADDRESS = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*://)(?P<user>[^/?#]*)@(?P<host>[^/?#@]*)(?P<rest>.*)", re.S)
_IN_ADDRESS = re.compile(r"://[^\s'\"<>]*@")
_IN_QUERY = re.compile(
    r"(?i)([?&;](?:x-amz-(?:signature|credential|security-token)|signature|sig|awsaccesskeyid|password|passwd|pwd|token"
    r"|access_token|api_key)=)[^&;\s'\"<>]+"
)
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16})\b")

_kept: dict[str, str] = {}
_secrets: set[str] = set()


@dataclass(frozen=True)
class Secret:
    """A secret in a document. keys: its location. what, cure: texts for the message."""

    keys: tuple[str, ...]
    what: str
    cure: str


def learn(environment: Mapping[str, str]) -> None:
    """Register the credentials of an environment: those passed by a parent process, and those to hide."""
    for name in _SECRET_VARIABLES:
        _note(environment.get(name, ""))
    for place, user in json.loads(environment.get(VARIABLE) or "{}").items():
        _keep(place, user)


def take_credentials(address: str) -> str:
    """The address without user and password, which this process keeps for `with_credentials`."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        return address
    clean = f"{match['scheme']}{match['host']}{match['rest']}"
    _keep(_place(clean), match["user"])
    return clean


def has_credentials(address: str) -> bool:
    """Whether the address contains a user, a password or a signature."""
    return _ADDRESS.fullmatch(address) is not None or _IN_QUERY.search(address) is not None


def credentials_of(address: str) -> str | None:
    """The known user:password of an address, percent-encoded; None if there is none."""
    return _kept.get(_place(address))


def with_credentials(address: str) -> str:
    """The address with its credentials, for a client. Must not be shown or stored."""
    user = credentials_of(address)
    scheme, _, rest = address.partition("://")
    return f"{scheme}://{user}@{rest}" if user else address


def child_environment() -> dict[str, str]:
    """Environment variables that pass the credentials to a child process."""
    return {VARIABLE: json.dumps(_kept)} if _kept else {}


def hide(text: str) -> str:
    """The text without known secrets and without anything that looks like a password in an address."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _IN_ADDRESS.sub(f"://{HIDDEN}@", text)
    text = _IN_QUERY.sub(rf"\g<1>{HIDDEN}", text)
    return _TOKEN.sub(HIDDEN, text)


def find_secret(values: Any) -> Secret | None:
    """The first secret among nested values; None if there is none. The result does not contain the secret."""
    for keys, text in _texts(values, ()):
        if re.search(r"://[^\s/@]*:[^\s/@]*@", text):
            return Secret(keys, "a password in an address", "remove it, and set it in the environment of the jobs")
        if _IN_QUERY.search(text):
            return Secret(
                keys, "a signed address", "use the plain one, and set credentials in the environment of the jobs"
            )
        if _TOKEN.search(text):
            return Secret(keys, "an access key or token", "set it in the environment of the jobs (HF_TOKEN, AWS_...)")
        if any(len(secret) >= _SURELY_SECRET and secret in text for secret in _secrets):
            return Secret(keys, "a password or key of the environment", "remove it")
    return None


class HidingFormatter(logging.Formatter):
    """Formats log records, tracebacks included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        return hide(super().format(record))


def _keep(place: str, user: str) -> None:
    _kept[place] = user
    password = user.partition(":")[2] or user
    for secret in (user, password, unquote(password)):
        _note(secret)


def _note(secret: str) -> None:
    if len(secret) >= _SHORTEST_SECRET:
        _secrets.add(secret)


def _place(address: str) -> str:
    scheme, _, rest = address.partition("://")
    return f"{scheme}://{re.split('[/?#]', rest)[0]}".lower()


def _texts(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, str):
        yield keys, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield keys, key
            yield from _texts(item, (*keys, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _texts(item, (*keys, str(number)))
