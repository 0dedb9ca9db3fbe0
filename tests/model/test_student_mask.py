"""What a student without attention is spared: its family's mask of all pairs of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_a_pure_student_makes_no_mask_and_a_hybrid_makes_it(make_teacher: Any, make_student: Any, family: str) -> None:
    teacher = make_teacher(family)
    tokens, seen = torch.arange(3, 27).view(1, 24), []
    for kept in ((), (1,)):
        student = make_student(teacher, variant="hxa079", attention_layers=kept).eval()
        layer = next(iter(student._layers()))
        layer.register_forward_pre_hook(
            lambda _module, _args, given: seen.append(given["attention_mask"]), with_kwargs=True
        )
        mask = torch.ones_like(tokens)
        mask[:, :3] = 0
        with torch.no_grad():
            cache = student(tokens[:, :12], attention_mask=mask[:, :12], use_cache=True).past_key_values
            student(tokens[:, 12:], attention_mask=mask, past_key_values=cache)
    assert [one.shape for one in seen[:2]] == [(1, 1, 1, 1)] * 2
    assert [one.shape[-2:] for one in seen[2:]] == [(12, 12), (12, 24)]
