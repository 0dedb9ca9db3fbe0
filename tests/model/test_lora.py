"""Low-rank updates: nothing at first, something after a step, and a plain model in the end."""

from __future__ import annotations

import pytest
import torch

from radlads.model.training.lora import LoraLinear, add_lora, lora_trains, merge_lora
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.recipe import Lora


@pytest.fixture
def student(make_teacher, make_student):
    return make_student(make_teacher("qwen3", attention_bias=True), attention_layers=(1,))


def test_it_changes_nothing_until_it_has_learned_and_merges_into_a_plain_model(student, tokens) -> None:
    names = {name for name, _ in student.named_parameters()}
    before = student(tokens).logits
    adapted = add_lora(student, Lora(rank=4, scale=0.7, targets=("q_proj", "o_proj")))
    assert adapted == [f"model.layers.{i}.self_attn.{p}" for i in range(3) for p in ("q_proj", "o_proj")]
    assert torch.equal(student(tokens).logits, before)
    student(tokens).logits.square().mean().backward()
    pairs = {n: p for n, p in student.named_parameters() if lora_trains(student, n)}
    assert {n.rpartition(".")[2] for n in pairs} == {"lora_a", "lora_b"}
    assert all(p.grad is not None for p in pairs.values())
    # B is zero, so A has to wait for the second step; B must not.
    assert all(p.grad.abs().sum() > 0 for n, p in pairs.items() if n.endswith("lora_b"))
    with torch.no_grad():
        for parameter in pairs.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    learned = student(tokens).logits
    assert not torch.allclose(learned, before, atol=1e-3)
    weight = student.model.layers[0].self_attn.q_proj.weight
    kept = weight.clone()
    read = merge_lora(student, student.state_dict().__getitem__)
    assert torch.equal(student(tokens).logits, before)
    student.load_state_dict({name: read(name) for name in student.state_dict()}, assign=True)
    torch.testing.assert_close(student(tokens).logits, learned, atol=1e-4, rtol=1e-4)
    assert {name for name, _ in student.named_parameters()} == names
    assert not any(isinstance(module, LoraLinear) for module in student.modules())
    assert torch.equal(weight, kept), "the teacher may hold the same tensor"


def test_only_pairs_and_what_mixers_add_train(student) -> None:
    add_lora(student, Lora(targets=("k_proj", "gate_proj")))
    answers = {name: lora_trains(student, name) for name, _ in student.named_parameters()}
    assert answers["model.layers.0.self_attn.k_proj.weight"] is False
    assert answers["model.layers.0.self_attn.k_proj.bias"] is False
    assert answers["model.layers.1.self_attn.k_proj.lora_a"] is True
    assert answers["model.layers.2.mlp.gate_proj.lora_b"] is True
    assert answers["model.layers.0.self_attn.w0"] is None
    assert answers["lm_head.weight"] is None


def test_an_unknown_target_is_told_with_those_that_exist(student) -> None:
    with pytest.raises(UserError, match="no layer has a linear module 'query'; there are down_proj"):
        add_lora(student, Lora(targets=("query",)))


def test_the_start_is_the_generators(make_teacher, make_student) -> None:
    found = []
    for _ in range(2):
        student = make_student(make_teacher("llama"))
        torch.manual_seed(5)
        add_lora(student, Lora(rank=2))
        found.append(student.model.layers[1].self_attn.v_proj.lora_a)
    assert torch.equal(*found)
    assert found[0].abs().sum() > 0
