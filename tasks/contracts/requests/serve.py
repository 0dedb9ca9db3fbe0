"""Request of `radlads serve` to the program that answers an OpenAI-compatible API."""

from __future__ import annotations

import ipaddress

from pydantic import Field, model_validator

from radlads.tasks.contracts.job import Sheet
from radlads.tasks.contracts.requests.talk import ModelsRequest


class ServingLimits(Sheet):
    """What one server takes on at once, and of one request."""

    max_batch: int = Field(default=32, ge=1, le=1024)
    """Requests that are answered together; each holds a state."""
    max_waiting: int = Field(default=128, ge=0, le=100_000)
    """Requests beyond them that wait; further ones are refused."""
    max_prompt_tokens: int = Field(default=32_768, ge=1)
    max_new_tokens: int = Field(default=4096, ge=1)
    """Longest answer, and that of a chat that names no length."""
    max_body_bytes: int = Field(default=4 << 20, ge=1024)


class ServeRequest(ModelsRequest):
    """Serve one model. Raises ValueError for an address that others reach, without a key."""

    name: str = Field(min_length=1, max_length=200)
    """By which clients ask for the model."""
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, lt=1 << 16)
    """0: one that is free."""
    has_key: bool = False
    """Whether the program's environment has the key that clients must send (`serving_key` in settings.py)."""
    limits: ServingLimits = ServingLimits()

    @model_validator(mode="after")
    def _needs_a_key(self) -> ServeRequest:
        if not self.has_key and not is_loopback(self.host):
            raise ValueError(
                f"{self.host} is reached from other machines, so clients need a key: set RADLADS_API_KEY, or name "
                "another variable by --api-key; or leave out --host"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
