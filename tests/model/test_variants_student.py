"""Every variant inside whole students: any head layout, cache, padding, packing, first values, alignment."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from radlads.model import list_variants
from radlads.model.student.cache import RadladsCache
from radlads.model.student.export import export_student
from radlads.model.student.load import build_student, load_student
from radlads.model.student.modeling import RadladsForCausalLM
from radlads.model.training.probe import AttentionProbe

# Teacher and its changes: heads narrower and wider than the model, one kv head, as many as query heads, biases, norms.
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa-norm": ("qwen3", {}),
    "mha-bias": ("llama", {"num_key_value_heads": 4, "head_dim": 8, "attention_bias": True}),
    "mqa-wide": ("llama", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 20}),
    "mqa-narrow-norm": ("qwen3", {"num_key_value_heads": 1, "head_dim": 8, "num_attention_heads": 2}),
}
CASES = [(variant, layout) for variant in list_variants() for layout in LAYOUTS]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def student(request: pytest.FixtureRequest, make_teacher, make_student) -> RadladsForCausalLM:
    variant, layout = request.param
    model_type, changes = LAYOUTS[layout]
    return make_student(make_teacher(model_type, **changes), variant=variant)


def close(got: Tensor, wanted: Tensor, tolerance: float = 3e-5) -> None:
    assert (got - wanted).abs().max() <= tolerance * max(1.0, float(wanted.abs().max()))


@torch.no_grad()
def test_step_by_step_is_parallel(student: RadladsForCausalLM, tokens: Tensor) -> None:
    whole = student(tokens).logits
    assert whole.isfinite().all()
    cache, steps = RadladsCache(student.config), []
    for t in range(tokens.shape[1]):
        steps.append(student(tokens[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    close(torch.cat(steps, 1), whole)
    first = student(tokens[:, :8], use_cache=True)
    close(student(tokens[:, 8:], past_key_values=first.past_key_values).logits, whole[:, 8:])


@torch.no_grad()
def test_padding_changes_nothing(student: RadladsForCausalLM, tokens: Tensor) -> None:
    """Left of the tokens, and left of what is generated after them."""
    short = tokens[1:, :13]
    rows = torch.cat([tokens[:1], torch.cat([torch.zeros(1, 8, dtype=torch.long), short], 1)])
    mask = torch.ones_like(rows)
    mask[1, :8] = 0
    padded = student(rows, attention_mask=mask, use_cache=True)
    alone = student(short, use_cache=True)
    close(padded.logits[1, 8:], alone.logits[0])
    after = torch.tensor([[5], [6]])
    mask = torch.cat([mask, torch.ones_like(after)], 1)
    following = student(after, attention_mask=mask, past_key_values=padded.past_key_values).logits
    close(following[1:], student(after[1:], past_key_values=alone.past_key_values).logits)


@torch.no_grad()
def test_packed_documents_are_separate_runs(student: RadladsForCausalLM, tokens: Tensor) -> None:
    bounds = [0, 1, 9, 9, 21, 33, 42]  # an empty document among them, and a row's end
    packed = student(tokens, cu_seqlens=torch.tensor(bounds)).logits.flatten(0, 1)
    flat = tokens.flatten()
    for start, stop in pairwise(bounds):
        if start < stop:
            close(packed[start:stop], student(flat[None, start:stop]).logits[0])


@torch.no_grad()
def test_a_window_has_the_memory_of_a_recurrent_state(make_teacher, make_student, tokens: Tensor) -> None:
    """In bf16, sinks and the count of tokens apart."""
    teacher, sizes = make_teacher("qwen3"), []
    for variant, options in (("sliding_window", {"sinks": 0}), ("hxa079", {})):
        student = make_student(teacher, variant=variant, options=options).bfloat16()
        layers = student(tokens, use_cache=True).past_key_values.layers
        sizes.append([layer.state.recurrent.nbytes for layer in layers])
    assert sizes[0] == sizes[1] == [2 * 4 * 16 * 16 * 4] * 3


@pytest.mark.parametrize("variant", list_variants())
def test_saved_and_loaded(make_teacher, make_student, tokens: Tensor, tmp_path, variant: str) -> None:
    student = make_student(make_teacher("qwen3"), variant=variant, attention_layers=(1,))
    export_student(student, None, tmp_path)
    loaded = load_student(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, student(tokens).logits)
    ranks = [value for name, value in loaded.config.options.items() if name.endswith("_rank")]
    assert ranks or variant == "sliding_window"
    assert all(isinstance(rank, int) for rank in ranks)
    constants = loaded.config.constants
    assert constants == dict(student.mixers()[0].CONSTANTS)
    assert {"output_scale", "score_scale"} & constants.keys() or variant == "rad_rwkv7"
    # Gated DeltaNet's decay has no constant: all of it is learned. A window has no decay.
    without = ("gated_deltanet", "sliding_window")
    assert {"decay_offset", "decay_scale", "least_log_decay"} & constants.keys() or variant in without


@pytest.mark.parametrize("variant", list_variants())
def test_built_on_the_meta_device(make_teacher, variant: str) -> None:
    config = make_teacher("qwen3").config
    settings: dict[str, Any] = {"options": {}, "attention_layers": (), "attention_rope": False}
    with torch.device("meta"):
        meta = build_student(config, variant=variant, **settings)
    real = build_student(config, variant=variant, **settings)
    assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(p.is_meta for p in meta.parameters())


def first_layer_gradients(teacher, student: RadladsForCausalLM, tokens: Tensor, layer: int) -> set[str]:
    """Parameters of the first layer that a deeper layer's alignment loss moves."""
    student.train()
    with AttentionProbe(teacher, student) as probe, torch.no_grad():
        teacher(tokens)
    probe.losses[layer].backward()
    first = student.attention(0)
    return {name.split(".")[0] for name, p in first.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


@pytest.mark.parametrize("kept", [(), (0,)], ids=["layer-0", "layer-0-kept"])
@pytest.mark.parametrize("variant", list_variants())
def test_first_values_carry_the_gradient(make_teacher, make_student, tokens, variant: str, kept) -> None:
    """Into the first layer, also where that stays softmax."""
    teacher = make_teacher("qwen3")
    student = make_student(teacher, variant=variant, attention_layers=kept)
    reached = first_layer_gradients(teacher, student, tokens, layer=2)
    wanted = {
        "rwkv7": {"v_proj", "x_v"},
        "rad_rwkv7": {"v_proj"},
        "cxa073": {"v_proj"},
        "cxa075": {"v_proj"},
        "hxa079": {"v_proj", "k_proj", "k_norm"},
    }
    assert reached == wanted.get(variant, set()) - ({"x_v"} if kept else set())  # attention has no token shift
    if variant in wanted and variant != "rad_rwkv7":
        student = make_student(
            teacher, variant=variant, attention_layers=kept, options={"first_values_gradient": False}
        )
        assert first_layer_gradients(teacher, student, tokens, layer=2) == set()


@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
@pytest.mark.parametrize("variant", list_variants())
def test_twenty_steps_of_alignment(make_teacher, make_student, variant: str, model_type: str) -> None:
    teacher = make_teacher(model_type)
    options = {"window": 4} if variant == "sliding_window" else {}  # else it sees all of these rows, as the teacher
    student = make_student(teacher, variant=variant, options=options, scrambled=False).train()
    parameters = [p for mixer in student.mixers().values() for p in mixer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.0)
    tokens = torch.randint(3, 64, (4, 24), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(20):
        with AttentionProbe(teacher, student) as probe, torch.no_grad():
            teacher(tokens)
        loss = torch.stack(list(probe.losses.values())).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0], losses


@pytest.mark.parametrize("scaling", ["linear", "llama3", "yarn"])
def test_scaled_rope_reaches_the_mixers(make_teacher, make_student, tokens: Tensor, scaling: str) -> None:
    """The family's own rotary module turns r and k, whatever its type; a variant without RoPE sees none of it."""
    more = {"llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}
    rope = {"rope_type": scaling, "rope_theta": 100.0, "factor": 4.0, **more.get(scaling, {})}
    scaled, plain = make_teacher("llama", rope_parameters=rope), make_teacher("llama")
    for variant, turned in (("hxa079", True), ("cxa073", False)):
        seen: list[tuple[Tensor, Tensor]] = []

        def remember(_mixer: Any, _args: Any, given: dict[str, Any], seen: list = seen) -> None:
            seen.append(given["position_embeddings"])

        student = make_student(scaled, variant=variant)
        student.mixers()[1].register_forward_pre_hook(remember, with_kwargs=True)
        with torch.no_grad():
            logits = student(tokens).logits
            wanted = scaled.model.rotary_emb(logits, torch.arange(21)[None])
            assert all(torch.equal(got, part) for got, part in zip(seen[0], wanted, strict=True))
            other = make_student(plain, variant=variant)
            assert torch.equal(other(tokens).logits, logits) != turned
