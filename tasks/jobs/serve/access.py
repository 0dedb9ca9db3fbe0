"""Who may ask: with the key, if there is one, and on loopback by a name of loopback.

A page of another site can make a local browser send requests to loopback under a host name of its own; it learns
nothing of the answers, and its requests are refused by that name, or because they are not declared as JSON.
"""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers

from radlads.tasks.contracts.requests.serve import is_loopback
from radlads.tasks.jobs.serve.refusal import ApiError


class Access:
    """Checks a request's headers."""

    def __init__(self, key: str | None, *, loopback_only: bool) -> None:
        self._key, self._loopback_only = None if key is None else key.encode(), loopback_only

    def check_host(self, headers: Headers) -> None:
        """Raises ApiError for a name that is not of loopback."""
        host = headers.get("host", "").lower()
        name, colon, port = host.rpartition(":")
        name = name if colon and port.isdecimal() else host
        if self._loopback_only and not is_loopback(name.removeprefix("[").removesuffix("]")):
            raise ApiError(403, "this server answers to the names of loopback only")

    def check_key(self, headers: Headers) -> None:
        """Raises ApiError for a request without the key."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if self._key is None:
            return
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key):
            said = "this server needs its key: send it as `Authorization: Bearer KEY`"
            raise ApiError(401, said, code="invalid_api_key")
