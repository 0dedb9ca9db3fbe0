"""Access control for the Prefect and MLflow servers: no pages of other sites, and nobody without the password.

Loopback keeps other machines out. It does not keep out other users of this machine, nor requests that a page of
another site makes a local browser send (across origins, or with a host name that resolves to 127.0.0.1).
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def own_origins(port: int) -> list[str]:
    """The origins of pages that a server at a port of loopback serves itself."""
    return [f"http://{name}:{port}" for name in LOOPBACK]


class Door:
    """An ASGI application that passes requests on to another if they name a loopback host, come from no page or from a
    page of the same server, and carry the password if there is one (HTTP basic authentication).

    port: of the server; a tunnel may end at another one. password: `user:password`, or None if the application checks
    it itself. open_paths: paths that need no password. names: further names of the host, in a network of containers.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        port: int,
        password: str | None = None,
        open_paths: Collection[str] = (),
        names: Collection[str] = (),
    ):
        self._app = app
        self._names = frozenset((*LOOPBACK, *names))
        self._origins = set(own_origins(port))
        self._password = password
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        refusal = self._refusal(scope) if scope["type"] in ("http", "websocket") else None
        if refusal is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            status, text = refusal
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            if status == 401:
                headers.append((b"www-authenticate", b'Basic realm="radlads", charset="UTF-8"'))
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": text.encode()})

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and text of the response to a request that is refused; None for one that is passed on."""
        hosts = _header(scope, b"host")
        if len(hosts) != 1 or _name(hosts[0]) not in self._names:
            return 403, "this server answers to its own names only\n"
        for origin in _header(scope, b"origin"):
            if origin not in self._origins and origin != f"http://{hosts[0]}":
                return 403, "this server answers its own pages only\n"
        if self._password is None or scope["path"] in self._open_paths:
            return None
        given = _header(scope, b"authorization")
        if len(given) == 1 and _is_password(given[0], self._password):
            return None
        return 401, "a password is needed; `radlads services status` says where it is\n"


def _header(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1").lower() if name != b"authorization" else value.decode("latin-1")
            for key, value in scope["headers"] if key.lower() == name]  # fmt: skip


def _name(host: str) -> str:
    """The host of a Host header, without the port."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host


def _is_password(header: str, password: str) -> bool:
    scheme, _, given = header.partition(" ")
    try:
        said = base64.b64decode(given.strip(), validate=True)
    except (binascii.Error, ValueError):
        return False
    return scheme.lower() == "basic" and hmac.compare_digest(said, password.encode())
