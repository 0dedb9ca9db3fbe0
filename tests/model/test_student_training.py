"""A student trains as its family's own model does: checkpointing, packed rows, keywords; whatever passes the call."""

from __future__ import annotations

import gc
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DataCollatorWithFlattening

from radlads.model.student.modeling import RadladsForCausalLM

# Layers kept; the first recurrent one is the model's first, or comes after softmax; first values, also keys, or none.
CASES: list[tuple[str, tuple[int, ...], str]] = [
    ("qwen3", (1,), "rad_rwkv7"),
    ("llama", (), "hxa079"),
    ("llama", (0,), "hxa079"),
    ("qwen3_moe", (1,), "rwkv7"),
    ("llama", (), "rad_rwkv6"),
    ("qwen3", (0,), "gated_deltanet"),
]


@pytest.fixture(params=CASES, ids=str)
def student(request: pytest.FixtureRequest, make_teacher, make_student) -> RadladsForCausalLM:
    model_type, kept, variant = request.param
    return make_student(make_teacher(model_type), attention_layers=kept, variant=variant).train()


def gradients(student: RadladsForCausalLM, tokens: Tensor, **given: Any) -> tuple[float, Tensor]:
    student.zero_grad()
    loss = student(tokens, labels=tokens, **given).loss
    loss.backward()
    missing = [name for name, p in student.named_parameters() if p.grad is None]
    assert missing == []
    return loss.item(), torch.cat([p.grad.flatten() for p in student.parameters()])


def test_checkpointing_changes_no_gradient(student: RadladsForCausalLM, tokens: Tensor) -> None:
    loss, wanted = gradients(student, tokens)
    for reentrant in (False, True):
        student.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for use_cache in (None, True):
            again, got = gradients(student, tokens, use_cache=use_cache)
            assert again == pytest.approx(loss, abs=1e-6)
            torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)
        student.gradient_checkpointing_disable()
    # A wrapper of others around each layer (as FSDP's), which knows nothing of first values.
    for layer in student.model.layers:
        inner = layer.forward
        layer.forward = lambda *args, inner=inner, **given: checkpoint(inner, *args, use_reentrant=False, **given)
    torch.testing.assert_close(gradients(student, tokens)[1], wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kept", [(), (0,)], ids=str)
def test_a_checkpoint_keeps_what_the_teachers_does_and_the_first_values(
    make_teacher, make_student, tokens: Tensor, live_bytes, kept
) -> None:
    """Nothing from the inside of a layer, the first recurrent one included; and all of it goes with the output."""
    teacher = make_teacher("llama").requires_grad_(True).train()
    student = make_student(teacher, variant="hxa079", attention_layers=kept).train()

    def held(model: Any) -> tuple[int, int]:
        gc.collect()
        gc.disable()  # only a cycle would need it
        try:
            with live_bytes() as memory:
                hidden = model.model(tokens, use_cache=False).last_hidden_state
                before = memory.live
                del hidden
                return before, memory.live
        finally:
            gc.enable()

    whole = held(student)
    for model in (teacher, student):
        model.gradient_checkpointing_enable()
    (theirs, theirs_after), (ours, ours_after) = held(teacher), held(student)
    assert ours == theirs + tokens.numel() * 2 * (2 * 16) * 4  # v and k, two kv heads of 16 each, fp32
    assert ours_after == theirs_after
    assert whole[0] > 5 * ours


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 64, (length,), generator=generator) for length in (9, 1, 14, 7)]


@pytest.mark.parametrize(
    "named",
    [{"return_flash_attn_kwargs": False}, {"return_flash_attn_kwargs": False, "return_seq_idx": True}, {}],
    ids=["position_ids", "seq_idx", "cu_seq_lens"],
)
def test_packed_rows_are_separate_documents(student: RadladsForCausalLM, named: dict[str, bool]) -> None:
    """As transformers' own collator packs them; positions alone tell, where there is nothing else."""
    options = {"return_flash_attn_kwargs": True, **named}
    batch = DataCollatorWithFlattening(**options)([{"input_ids": d.tolist()} for d in documents()])
    if options["return_flash_attn_kwargs"]:
        batch.pop("position_ids")
    ends = torch.tensor([0] + [len(d) for d in documents()]).cumsum(0).tolist()
    student.eval()
    with torch.no_grad():
        packed = student(**batch).logits[0]
        for (start, end), document in zip(pairwise(ends), documents(), strict=True):
            torch.testing.assert_close(packed[start:end], student(document[None]).logits[0], atol=1e-4, rtol=1e-4)


def test_packed_rows_that_could_leak_are_refused(student: RadladsForCausalLM, tokens: Tensor) -> None:
    positions = torch.arange(21).remainder(8).expand(2, -1)
    with pytest.raises(ValueError, match="without attention_mask"):
        student(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens))
    for given in ({"use_cache": True}, {"attention_mask": torch.ones_like(tokens)}):
        with pytest.raises(ValueError, match="no attention_mask and no cache"):
            student(tokens, cu_seqlens=torch.tensor([0, 21, 42]), **given)
    for bounds in ([0, 21], [1, 42], [0, 30, 21, 42]):
        with pytest.raises(ValueError, match=r"must rise from 0 to .* 42"):
            student(tokens, cu_seqlens=torch.tensor(bounds))
    padded = torch.ones_like(tokens)
    padded[:, 3:6] = 0  # padding inside is none: positions go on behind it
    inside = (padded.cumsum(-1) - 1).clamp(min=0)
    assert student(tokens, attention_mask=padded, position_ids=inside).logits.isfinite().all()


def test_an_unknown_keyword_is_none_of_ours(student: RadladsForCausalLM, tokens: Tensor) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'cu_seq_lens'"):
        student(tokens, cu_seq_lens=torch.tensor([0, 21, 42]))
    count = torch.tensor(4 * 2 * 20)
    plain, shared = student(tokens, labels=tokens).loss, student(tokens, labels=tokens, num_items_in_batch=count).loss
    torch.testing.assert_close(shared, plain / 4)


def test_a_cache_in_training_mode_is_given_to_every_layer_or_refused(make_teacher, make_student, tokens) -> None:
    student = make_student(make_teacher("qwen3"), attention_layers=(1,)).train()
    settings = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    wanted = student.generate(tokens, **settings, use_cache=False)
    assert torch.equal(student.generate(tokens, **settings), wanted)
    student.gradient_checkpointing_enable()
    try:
        assert torch.equal(student.generate(tokens, **settings), wanted)  # from transformers 5.24 on
    except RuntimeError as error:
        assert "call eval() first" in str(error)  # noqa: PT017 - before, transformers drops the cache
