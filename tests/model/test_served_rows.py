"""Rows of a server's batch on every kind of family: with windows, linear layers, layers without positions, experts."""

from __future__ import annotations

import pytest
import torch

from radlads.model.student.cache import RadladsCache
from radlads.tasks.jobs.serve.states import RowStates

# Family, layers that stay attention, whether rows share a batch.
CASES = [
    ("gemma3_text", (0, 1), False),
    ("cohere2", (0,), False),
    ("qwen3_5_text", (1,), False),
    ("smollm3", (1,), True),
    ("granite", (0,), True),
    ("qwen3_moe", (1,), True),
    ("ministral3", (1,), True),
]


@pytest.mark.parametrize(("family", "kept", "joins"), CASES)
@torch.no_grad()
def test_rows_of_a_family_are_as_alone(make_teacher, make_student, family: str, kept, joins: bool) -> None:
    student = make_student(make_teacher(family), attention_layers=kept)
    states, draws = RowStates(student), torch.Generator().manual_seed(0)
    assert states.joins == joins
    prompts = [torch.randint(3, 60, (length,), generator=draws).tolist() for length in (17, 5, 9)]
    made, caches = [], []
    for ids in prompts:
        caches.append(RadladsCache(student.config))
        for begin in range(0, len(ids), 4):
            logits = states.read(caches[-1], ids[begin : begin + 4])
        made.append([int(logits.argmax())])
    states.add(caches, [len(ids) for ids in prompts])
    rows = [0, 1, 2]
    for step in range(12):
        if step == 6:
            states.keep([1, 2])
            rows = [1, 2]
        chosen = states.advance([made[row][-1] for row in rows]).argmax(-1).tolist()
        for row, token in zip(rows, chosen, strict=True):
            made[row].append(token)
    for ids, found in zip(prompts, made, strict=True):
        greedy = {"do_sample": False, "max_new_tokens": len(found), "eos_token_id": None, "pad_token_id": 0}
        assert student.generate(torch.tensor([ids]), **greedy)[0, len(ids) :].tolist() == found
