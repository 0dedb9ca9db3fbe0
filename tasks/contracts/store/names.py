"""The names that a store accepts: keys, and the list of a product's files."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from radlads.tasks.contracts.job import FileEntry, Manifest
from radlads.tasks.contracts.store.errors import StoreError
from radlads.tasks.contracts.store.files import TEMPORARY

MANIFEST = "manifest.json"
MANIFEST_BYTES = 64 << 20
"""Bytes; more than a manifest of 200,000 files needs. A longer file is not a manifest of radlads."""
OBJECTS = ".objects"
"""Folder of a product for files whose own name is occupied by an unfinished attempt."""
_FORBIDDEN = re.compile(r"[\\\x00-\x1f\x7f\ud800-\udfff]")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LONGEST_KEY = 900
_SHOWN = 120


def check_key(key: str) -> str:
    """Return the key if it is a plain relative path with forward slashes. Raises StoreError otherwise."""
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts) or _FORBIDDEN.search(key) or len(key.encode()) > _LONGEST_KEY:
        shown = ascii(key if len(key) <= _SHOWN else f"{key[:_SHOWN]}...")
        raise StoreError(f"not a valid key: {shown} (a relative path with forward slashes, without '.', '..' or '//')")
    return key


def check_paths(paths: Sequence[str]) -> None:
    """Raises StoreError unless the paths can coexist in one folder of any filesystem."""
    seen: dict[str, str] = {}
    folders: dict[str, str] = {}
    for path in paths:
        parts = check_key(path).split("/")
        if path == MANIFEST or parts[0] == OBJECTS or any(part.startswith(TEMPORARY) for part in parts):
            raise StoreError(f"a product cannot hold a file {path!r}: that name is reserved for the store")
        folded = unicodedata.normalize("NFC", path).casefold()
        if folded in seen:
            raise StoreError(f"{path!r} and {seen[folded]!r} are one file on a filesystem that ignores case")
        seen[folded] = path
        parts = folded.split("/")
        folders.update({"/".join(parts[:depth]): path for depth in range(1, len(parts))})
    for folded, path in seen.items():
        if folded in folders:
            raise StoreError(f"{path!r} is both a file and a folder (of {folders[folded]!r})")


def check_files(files: Sequence[FileEntry]) -> None:
    """Raises StoreError for a list of files that no product can have."""
    check_paths([entry.path for entry in files])
    for entry in files:
        if entry.stored_as is not None and check_key(entry.stored_as).split("/")[0] != OBJECTS:
            raise StoreError(f"{entry.path!r} is stored as {entry.stored_as!r}, which is not under {OBJECTS}/")
        if not _SHA256.fullmatch(entry.sha256):
            raise StoreError(f"{entry.path!r} has no sha256 but {entry.sha256[:_SHOWN]!a}")


def product_files(folder: Path) -> list[tuple[str, Path]]:
    """(path within the product, file) of every file in a folder. Raises StoreError for names that a store does not
    accept, and for a link to a folder, whose files would be left out."""
    paths = sorted(folder.rglob("*"))
    for path in paths:
        if path.is_symlink() and not path.is_file():
            raise StoreError(f"{path} is a link to a folder or to nothing; a product is made of files")
    files = [(path.relative_to(folder).as_posix(), path) for path in paths if path.is_file()]
    check_paths([name for name, _ in files])
    return files


def parse_manifest(data: bytes) -> Manifest:
    """Parse a stored manifest. Raises StoreError that names its fault."""
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:_SHOWN]
        raise StoreError(f"{ascii(place)[1:-1] + ': ' if place else ''}{ascii(first['msg'])[1:-1]}") from None
    check_files(manifest.files)
    return manifest


def place_of(prefix: str, entry: FileEntry) -> str:
    """The key at which a product's file lies."""
    return f"{prefix}/{check_key(entry.stored_as or entry.path)}"
