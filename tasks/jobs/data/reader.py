"""Batches of documents from several sources, in an order that can be resumed at any batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from radlads.tasks.contracts.recipe.recipe import Source
from radlads.tasks.jobs.data.text.documents import Document, iterate_documents


@dataclass
class Reader:
    """Interleaves the sources: the next document comes from the source with the fewest bytes read so far.

    A dataset truncated at max_tokens therefore has equal shares of its sources. `state` suffices to resume.
    """

    sources: Sequence[Source]
    tokenizer: PreTrainedTokenizerBase
    samples: dict[int, Path] = field(default_factory=dict)
    """Source index → samples.jsonl, for `sample` sources."""

    def batches(
        self, max_bytes: int, state: dict[str, Any] | None = None, only: int | None = None
    ) -> Iterator[tuple[list[Document], dict[str, Any]]]:
        """Yield (documents, state after them) of about max_bytes of text each, from `state` on. only: the index of a
        source, which is read alone. Raises UserError."""
        documents = list(state["documents"]) if state else [0] * len(self.sources)
        num_bytes = list(state["bytes"]) if state else [0] * len(self.sources)
        open_ones = {
            index: iterate_documents(
                source, tokenizer=self.tokenizer, skip=documents[index], samples=self.samples.get(index)
            )
            for index, source in enumerate(self.sources)
            if only in (None, index)
        }
        batch: list[Document] = []
        size = 0
        while open_ones:
            index = min(open_ones, key=lambda i: (num_bytes[i], i))
            document = next(open_ones[index], None)
            if document is None:
                del open_ones[index]
                continue
            batch.append(replace(document, source=index))
            length = len(document.canonical.encode())
            size += length
            documents[index] += 1
            num_bytes[index] += length
            if size >= max_bytes:
                yield batch, {"documents": list(documents), "bytes": list(num_bytes)}
                batch, size = [], 0
        if batch:
            yield batch, {"documents": list(documents), "bytes": list(num_bytes)}
