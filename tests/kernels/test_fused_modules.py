"""Which modules of a network are replaced by fused ones, that they compute the same, and what the log says."""

import copy
import sys
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from radlads.kernels.mixer_ops import rotate_heads
from radlads.kernels.shared.backends import installed
from radlads.kernels.shared.chosen import chosen_kernels, forget_kernels
from radlads.kernels.shared.testing import relative_rms
from radlads.model.mixers.shared import mixer
from radlads.model.mixers.shared.family_code import is_llama_mlp, is_llama_norm, is_llama_rotary
from radlads.model.mixers.shared.mixer import rotate_halves
from radlads.model.student.load import build_student
from radlads.model.training import fused_modules
from radlads.model.training.fused_modules import (
    fuse_modules,
    turns_as_llama,
)

NEITHER = {"olmo2", "olmo3", "gemma3_text", "qwen3_5_text", "cohere2"}  # their norms round, or are, otherwise
OTHER_MLP = {"phi3", "glm4", "gemma3_text", "qwen3_moe", "seed_oss"}  # one matrix for both, GELU, experts, dropout
TURNS = {"llama", "qwen2", "qwen3", "mistral", "gemma3_text", "smollm3", "seed_oss", "exaone4", "granite", "qwen3_moe"}


@pytest.fixture(autouse=True)
def fresh():
    forget_kernels()
    yield
    forget_kernels()


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "olmo3", "phi3", "glm4", "cohere2", "qwen3_5_text"]
)
def test_only_what_computes_the_same_is_replaced(family, family_config):
    config = family_config(family)
    with torch.device("meta"):
        student = build_student(config, variant="hxa079", options={}, attention_layers=(), attention_rope=False)
    norms = {type(m).__name__ for m in student.modules() if is_llama_norm(m)}
    assert all("RMSNorm" in name for name in norms)
    assert bool(norms) == (family not in NEITHER)
    assert any(is_llama_mlp(m) for m in student.modules()) == (family not in OTHER_MLP)
    rotary = {mixer.shape.rotary for mixer in student.mixers().values()}
    assert {is_llama_rotary(one) for one in rotary} == {family in TURNS}


def test_a_norm_that_differs_by_a_word_is_left_alone():
    class Wide(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            input_dtype = hidden_states.dtype
            hidden_states = hidden_states.to(torch.float32)
            variance = hidden_states.pow(2).mean(-1, keepdim=True)
            hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
            return (self.weight * hidden_states).to(input_dtype)

    assert is_llama_norm(LlamaRMSNorm(4))
    assert not is_llama_norm(Wide(4))
    assert not is_llama_rotary(None)


def test_on_a_cpu_nothing_changes(family_config):
    model = AutoModelForCausalLM.from_config(family_config("qwen3"))
    kinds = Counter(map(type, model.modules()))
    fuse_modules(model, torch.device("cpu"))
    assert Counter(map(type, model.modules())) == kinds
    why = "transformers (the tensors are on cpu, not on a GPU)"
    assert chosen_kernels() == {"rms_norm": why, "swiglu": why}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "smollm3", "glm4", "phi3"])
def test_softmax_attention_turns_by_the_fused_operator(family, family_config, monkeypatch):
    """The same logits, the operator called twice a layer with positions; the module of transformers stays as it is."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(family)).eval()
    tokens = torch.arange(3, 43).view(2, 20)
    expected, before = model(tokens).logits, vars(sys.modules[type(model).__module__])["apply_rotary_pos_emb"]
    layers = model.model.layers
    kinds = [type(layer.self_attn) for layer in layers]
    assert {turns_as_llama(layer.self_attn) for layer in layers} == {family in TURNS}
    calls = []
    monkeypatch.setattr(mixer, "rotate_heads", lambda *args: calls.append(args) or rotate_heads(*args))
    monkeypatch.setattr(fused_modules, "installed", lambda package: False)
    fuse_modules(model, torch.device("cuda"))
    torch.testing.assert_close(model(tokens).logits, expected)
    count = len(layers) if family != "smollm3" else sum(model.config.no_rope_layers)
    assert len(calls) == (2 * count if family in TURNS else 0)
    assert all(isinstance(layer.self_attn, kind) for layer, kind in zip(layers, kinds, strict=True))
    assert vars(sys.modules[type(model).__module__])["apply_rotary_pos_emb"] is before


def test_without_the_package_the_log_says_so(family_config, monkeypatch):
    monkeypatch.setattr(fused_modules, "installed", lambda package: False)
    config = family_config("qwen3")
    with torch.device("meta"):
        student = build_student(config, variant="hxa079", options={}, attention_layers=(), attention_rope=False)
    fuse_modules(student, torch.device("cuda"))
    why = "transformers (liger-kernel is not installed)"
    assert chosen_kernels() == {"rms_norm": "torch, fused", "swiglu": why}
    assert {mixer.shape.rotary for mixer in student.mixers().values()} == {rotate_halves}


@pytest.mark.slow
@pytest.mark.skipif(not installed("liger_kernel"), reason="liger-kernel is not installed")
def test_interpreted(interpret):
    interpret("interpreter_liger.py")


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "phi3", "gemma3_text"])
def test_a_teacher_on_the_gpu_is_no_further_from_the_truth(family, family_config):
    """Logits and gradients of a network in bf16, fused and not, against fp64."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(family), dtype=torch.float32).bfloat16().cuda()
    tokens = torch.arange(3, 43, device="cuda").view(2, 20)

    def run(one):
        logits = one(tokens).logits
        logits.double().square().mean().backward()
        return [logits.detach(), *(p.grad for p in one.parameters() if p.grad is not None)]

    exact, own = run(copy.deepcopy(model).double()), run(copy.deepcopy(model))
    fuse_modules(model, torch.device("cuda"))
    for ours, theirs, wanted in zip(run(model), own, exact, strict=True):
        assert relative_rms(ours, wanted) <= 1.3 * relative_rms(theirs, wanted) + 2**-9
    if family != "gemma3_text":
        assert chosen_kernels()["rms_norm"] == "torch, fused"


@pytest.mark.gpu
@pytest.mark.parametrize("width", [576, 3584])
def test_norms_are_no_further_from_the_truth(width):
    torch.manual_seed(0)
    own = LlamaRMSNorm(width).bfloat16().cuda()
    own.weight.data.normal_(1.0, 0.1)
    x, dy = (torch.randn(3, 50, width, device="cuda").bfloat16() for _ in range(2))

    def run(norm, x, dy):
        x = x.clone().requires_grad_()
        y = norm(x)
        y.backward(dy)
        return y.detach(), x.grad, norm.weight.grad

    exact, plain = run(copy.deepcopy(own).double(), x.double(), dy.double()), run(copy.deepcopy(own), x, dy)
    fuse_modules(own, torch.device("cuda"))
    for ours, theirs, wanted in zip(run(own, x, dy), plain, exact, strict=True):
        assert relative_rms(ours, wanted) <= 1.1 * relative_rms(theirs, wanted) + 1e-4
