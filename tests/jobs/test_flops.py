"""The FLOP of a training step, beside those that torch counts in its matrix products; and `mfu`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from radlads.model.student.load import build_student
from radlads.model.training.quantized import quantize_frozen
from radlads.tasks.contracts.recipe.recipe import Distill, Extend, parse_recipe
from radlads.tasks.jobs.plan.sizes import count_networks
from radlads.tasks.jobs.train.flops import count_multiplied, matrices, trained_matrices
from radlads.tasks.jobs.train.mfu import Utilisation

TOKENS = 32
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip


def config_of(model_type: str = "qwen3", *, tied: bool = False, **more: Any) -> Any:
    return AutoConfig.for_model(model_type, **SIZES, tie_word_embeddings=tied, **more)


def networks(config: Any, attention_layers: tuple[int, ...] = (1,)) -> tuple[Any, Any]:
    with torch.device("meta"):
        student = build_student(
            config, variant="rad_rwkv7", options={}, attention_layers=attention_layers, attention_rope=False
        )
        return AutoModelForCausalLM.from_config(config), student


def products(model: Any, *, backward: bool) -> int:
    """FLOP of the matrix products of one sequence, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        out = model(input_ids=torch.randint(0, 96, (1, TOKENS)), use_cache=False).logits
        if backward:
            out.sum().backward()
    found = counter.get_flop_counts()["Global"]
    return sum(count for operator, count in found.items() if str(operator) in ("aten.mm", "aten.addmm"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("frozen", [(), ("mlp",)])
def test_the_count_is_that_of_the_products_that_torch_runs(tied: bool, frozen: tuple[str, ...]) -> None:
    """Of a plain model, whose products are all matrices (an attention's own run in one operator)."""
    model = AutoModelForCausalLM.from_config(config_of(tied=tied))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(f".{part}." in name for part in frozen))
    of = count_multiplied(model, model)
    trained = trained_matrices(model, lambda name: model.get_parameter(name).requires_grad)
    flops = of.stage_flops(TOKENS, trained=trained, taught=True, layerwise=False)
    pair = 3 * 2 * TOKENS * 32
    assert TOKENS * (flops.teacher - pair) == products(model, backward=False)
    assert TOKENS * (flops.forward + flops.backward - 3 * pair) == products(model, backward=True)


def test_experts_count_as_often_as_a_token_is_routed() -> None:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    teacher, _ = networks(config_of("qwen3_moe", **experts))
    mlps = {name: count for name, count in matrices(teacher).items() if ".mlp." in name}
    assert sum(mlps.values()) == 3 * (2 * 3 * 32 * 16 + 8 * 32)  # and the routers


def test_frozen_weights_in_8_bit_count_as_they_did() -> None:
    config = config_of()
    _, student = networks(config)
    whole = count_multiplied(None, student)
    plain = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    before = count_multiplied(plain, student)
    quantize_frozen(plain, 8, lambda name: ".mlp." in name)
    assert count_multiplied(plain, student) == before
    assert before.student == whole.student


def test_a_plan_counts_what_the_job_counts() -> None:
    config = config_of()
    teacher, student = networks(config)
    files = {"sources": [{"kind": "files", "paths": ["a.txt"]}]}
    align = {"tokens": 4096, "context": 64, "batch": 4}
    raw = {"name": "t", "teacher": {"path": "/t"}, "student": {"attention_layers": [1]}, "data": {"train": files}}
    sizes = count_networks(parse_recipe(raw | {"align": align}), config)
    assert sizes.multiplied == count_multiplied(teacher, student)
    section = Distill(tokens=4096, context=64, batch=4, freeze=("mlp", "head"))
    told = sizes.flops("distill", section)
    trains = {"mixer", "attention", "norms", "embeddings"}
    trained = trained_matrices(student, lambda name: student.parameter_group(name) in trains)
    assert told == sizes.multiplied.stage_flops(64, trained=trained, taught=True, layerwise=False)


def test_mfu_is_the_share_of_the_peak_and_follows_the_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = networks(config_of())
    section = Extend(
        tokens=512 + 1024, context=64, batch=4, phases=[{"tokens": 512}, {"tokens": 1024, "context": 128}],
    )  # fmt: skip
    spec: Any = SimpleNamespace(objective="extend", section=section)
    objective: Any = SimpleNamespace(student=student, _teacher=(teacher,), trainable=lambda name: True)
    job: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, world_size=2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    short, long = (Utilisation(job, spec, objective).of(part, 1000.0)["mfu"] for part in section.parts)
    of = count_multiplied(None, student)
    every = sum(of.student.values())
    assert short == pytest.approx((6 * every + 6 * 64 * 32) * 1000 / (2 * 989e12))
    assert (long - short) * 2 * 989e12 == pytest.approx(6 * 64 * 32 * 1000)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Unheard-of")
    assert Utilisation(job, spec, objective).of(section, 1000.0) == {}
    for other in ({"device": torch.device("cpu")}, {"dtype": torch.float32}):
        assert Utilisation(SimpleNamespace(**vars(job) | other), spec, objective).of(section, 1000.0) == {}
