"""The program of `radlads export`: a student's folder with weights of another type, or in other shards.

`python -m radlads.tasks.jobs.exchange.folder request.json`; how it ended is in `exit.json` beside the request.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch
from pydantic import TypeAdapter

from radlads.model.student.export import export_student
from radlads.model.student.load import load_student
from radlads.tasks.contracts.requests.folder import FolderExport
from radlads.tasks.jobs.exchange.outside_run import made_whole, run_request
from radlads.tasks.jobs.sources import load_tokenizer

logger = logging.getLogger("radlads")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SHARD_BYTES = 4_000_000_000


def perform(request: FolderExport) -> None:
    """Make the folder `request.out` atomically; the whole model is held in memory. Raises UserError."""
    source = Path(request.student)
    with made_whole(Path(request.out)) as folder:
        others = [path for path in sorted(source.iterdir()) if path.is_file()]
        if request.dtype is not None or request.max_shard_bytes is not None:
            student = load_student(source, dtype=None if request.dtype is None else _DTYPES[request.dtype])
            tokenizer = load_tokenizer(str(source), trust_remote_code=request.trust_remote_code)
            export_student(student, tokenizer, folder, max_shard_bytes=request.max_shard_bytes or _SHARD_BYTES)
            others = [path for path in others if not (folder / path.name).exists() and not _is_written(path.name)]
        for path in others:
            shutil.copyfile(path, folder / path.name)
    size = sum(path.stat().st_size for path in Path(request.out).iterdir())
    logger.info("%d files, %.2f GB", len(list(Path(request.out).iterdir())), size / 1e9)


def _is_written(name: str) -> bool:
    """Whether it is weights or code, of which an export writes all: what an earlier version called otherwise is not
    kept beside it."""
    return name.endswith((".safetensors", ".safetensors.index.json", "_radlads.py"))


def main() -> None:
    """Read the request, execute it, write exit.json, exit."""
    run_request(TypeAdapter(FolderExport), perform)


if __name__ == "__main__":
    main()
