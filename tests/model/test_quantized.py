"""Frozen weights in 8 bit: how close, which, and the gradient of what goes through them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from radlads.model.convert.transplant import transplant
from radlads.model.student.export import export_student
from radlads.model.student.load import build_student, load_student
from radlads.model.student.modeling import RadladsForCausalLM
from radlads.model.training.quantized import (
    Int8Weight,
    num_weights,
    quantize,
    quantize_frozen,
    quantized_names,
    share_frozen,
)
from radlads.model.weights.weight_files import open_weight_files

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}


def dense(seed: int = 0, *, mlp_bias: bool = False) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(**SIZES, intermediate_size=256, num_key_value_heads=2, mlp_bias=mlp_bias)
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def experts(implementation: str) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"moe_intermediate_size": 48, "num_experts": 6, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **sizes, intermediate_size=64, num_key_value_heads=2))
    model.set_experts_implementation(implementation)
    return model.requires_grad_(False).eval()


def of_mlp(name: str) -> bool:
    return ".mlp." in name


def weight_of(model: nn.Module, name: str) -> Tensor | Int8Weight:
    place, _, own = name.rpartition(".")
    return getattr(model.get_submodule(place), own)


def rounded_copy(original: nn.Module, quantized: nn.Module) -> nn.Module:
    """The original with each weight that is quantised in the other replaced by its dequantised value."""
    copied = copy.deepcopy(original)
    for name in quantized_names(quantized):
        copied.get_parameter(name).copy_(weight_of(quantized, name).dequantized())
    return copied


@pytest.mark.parametrize(("shape", "groups"), [((24, 256), 2), ((24, 48), 1), ((3, 16, 384), 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_number_is_further_off_than_half_a_step(shape: tuple[int, ...], groups: int, dtype: torch.dtype):
    weight = torch.randn(shape).to(dtype)
    weight[..., 0, :] = 0
    weight[..., 1, 0] = 40  # an outlier costs its own group and no other
    values, scales = quantize(weight)
    assert values.dtype == torch.int8
    assert values.shape == weight.shape
    assert scales.shape == (*shape[:-1], groups)
    error = (Int8Weight(values, scales).dequantized(torch.float32) - weight.float()).abs().unflatten(-1, (groups, -1))
    largest = weight.float().abs().unflatten(-1, (groups, -1)).amax(-1, keepdim=True)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6  # of the scale, and of the product with it
    assert (error <= largest / 127 / 2 + rounding * largest).all()
    assert error[..., 0, :, :].max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_gradient_of_the_input_is_that_of_the_dequantised_matrix(dtype: torch.dtype, bias: bool):
    layer = nn.Linear(256, 40, bias=bias, dtype=dtype).requires_grad_(False)
    assert quantize_frozen(layer, 8, lambda name: name == "weight") == ["weight"]
    x = torch.randn(3, 5, 256, dtype=dtype, requires_grad=True)
    grad = torch.randn(3, 5, 40, dtype=dtype)
    out = layer(x)
    out.backward(grad)
    beside = x.detach().clone().requires_grad_()
    wanted = nn.functional.linear(beside, layer.weight.dequantized(), layer.bias)
    wanted.backward(grad)
    assert torch.equal(out, wanted)
    assert torch.equal(x.grad, beside.grad)


def test_gradient_is_right_numerically():
    layer = nn.Linear(128, 6, dtype=torch.float64).requires_grad_(False)
    values, scales = quantize(layer.weight.float())
    weight = Int8Weight(values, scales.double())
    weight.dequantized = lambda dtype=None: Int8Weight(values, scales).dequantized(torch.float32).double()  # type: ignore[method-assign]
    x = torch.randn(2, 128, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: nn.functional.linear(x, weight), (x,))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_compute_and_learn_as_with_dequantised_ones(implementation: str):
    model = experts(implementation)
    original = copy.deepcopy(model)
    names = quantize_frozen(model, 8, of_mlp)
    assert sorted(name.split("mlp.")[1] for name in names) == sorted(2 * ["experts.down_proj", "experts.gate_up_proj"])
    assert isinstance(model.model.layers[0].mlp.gate.weight, nn.Parameter)  # the router
    rounded = rounded_copy(original, model)
    x = torch.randn(2, 9, 32, requires_grad=True)
    beside = x.detach().clone().requires_grad_()
    out, wanted = model(inputs_embeds=x).logits, rounded(inputs_embeds=beside).logits
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-6)
    grad = torch.randn_like(out)
    out.backward(grad)
    wanted.backward(grad)
    torch.testing.assert_close(x.grad, beside.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mlp_bias", [False, True])
def test_a_model_keeps_its_names_its_dtype_and_what_was_not_selected(mlp_bias: bool):
    model = dense(mlp_bias=mlp_bias)
    original = copy.deepcopy(model)
    names = quantize_frozen(model, 8, of_mlp)
    assert len(names) == 2 * 3
    assert quantized_names(model) == names
    assert set(dict(original.named_parameters())) - set(dict(model.named_parameters())) == set(names)
    ids = torch.randint(64, (2, 11))
    out = model(ids).logits
    assert torch.equal(out, rounded_copy(original, model)(ids).logits)
    assert not torch.equal(out, original(ids).logits)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(ids).logits, out)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear"
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)


def test_what_is_held_in_8_bit_counts_in_the_size_of_a_model():
    model = dense()
    size = num_weights(model)
    quantize_frozen(model, 8, of_mlp)
    assert num_weights(model) == size > sum(parameter.numel() for parameter in model.parameters())


def test_a_matrix_moves_with_its_module():
    layer = nn.Linear(128, 4).requires_grad_(False)
    quantize_frozen(layer, 8, lambda name: True)
    assert layer.to("meta").weight.device.type == "meta"


def test_nothing_is_kept_for_the_backward_pass():
    layer = nn.Linear(128, 64, bias=False).requires_grad_(False)
    quantize_frozen(layer, 8, lambda name: True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(4, 128, requires_grad=True))
    assert kept == []


def test_what_cannot_be_held_in_8_bit_is_refused():
    with pytest.raises(ValueError, match="8 or 16 bits, not 4"):
        quantize_frozen(dense(), 4, of_mlp)
    training = dense().requires_grad_(True)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.gate_proj.weight trains"):
        quantize_frozen(training, 8, of_mlp)
    layer = nn.Linear(128, 4).requires_grad_(False)
    quantize_frozen(layer, 8, lambda name: True)
    layer.bias.requires_grad_(True)
    with pytest.raises(ValueError, match="the bias beside an 8-bit weight"):
        layer(torch.randn(2, 128))
    with pytest.raises(TypeError, match="matmul does not know 8-bit weights"):
        torch.matmul(torch.randn(2, 128), layer.weight)
    assert quantize_frozen(dense(), 16, of_mlp) == []


@pytest.mark.parametrize("bits", [8, 16])
def test_equal_tensors_are_shared_in_the_teachers_form_and_others_are_not(bits: int):
    teacher, student = dense(), dense()
    changed = "model.layers.1.mlp.up_proj.weight"
    student.get_parameter(changed).mul_(1.5)
    quantize_frozen(teacher, bits, of_mlp)
    before = student(torch.arange(20)[None]).logits
    shared = share_frozen(student, teacher, of_mlp)
    assert len(shared) == 5
    assert changed not in shared
    for name in shared:
        ours, theirs = weight_of(student, name), weight_of(teacher, name)
        if bits == 8:
            ours, theirs = ours.values, theirs.values
        assert ours.data_ptr() == theirs.data_ptr()
    after = student(torch.arange(20)[None]).logits
    assert torch.equal(before, after) == (bits == 16)


def export(student: RadladsForCausalLM, folder: Path, **options: object) -> dict[str, Tensor]:
    export_student(student, None, folder, **options)
    files = open_weight_files(str(folder))
    return {name: files.read(name) for name in files.names()}


@pytest.mark.parametrize("max_shard_bytes", [4_000_000_000, 40_000])
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_the_export_gives_the_originals_back_bit_for_bit(tmp_path: Path, max_shard_bytes: int, kind: str):
    teacher = (dense() if kind == "dense" else experts("eager")).to(torch.bfloat16)
    student = build_student(
        teacher.config,
        variant="rad_rwkv7",
        options={},
        attention_layers=(1,),
        attention_rope=False,
        dtype=torch.bfloat16,
    )
    transplant(teacher, student)
    before = export(student, tmp_path / "before")
    loaded = load_student(tmp_path / "before").requires_grad_(False)
    assert quantize_frozen(loaded, 8, of_mlp)
    with pytest.raises(ValueError, match="`originals` must say"):
        export_student(loaded, None, tmp_path / "after")
    originals = open_weight_files(str(tmp_path / "before"))
    after = export(loaded, tmp_path / "after", originals=originals, max_shard_bytes=max_shard_bytes)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    theirs = teacher.state_dict()
    assert all(torch.equal(after[name], theirs[name]) for name in quantized_names(loaded))
    load_student(tmp_path / "after")
