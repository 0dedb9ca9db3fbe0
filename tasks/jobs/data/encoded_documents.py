"""Encoded documents in a fixed number of flat files, before they are written as shards."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from radlads.tasks.jobs.common import write_json
from radlads.tasks.jobs.data.encode import Part

_TYPES: dict[str, np.dtype[Any]] = {
    "ids": np.dtype("<u4"),
    "lengths": np.dtype("<i8"),
    "num_bytes": np.dtype("<i8"),
    "hashes": np.dtype("<u8"),
    "heldout": np.dtype("?"),
    "mask": np.dtype("u1"),
    "token_bytes": np.dtype("<u4"),
}


class Spool:
    """Appends parts atomically; opening an existing folder continues it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._sheet_path = folder / "spool.json"
        self.parts = 0
        self.state: dict[str, Any] | None = None
        """State of the reader after the last part."""
        self.counts: Counter[str] = Counter()
        """Sum of the counts of all parts."""
        self._sizes = dict.fromkeys(_TYPES, 0)
        if self._sheet_path.is_file():
            sheet = json.loads(self._sheet_path.read_text(encoding="utf-8"))
            self.parts, self.state, self._sizes = sheet["parts"], sheet["state"], sheet["sizes"]
            self.counts.update(sheet["counts"])
        for name, dtype in _TYPES.items():
            with self._path(name).open("ab") as stream:
                # Values appended after spool.json was last written belong to no part.
                stream.truncate(self._sizes[name] * dtype.itemsize)

    @property
    def tokens(self) -> int:
        """Number of tokens appended."""
        return self._sizes["ids"]

    @property
    def train_tokens(self) -> int:
        """Of those, tokens of documents that are not held out."""
        return self.read().train_tokens

    def append(self, part: Part) -> None:
        """Append a part; it is durable when this returns."""
        for name, dtype in _TYPES.items():
            values = np.asarray(getattr(part, name)).astype(dtype)
            self._sizes[name] += len(values)
            if len(values):
                with self._path(name).open("ab") as stream:
                    stream.write(values.tobytes())
                    stream.flush()
                    os.fsync(stream.fileno())
        self.parts += 1
        self.state = part.state
        self.counts.update(part.counts)
        sheet = {"parts": self.parts, "state": self.state, "sizes": self._sizes, "counts": dict(self.counts)}
        write_json(self._sheet_path, sheet)

    def read(self) -> Part:
        """All parts as one Part of memory-mapped arrays."""
        arrays = {name: self._map(name, dtype) for name, dtype in _TYPES.items()}
        return Part(**arrays, state=self.state or {}, counts=dict(self.counts))

    def _map(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        if self._sizes[name] == 0:  # an empty file cannot be mapped
            return np.zeros(0, dtype)
        return np.memmap(self._path(name), dtype, mode="r", shape=(self._sizes[name],))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"
