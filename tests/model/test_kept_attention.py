"""Layers that stay softmax attention: scores scaled by log_a(t + a), and rotary positions that fade away."""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from radlads.model.convert.restore import restore_attention, restored
from radlads.model.student.cache import RadladsCache
from radlads.model.student.configuration import RadladsConfig
from radlads.model.student.export import export_student
from radlads.model.student.kept_attention import FadedPositions, log_scale
from radlads.model.student.load import load_student
from radlads.model.teacher.load import find_family, list_families
from radlads.model.training.lora import add_lora

FAMILIES = list_families()
KEPT = {"attention_layers": (0, 1, 2)}
BASE = 3  # scores of the last of 21 tokens are multiplied by 2.9


def seen_queries(monkeypatch: pytest.MonkeyPatch, student: Any, tokens: Tensor) -> list[Tensor]:
    """The queries [B,H,T,K] that each kept layer scores."""
    seen: list[Tensor] = []
    module = sys.modules[type(student.attention(student.config.attention_layers[0])).__module__]
    original = module.eager_attention_forward

    def watch(attention: Any, q: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(q)
        return original(attention, q, *args, **kwargs)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(module, "eager_attention_forward", watch)
        student.set_attn_implementation("eager")
        student(tokens, use_cache=False)
    return seen


def test_the_scale_is_the_published_formula() -> None:
    found = log_scale(torch.tensor([[0, 1, 511, 131071]]), 512)
    assert found[0, 0] == 1
    wanted = [math.log(t + 512, 512) for t in (0, 1, 511, 131071)]
    torch.testing.assert_close(found, torch.tensor([wanted]), atol=0, rtol=1e-6)


@pytest.mark.parametrize("length", [21, 4])  # 4, as many as heads: only strides tell one from the other
@pytest.mark.parametrize("model_type", FAMILIES)
def test_queries_of_every_family_are_scaled(
    monkeypatch, make_teacher, make_student, tokens, model_type, length
) -> None:
    teacher = make_teacher(model_type)
    plain, scaled = (make_student(teacher, attention_layers=(1,), attention_log_scale=a) for a in (None, BASE))
    (q,), (found,) = (seen_queries(monkeypatch, student, tokens[:, :length]) for student in (plain, scaled))
    assert q.shape[1:3] == (4, length)
    windowed = 1 in scaled.config.windowed_layers()
    scale = torch.ones(length) if windowed else torch.tensor([math.log(t + BASE, BASE) for t in range(length)])
    torch.testing.assert_close(found, q * scale[:, None], atol=1e-5, rtol=1e-5)


def test_a_window_is_not_scaled(monkeypatch, make_teacher, make_student, tokens) -> None:
    teacher = make_teacher("gemma3_text")
    plain, scaled = (make_student(teacher, attention_layers=(0,), attention_log_scale=a) for a in (None, BASE))
    assert torch.equal(*(seen_queries(monkeypatch, student, tokens)[0] for student in (plain, scaled)))


@pytest.mark.parametrize("kept", [(1,), (0, 1, 2)])
@pytest.mark.parametrize("model_type", ["qwen3", "llama", "phi3"])
class TestScaledStudents:
    @pytest.fixture
    def student(self, make_teacher, make_student, kept, model_type):
        return make_student(make_teacher(model_type), attention_layers=kept, attention_log_scale=BASE)

    @torch.no_grad()
    def test_decoding_is_the_whole_pass(self, student, tokens) -> None:
        whole = student(tokens, use_cache=False).logits
        cache, steps = RadladsCache(student.config), []
        for t in range(tokens.shape[1]):
            steps.append(student(tokens[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(steps, 1), whole, atol=2e-4, rtol=1e-4)
        first = student(tokens[:, :9], use_cache=True)
        second = student(tokens[:, 9:], past_key_values=first.past_key_values)
        torch.testing.assert_close(second.logits, whole[:, 9:], atol=2e-4, rtol=1e-4)
        made = student.generate(tokens, do_sample=False, max_new_tokens=6, eos_token_id=None)
        assert torch.equal(made[:, 21:], student(made, use_cache=False).logits.argmax(-1)[:, 20:-1])

    @torch.no_grad()
    def test_padding_does_not_count(self, student, tokens) -> None:
        short = tokens[1:, :13]
        rows = torch.cat([tokens[:1], torch.cat([torch.zeros(1, 8, dtype=torch.long), short], 1)])
        mask = torch.ones_like(rows)
        mask[1, :8] = 0
        found = student(rows, attention_mask=mask).logits[1, 8:]
        torch.testing.assert_close(found, student(short).logits[0], atol=2e-4, rtol=1e-4)
        made = student.generate(rows, attention_mask=mask, do_sample=False, max_new_tokens=6, eos_token_id=None)
        alone = student.generate(short, do_sample=False, max_new_tokens=6, eos_token_id=None)
        assert torch.equal(made[1:, 21:], alone[:, 13:])

    @torch.no_grad()
    def test_documents_count_from_their_beginning(self, student, tokens) -> None:
        bounds, flat = torch.tensor([0, 8, 21, 30, 42]), tokens.flatten()
        packed = student.hidden(tokens, cu_seqlens=bounds).flatten(0, 1)
        apart = torch.cat([student.hidden(flat[None, a:b])[0] for a, b in pairwise(bounds.tolist())])
        torch.testing.assert_close(packed, apart, atol=1e-4, rtol=1e-3)

    def test_recomputed_layers_have_the_same_gradients(self, student, tokens) -> None:
        found = []
        for reentrant in (None, True, False):
            if reentrant is not None:
                student.gradient_checkpointing_enable({"use_reentrant": reentrant})
            student.train().zero_grad()
            student.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_())
            student.hidden(tokens).square().mean().backward()
            found.append([p.grad for p in student.model.layers[1].parameters()])
        assert any(bool(grad.any()) for grad in found[0])
        for grads in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], grads, strict=True))


