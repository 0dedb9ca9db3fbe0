"""What must be the same on every machine of a job, and where its ranks reach each other."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import time
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import Sheet, StoreRef
from radlads.tasks.contracts.store.errors import StoreError
from radlads.tasks.contracts.store.open import Store, find_store, store_id
from radlads.tasks.launchers.devices import count_gpus

_FOLDERS = ("kernels", "model", "tasks")
_PACKAGES = ("torch", "deepspeed", "transformers")


@cache
def code_digest() -> str:
    """sha256 over the sources of radlads that a job runs."""
    root = Path(__file__).resolve().parents[3]
    found = hashlib.sha256()
    for path in sorted(path for folder in _FOLDERS for path in (root / folder).rglob("*.py")):
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def versions() -> dict[str, str]:
    """Of the programs that compute."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def facts_of(store: StoreRef, work: str, visible: str | None) -> dict[str, Any]:
    """This machine as `fault_of` judges it. visible: CUDA_VISIBLE_DEVICES."""
    try:
        data = find_store(store).get_bytes("store-id")
        read, why = ("" if data is None else data.decode(errors="replace").strip()), ""
    except (StoreError, UserError, OSError) as error:
        read, why = "", str(error)
    try:
        Path(work).mkdir(parents=True, exist_ok=True, mode=0o700)
        writable = os.access(work, os.W_OK)
    except OSError:
        writable = False
    return {
        "code": code_digest(),
        "versions": versions(),
        "gpus": count_gpus(visible),
        "time": time.time(),
        "store": read,
        "why": why,
        "work": work if writable else None,
    }


class Expected(Sheet):
    """What the flow's machine has, and what a job of it needs on another one. store: its id. gpus: number."""

    code: str
    versions: dict[str, str]
    store: str
    store_uri: str
    gpus: int
    work: str


def expected(store: Store, gpus: int, work: str) -> Expected:
    """As this machine is. Raises StoreError."""
    return Expected(
        code=code_digest(), versions=versions(), store=store_id(store), store_uri=store.uri, gpus=gpus, work=work
    )


def fault_of(there: Mapping[str, Any], wanted: Expected, now: float, late: float = 0.0) -> str | None:
    """One line on what is wrong with another machine for a job; None if nothing is.

    now: the time of the flow's machine. late: seconds between the two clocks that the connection explains.
    """
    for name, here in wanted.versions.items():
        if there["versions"].get(name) != here:
            return f"has {name} {there['versions'].get(name)}, the flow's machine has {here}; install the same"
    if there["code"] != wanted.code:
        return "has another version of radlads than the flow's machine; install the same"
    if there["store"] != wanted.store:
        what = there["why"] or ("another store lies there" if there["store"] else "nothing lies there")
        return (
            f"does not see the store {wanted.store_uri}: {what}; use S3, or a folder on a file system that all hosts "
            "share at the same path"
        )
    if there["work"] is None:
        return f"cannot write its work folder {wanted.work}; name another one in resources.remote.work"
    if there["gpus"] < wanted.gpus:
        return f"has {there['gpus']} visible GPU(s), the job is to have {wanted.gpus} there"
    drift = abs(there["time"] - now)
    if drift > 60.0 + late:
        return f"has a clock that is {drift:,.0f} seconds off the flow's machine's; set it"
    return None


def address_toward(peer: str) -> str:
    """The address of this machine on its route to another one. Raises OSError."""
    family, kind, protocol, _, where = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(where)  # sends nothing
        return str(probe.getsockname()[0])


def address_of(interface: str) -> str:
    """The first address of a network interface of this machine. Raises OSError."""
    found = [
        one.address
        for one in psutil.net_if_addrs().get(interface, [])
        if one.family in (socket.AF_INET, socket.AF_INET6) and not one.address.startswith("fe80")
    ]
    if not found:
        raise OSError(0, f"there is no network interface {interface} with an address")
    return str(min(found, key=lambda address: ":" in address))


def interface_of(address: str) -> str:
    """The network interface that has an address of this machine. Raises OSError."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in addresses):
            return str(name)
    raise OSError(0, f"no network interface has the address {address}")
