"""The beginnings that a `sample` source lets the teacher continue."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.recipe import SampleSource
from radlads.tasks.jobs.data.text.documents import RowReader, read_file
from radlads.tasks.jobs.data.text.token_encoder import text_ids
from radlads.tasks.jobs.sources import expand_paths

# More characters than any tokenizer puts in a token on average.
_CHARACTERS_PER_TOKEN = 32


def read_prompts(source: SampleSource, tokenizer: PreTrainedTokenizerBase, count: int | None = None) -> list[list[int]]:
    """Token ids of the prompts, in the order of the files; of the first `count` documents alone, if given.

    Raises UserError for unreadable files, and where no document has a token.
    """
    texts = [text[: source.prompt_tokens * _CHARACTERS_PER_TOKEN] for text in islice(_texts(source), count)]
    prompts = [ids[: source.prompt_tokens] for ids in text_ids(tokenizer, texts)] if texts else []
    prompts = [ids for ids in prompts if ids]
    if not prompts:
        raise UserError("no document of its prompts has a token")
    return prompts


def _texts(source: SampleSource) -> Iterator[str]:
    for name in expand_paths(source.prompts):
        for document in read_file(name, RowReader(), separator=source.prompts_separator):
            yield document.text or ""


def first_ids(prompts: list[list[int]], batch: int, size: int, start: int, pad: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), [B,T], of one batch: the prompts in turn, each after the token `start`, padded on the left."""
    rows = [[start, *prompts[(batch * size + row) % len(prompts)]] for row in range(size)]
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
