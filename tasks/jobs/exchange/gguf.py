"""The program of `radlads export --to FILE.gguf`: a student's folder in, one file for llama.cpp out, on the CPU.

`python -m radlads.tasks.jobs.exchange.gguf request.json`; how it ended is in `exit.json` beside the request.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from pydantic import TypeAdapter
from yaml import YAMLError

from radlads.model.llama_cpp.graphs import open_for_llama_cpp
from radlads.model.llama_cpp.vocabulary import read_vocabulary
from radlads.model.llama_cpp.write import Card, write_gguf
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.document import one_line
from radlads.tasks.contracts.requests.folder import GgufExport
from radlads.tasks.jobs.exchange.outside_run import run_request
from radlads.tasks.jobs.sources import load_tokenizer

logger = logging.getLogger("radlads")
_DTYPES = {None: None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def perform(request: GgufExport) -> None:
    """Make the file `request.out` atomically; its tensors are streamed. Raises UserError."""
    folder, target = Path(request.student), Path(request.out)
    student = open_for_llama_cpp(folder)
    tokenizer = load_tokenizer(str(folder), trust_remote_code=request.trust_remote_code)
    vocabulary = read_vocabulary(tokenizer, student.num_words)
    write_gguf(student, vocabulary, read_card(folder, request.name), target, dtype=_DTYPES[request.dtype])
    logger.info("%s: %d tensors, %.2f GB", student.name, len(student.pieces), target.stat().st_size / 1e9)


def read_card(folder: Path, name: str) -> Card:
    """What the folder's README.md says; name: where it says none. Raises UserError for one that cannot be read."""
    path = folder / "README.md"
    if not path.is_file():
        return Card(name)
    try:
        card = ModelCard.load(path)
    except (ValueError, TypeError, OSError, YAMLError) as error:
        raise UserError(f"the model's card cannot be read: {one_line(str(error), 200)}") from error
    titles = [line.removeprefix("# ").strip() for line in card.text.splitlines() if line.startswith("# ")]
    models = card.data.base_model or []
    models = [models] if isinstance(models, str) else models
    known = card.data.license if isinstance(card.data.license, str) else None
    return Card(next(iter(titles), name) or name, known, tuple(str(model) for model in models))


def main() -> None:
    """Read the request, execute it, write exit.json, exit."""
    run_request(TypeAdapter(GgufExport), perform)


if __name__ == "__main__":
    main()