def test_an_export_keeps_the_scale(make_teacher, make_student, tokens, tmp_path) -> None:
    student = make_student(make_teacher("qwen3"), attention_layers=(1,), attention_log_scale=BASE)
    export_student(student, None, tmp_path)
    again = load_student(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attention_log_scale"] == BASE
    assert torch.equal(again(tokens).logits, student(tokens).logits)
    with pytest.raises(ValueError, match="must be 2 or more"):
        RadladsConfig(attention_log_scale=1)


def test_a_low_rank_update_of_the_queries_is_scaled_too(make_teacher, make_student, tokens) -> None:
    class Section:
        targets, rank, scale = ("q_proj",), 2, 1.0

    student = make_student(make_teacher("llama"), attention_layers=(1,), attention_log_scale=BASE)
    wanted = student(tokens).logits
    add_lora(student, Section())
    assert torch.equal(student(tokens).logits, wanted)  # nothing was learned yet


def test_a_pass_that_fails_leaves_no_scale_behind(make_teacher, make_student, tokens) -> None:
    student = make_student(make_teacher("qwen3"), attention_layers=(1,), attention_log_scale=BASE)
    wanted, attention = student(tokens).logits, student.attention(1)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = attention.q_proj.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        student(tokens)
    handle.remove()
    assert torch.equal(student(tokens).logits, wanted)


def test_a_restored_layer_is_scored_as_the_teachers_and_then_scaled(make_teacher, make_student, tokens) -> None:
    teacher = make_teacher("llama")
    expected = teacher(tokens).logits
    plain, student = (make_student(teacher, attention_log_scale=a) for a in (None, BASE))
    with restored(student, teacher, [1]), restored(plain, teacher, [1]):
        assert torch.equal(student(tokens, use_cache=False).logits, plain(tokens, use_cache=False).logits)
    restore_attention(student, teacher, [1], attention_rope=False)
    student(tokens)
    assert torch.equal(teacher(tokens).logits, expected)
    wanted = make_student(teacher, attention_layers=(1,), attention_log_scale=BASE)
    wanted.load_state_dict(student.state_dict())
    assert torch.equal(student(tokens).logits, wanted(tokens).logits)


def test_the_family_of_each_kept_layer_is_known(make_teacher) -> None:
    """`_Adapt` scales what comes out of q_norm, the fused projection or q_proj: one of them exists everywhere."""
    for name in FAMILIES:
        teacher = make_teacher(name)
        family = find_family(teacher.config)
        for attention in family.attention_modules(teacher).values():
            assert hasattr(attention, family.q_norm or family.qkv or family.q)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_faded_positions_go_from_the_teachers_to_none(make_teacher, make_student, tokens, model_type) -> None:
    teacher = make_teacher(model_type)
    rotary, none = (make_student(teacher, **KEPT, attention_rope=rope) for rope in (True, False))
    ends = {1.0: rotary.hidden(tokens), 0.0: none.hidden(tokens)}
    for factor, wanted in ends.items():
        found = none.hidden(tokens, rope_factor=torch.tensor(factor))
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    half = none.hidden(tokens, rope_factor=torch.tensor(0.5))
    assert all((half - end).abs().max() > 1e-4 for end in ends.values())


def test_half_faded_is_attention_at_half_the_positions(make_teacher, make_student, tokens) -> None:
    teacher = make_teacher("llama")
    student = make_student(teacher, **KEPT)
    with torch.no_grad():
        found = student.hidden(tokens, rope_factor=torch.tensor(0.5))
        teacher.model.rotary_emb.inv_freq.mul_(0.5)
        torch.testing.assert_close(found, teacher.model(tokens).last_hidden_state, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_stay_those_of_the_row(make_teacher, make_student, tokens, kind) -> None:
    """At a fifth of its positions a row of 21 tokens would be one of 5, which has other frequencies."""
    more = {"dynamic": {}, "longrope": {"short_factor": [1.0] * 8, "long_factor": [2.0, 3.0] * 4}}[kind]
    scaling = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16, **more}
    teacher = make_teacher("llama", rope_parameters=scaling, max_position_embeddings=16)
    student = make_student(teacher, **KEPT)
    rotary = student.model.rotary_emb
    x = torch.zeros(1, 1)
    rotary(x, torch.arange(tokens.shape[1])[None])  # as the pass does before its layers
    frequencies, own = rotary.inv_freq.clone(), rotary.attention_scaling
    faded = FadedPositions(rotary, None, torch.arange(tokens.shape[1])[None], torch.tensor(0.2))
    cos, sin = faded.embeddings(0, x)
    angles = 0.2 * torch.arange(tokens.shape[1])[:, None] * frequencies
    for found, wanted in ((cos, angles.cos()), (sin, angles.sin())):
        torch.testing.assert_close(found[0], (1 + 0.2 * (own - 1)) * torch.cat([wanted, wanted], -1))
    assert torch.equal(rotary.inv_freq, frequencies)


def test_positions_fade_within_documents(make_teacher, make_student, tokens) -> None:
    student = make_student(make_teacher("qwen3"), attention_layers=(1,))
    bounds, flat, factor = torch.tensor([0, 8, 21, 30, 42]), tokens.flatten(), torch.tensor(0.7)
    packed = student.hidden(tokens, cu_seqlens=bounds, rope_factor=factor).flatten(0, 1)
    apart = torch.cat([student.hidden(flat[None, a:b], rope_factor=factor)[0] for a, b in pairwise(bounds.tolist())])
    torch.testing.assert_close(packed, apart, atol=1e-4, rtol=1e-3)
