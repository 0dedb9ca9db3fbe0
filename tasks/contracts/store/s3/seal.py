"""What identifies a file's content: size, sha256, and the ETags that an S3 endpoint may give it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from radlads.tasks.contracts.store.files import read_blocks

_MAX_PARTS = 9000  # S3 allows 10,000 parts
_MIB = 1 << 20


@dataclass(frozen=True)
class Seal:
    """size in bytes; sha256 in hex; md5 of the whole file, raw; etags: MD5 forms that prove the content."""

    size: int
    sha256: str
    md5: bytes
    etags: frozenset[str]


def part_size(size: int, smallest: int) -> int:
    """Bytes of one part of a multipart upload of `size` bytes: whole MiB, at most _MAX_PARTS parts."""
    needed = -(-size // _MAX_PARTS)
    return max(smallest, -(-needed // _MIB) * _MIB)


def seal_file(path: Path, part_bytes: int) -> Seal:
    """Read the file once. part_bytes: part size of a multipart upload of it."""
    block_bytes = part_bytes if part_bytes < _MIB else _MIB  # part_bytes is whole MiB, so blocks never straddle parts
    return seal_blocks(read_blocks(path, block_bytes), part_bytes)


def seal_blocks(blocks: Iterable[bytes], part_bytes: int) -> Seal:
    """The seal of content in blocks, none of which straddles two parts of `part_bytes`."""
    sha256 = hashlib.sha256()
    whole = hashlib.md5(usedforsecurity=False)
    parts: list[bytes] = []
    size = 0
    part = hashlib.md5(usedforsecurity=False)
    for block in blocks:
        sha256.update(block)
        whole.update(block)
        part.update(block)
        size += len(block)
        if size % part_bytes == 0:
            parts.append(part.digest())
            part = hashlib.md5(usedforsecurity=False)
    if size % part_bytes:
        parts.append(part.digest())
    joined = hashlib.md5(b"".join(parts), usedforsecurity=False).hexdigest()
    etags = frozenset({whole.hexdigest(), f"{joined}-{len(parts)}"})
    return Seal(size=size, sha256=sha256.hexdigest(), md5=whole.digest(), etags=etags)
