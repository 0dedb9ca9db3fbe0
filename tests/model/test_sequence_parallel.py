"""Sequence parallelism: loss and gradients of rows that ranks share are those of one rank."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RANK = Path(__file__).with_name("row_ranks.py")


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_are_those_of_one_rank(warm_python: Callable[..., Any], ranks: int) -> None:
    """Cases are in row_ranks.py: mixers of three recurrences, kept layers, documents across the ranks' borders."""
    python = warm_python("radlads.model.convert.transplant", "radlads.model.training.objectives")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    programs = [python.start(str(RANK), env=shared | {"RANK": str(rank)}) for rank in range(ranks)]
    codes = [program.wait() for program in programs]
    assert codes == [0] * ranks, [program.output[-3000:] for program in programs]
