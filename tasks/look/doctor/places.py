"""Checks of what is outside: the store, the hub, and this machine's clock beside theirs."""

from __future__ import annotations

import os
import socket
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path

from radlads.tasks.contracts.errors import UserError, error_text
from radlads.tasks.contracts.job import StoreRef
from radlads.tasks.contracts.parsing.credentials import hide
from radlads.tasks.contracts.store.errors import StoreError
from radlads.tasks.contracts.store.layout import check_layout
from radlads.tasks.contracts.store.open import Store, find_store
from radlads.tasks.look.doctor.finding import Finding, Level

_HUB = "https://huggingface.co"
_HUB_SECONDS = 5.0
_SLOW_SECONDS = 2.0
_SKEW_NOTE, _SKEW_FAULT = 5.0, 600.0
_STORE_CURE = "check --store, RADLADS_STORE, RADLADS_S3_ENDPOINT, and the keys (AWS_ACCESS_KEY_ID, or a profile)"


def check_store(ref: StoreRef) -> Iterator[Finding]:
    """Whether the store can be written, read back and cleaned, with which guarantees, and how fast."""
    if "://" not in ref.uri and not Path(ref.uri).exists():
        yield Finding("store", "note", f"{ref.uri} is not there yet: `radlads run` makes it")
        return
    try:
        store = find_store(ref)
        check_layout(store)
        yield from _try_store(store)
    except (StoreError, UserError, OSError) as error:
        text = hide(error_text(error))
        yield Finding("store", "fault", text if ref.uri in text else f"{ref.uri}: {text}", _STORE_CURE)


def _try_store(store: Store) -> Iterator[Finding]:
    key, data = f"doctor-{uuid.uuid4().hex}", b"radlads doctor\n"
    began = time.monotonic()
    store.put_bytes(key, data)
    try:
        same = store.get_bytes(key) == data
    finally:
        store.delete(key)
    seconds = time.monotonic() - began
    if not same:
        yield Finding("store", "fault", f"{store.uri} returns other bytes than were written", "use another store")
        return
    missing = [name for name, value in store.probe().items() if name.startswith("conditional") and value is False]
    text = f"{store.uri}: written, read and deleted in {seconds:.2f} s"
    if missing:
        cure = "start each run once only, or use an endpoint that honours If-None-Match and If-Match"
        yield Finding("store", "warning", f"{text}; without {', '.join(missing)}", cure)
    elif seconds > _SLOW_SECONDS:
        yield Finding("store", "warning", text, "use a store nearer to this machine: checkpoints will be slow")
    else:
        yield Finding("store", "good", text)


def check_hub() -> Iterator[Finding]:
    """Whether models can be fetched from the hub; and this machine's clock beside the hub's."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield Finding("hub", "note", "HF_HUB_OFFLINE is set: teachers and data must be local files or in the cache")
        return
    address = os.environ.get("HF_ENDPOINT") or _HUB
    request = urllib.request.Request(f"{address}/api/models?limit=1", headers={"User-Agent": "radlads-doctor"})
    began = time.time()
    try:
        with urllib.request.urlopen(request, timeout=_HUB_SECONDS) as answer:
            date = answer.headers.get("Date")
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = hide(error_text(getattr(error, "reason", None) or error, 120))
        cure = "set HTTPS_PROXY or HF_ENDPOINT, or work with local files (HF_HUB_OFFLINE=1)"
        yield Finding("hub", "warning", f"{address} does not answer: {reason}", cure)
        return
    token = os.environ.get("HF_TOKEN") or _token_file().is_file()
    text = f"{address} answers" + ("" if token else "; no token, so gated models cannot be fetched")
    yield Finding("hub", "good" if token else "note", text, "" if token else "for gated models: hf auth login")
    if date:
        yield clock_finding((began + time.time()) / 2 - parsedate_to_datetime(date).timestamp(), address)


def check_clock(ref: StoreRef) -> Iterator[Finding]:
    """This machine's clock beside that of a folder store's file system, which may be another machine's."""
    folder = Path(ref.uri)
    if "://" in ref.uri or not os.access(folder, os.W_OK):
        return
    probe = folder / f".doctor-{uuid.uuid4().hex}"
    before = time.time()
    try:
        probe.write_bytes(b"")
        written = probe.stat().st_mtime
    except OSError:  # the store's own check says why
        return
    finally:
        probe.unlink(missing_ok=True)
    yield clock_finding((before + time.time()) / 2 - written, f"the file system of {folder}")


def clock_finding(ahead: float, other: str) -> Finding:
    """ahead: seconds that this machine's clock is ahead of another."""
    level: Level = "good" if abs(ahead) < _SKEW_NOTE else "warning" if abs(ahead) < _SKEW_FAULT else "fault"
    cure = (
        ""
        if level == "good"
        else "synchronise it: timedatectl set-ntp true; S3 refuses requests that are off by 15 min"
    )
    way = "ahead of" if ahead > 0 else "behind"
    text = f"{abs(ahead):.0f} s {way} {other}" if level != "good" else f"agrees with {other}"
    return Finding("clock", level, f"{socket.gethostname()} {text}" if level != "good" else text, cure)


def _token_file() -> Path:
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(os.environ.get("HF_TOKEN_PATH") or Path(home, "token")).expanduser()
