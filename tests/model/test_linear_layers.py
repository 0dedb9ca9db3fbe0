"""Teachers some of whose layers are linear attention already (Qwen3.5): those stay, the others become mixers or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedModel,
)

from radlads.model.convert.restore import restore_attention, restored
from radlads.model.convert.transplant import transplant
from radlads.model.mixers.shared.registry import list_variants
from radlads.model.student.cache import RadladsCache
from radlads.model.student.export import export_student
from radlads.model.student.load import build_student, load_student
from radlads.model.teacher.load import find_family, load_teacher, teacher_warnings
from radlads.model.teacher.weights import open_teacher_weights
from radlads.model.training.calibration import calibrate
from radlads.model.training.objectives import build_objective
from radlads.model.training.quantized import is_matrix
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.recipe import Align, Distill
from radlads.tasks.contracts.specs import TeacherRef, TrainSpec

KINDS = ["linear_attention", "full_attention", "linear_attention", "full_attention", "full_attention"]
SOFTMAX = [1, 3, 4]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
KEPT = [(), (3,)]


@pytest.fixture(scope="module")
def teacher(make_teacher) -> PreTrainedModel:
    return make_teacher("qwen3_5_text", num_hidden_layers=5, layer_types=KINDS)


@pytest.fixture(params=KEPT, ids=str)
def student(request: pytest.FixtureRequest, teacher, make_student):
    return make_student(teacher, attention_layers=request.param, attention_rope=True)


def padded(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, mask = tokens.clone(), torch.ones_like(tokens)
    rows[1, :8], mask[1, :8] = 0, 0
    return rows, mask


@torch.no_grad()
def test_an_unconverted_student_is_the_teacher(teacher, make_student, tokens) -> None:
    student = make_student(teacher, attention_layers=SOFTMAX, attention_rope=True)
    rows, mask = padded(tokens)
    assert torch.equal(student(tokens).logits, teacher(tokens).logits)
    assert torch.equal(student(rows, attention_mask=mask).logits, teacher(rows, attention_mask=mask).logits)
    assert torch.equal(
        student.generate(rows, attention_mask=mask, **GREEDY), teacher.generate(rows, attention_mask=mask, **GREEDY)
    )


def test_linear_layers_stay_the_teachers(student, teacher) -> None:
    kept = student.config.attention_layers
    assert sorted(student.mixers()) == student.config.converted_layers() == [i for i in SOFTMAX if i not in kept]
    kinds = [("linear_attention", "full_attention")[i in kept] for i in range(5)]
    assert student.config.layer_types == kinds
    ours, theirs = student.state_dict(), teacher.state_dict()
    linear = [name for name in theirs if ".linear_attn." in name]
    assert len(linear) == 2 * 9
    for name in linear:
        assert torch.equal(ours[name], theirs[name])
        assert student.parameter_group(name) == "attention"
    firsts = [layer for layer, mixer in student.mixers().items() if getattr(mixer, "v0", None) is None]
    assert firsts == student.config.converted_layers()[:1]


@torch.no_grad()
def test_a_cache_changes_nothing(student, tokens) -> None:
    whole = student(tokens, use_cache=False).logits
    first = student(tokens[:, :9], use_cache=True)
    second = student(tokens[:, 9:15], past_key_values=first.past_key_values)
    cache, steps = second.past_key_values, [first.logits, second.logits]
    for t in range(15, tokens.shape[1]):
        steps.append(student(tokens[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=2e-4, rtol=1e-4)
    assert cache.get_seq_length() == 21
    made = student.generate(tokens, **GREEDY)
    assert torch.equal(made, student.generate(tokens, **GREEDY, use_cache=False))
    with torch.no_grad():
        predicted = student(made, use_cache=False).logits.argmax(-1)
    assert torch.equal(made[:, 21:], predicted[:, 20:-1])


@torch.no_grad()
def test_left_padding_changes_nothing(student, tokens) -> None:
    rows, mask = padded(tokens)
    short = rows[1:, 8:]
    logits = student(rows, attention_mask=mask).logits
    torch.testing.assert_close(logits[1, 8:], student(short).logits[0], atol=2e-4, rtol=1e-4)
    made = student.generate(rows, attention_mask=mask, **GREEDY)
    assert torch.equal(made[1:, 21:], student.generate(short, **GREEDY)[:, 13:])
    assert torch.equal(made[:1], student.generate(rows[:1], **GREEDY))


@torch.no_grad()
def test_beams_and_the_size_of_a_cache(teacher, make_student, tokens) -> None:
    student = make_student(teacher)
    search = {**GREEDY, "num_beams": 3, "pad_token_id": 0}
    assert torch.equal(student.generate(tokens, **search), student.generate(tokens, **search, use_cache=False))
    sizes = []
    for length in (5, 21):
        cache = RadladsCache(student.config)
        student(tokens[:, :length], past_key_values=cache, use_cache=True)
        sizes.append(cache.num_bytes())
    # Three states of mixers (and RAD-RWKV7 keeps no last input), two of delta nets with their convolutions.
    assert sizes[0] == sizes[1] == 4 * 2 * (3 * 4 * 16 * 16 + 2 * (4 * 8 * 12 + 4 * (2 * 2 * 8 + 4 * 12)))
    with pytest.raises(ValueError, match="must be a RadladsCache"):
        student(tokens, past_key_values=DynamicCache(config=student.model.config), use_cache=True)


def test_packed_documents_are_refused(student, tokens) -> None:
    restarting = torch.arange(21).expand(2, -1).clone()
    restarting[:, 9:] -= 9
    for packed in ({"cu_seqlens": torch.tensor([0, 9, 21, 42])}, {"position_ids": restarting}):
        with pytest.raises(ValueError, match="do not restart where documents do"):
            student.model(input_ids=tokens, use_cache=False, **packed)


@pytest.mark.parametrize("stage", [Align, Distill])
def test_training_on_packed_documents_is_refused(teacher, make_student, stage: Any) -> None:
    section = stage(tokens=10_000, context=20, batch=2, reset_at_documents=True)
    spec = TrainSpec(objective=stage.__name__.lower(), section=section, teacher=TeacherRef(path="x", fingerprint="y"))
    with pytest.raises(UserError, match=r"reset_at_documents: .* do not restart where documents do"):
        build_objective(spec, make_student(teacher), teacher)


@pytest.mark.parametrize("variant", list_variants())
def test_every_variant_gates_its_output_as_attention_does(teacher, make_student, tokens, variant: str) -> None:
    mixer = make_student(teacher, variant=variant).mixers()[1].double()
    x = torch.randn(2, 21, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rope = (torch.ones(1, 21, 4, dtype=torch.float64), torch.zeros(1, 21, 4, dtype=torch.float64))
    seen: list[torch.Tensor] = []
    mixer.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    inputs: list[torch.Tensor] = []
    mixer.q_proj.register_forward_hook(lambda module, args, out: inputs.append(out))
    with torch.no_grad():
        mixer.mix(x, rope=rope)
        gate = inputs[0].view(2, 21, 4, 2, 16)[..., 1, :].flatten(-2)
        mixer.q_proj.weight.view(4, 2, 16, 32)[:, 1].zero_()
        mixer.mix(x, rope=rope)
    gated, halved = seen
    assert gate.std() > 0.1
    torch.testing.assert_close(gated, 2 * halved * torch.sigmoid(gate), atol=1e-5, rtol=1e-5)


def test_a_multiplier_of_queries_leaves_their_gates(teacher, make_student) -> None:
    student = make_student(teacher)
    transplant(teacher, student, scale={"q": 0.5})
    ours, theirs = (model.model.layers[1].self_attn.q_proj.weight.view(4, 2, 16, 32) for model in (student, teacher))
    assert torch.equal(ours[:, 0], theirs[:, 0] * 0.5)
    assert torch.equal(ours[:, 1], theirs[:, 1])


def test_gradients_are_the_same_with_checkpointing(teacher, make_student, tokens) -> None:
    student = make_student(teacher, attention_layers=(3,), attention_rope=True).train()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        student.zero_grad()
        student.hidden(tokens).square().mean().backward()
        found.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-5, rtol=1e-4, msg=name)


def test_calibration_and_8_bit_leave_linear_layers_alone(teacher, make_student, tokens) -> None:
    student = make_student(teacher, attention_layers=(3,))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items() if ".linear_attn." in name}
    assert sorted(calibrate(student, teacher, [tokens])) == [1, 4]
    assert all(torch.equal(student.state_dict()[name], tensor) for name, tensor in before.items())
    assert not is_matrix(teacher, "model.layers.0.linear_attn.conv1d.weight")
    assert is_matrix(teacher, "model.layers.0.linear_attn.in_proj_qkv.weight")


@torch.no_grad()
def test_softmax_layers_alone_are_restored(teacher, make_student, tokens) -> None:
    student = make_student(teacher)
    with restored(student, teacher, [3]):
        expected = student(tokens, use_cache=False).logits
    restore_attention(student, teacher, [3], attention_rope=True)
    assert torch.equal(student(tokens, use_cache=False).logits, expected)
    assert sorted(student.mixers()) == [1, 4]
    for layers in ([0], [1, 4]):
        with pytest.raises(UserError, match="of the student's 5 layers 3 can be, and at least one stays"):
            restore_attention(student, teacher, layers, attention_rope=True)


@torch.no_grad()
def test_an_export_is_the_student(teacher, make_student, tokens, tmp_path: Path) -> None:
    student = make_student(teacher, attention_layers=(3,), attention_rope=True)
    export_student(student, None, tmp_path)
    remote = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.float32).eval()
    for again in (load_student(tmp_path), remote):
        assert torch.equal(again(tokens).logits, student(tokens).logits)
        assert torch.equal(again.generate(tokens, **GREEDY), student.generate(tokens, **GREEDY))


def test_layers_that_cannot_be_kept_are_named(teacher) -> None:
    rest: dict[str, Any] = {"variant": "rad_rwkv7", "options": {}, "attention_rope": False}
    with pytest.raises(UserError, match=r"layer 2, which is linear attention .* softmax are the layers 1, 3, 4$"):
        build_student(teacher.config, attention_layers=(1, 2), **rest)
    (line,) = teacher_warnings(teacher.config)
    assert line.startswith("2 of 5 layers are linear attention in the teacher already")
    assert line.endswith("only the layers 1, 3, 4 can be converted or kept")


def test_missing_linear_attention_is_named(make_teacher) -> None:
    teacher = make_teacher("qwen3_5_text", num_hidden_layers=5, layer_types=KINDS)
    del teacher.model.layers[2].linear_attn
    with pytest.raises(UserError, match="layer 2: linear_attn"):
        find_family(teacher.config).check(teacher)


@torch.no_grad()
def test_of_the_published_form_the_text_part_is_taken(teacher, make_student, tokens, tmp_path: Path) -> None:
    """A vision-language model, with layers that predict further ahead, which transformers drops as it loads."""
    torch.manual_seed(0)
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    rope = teacher.config.rope_parameters | {"mrope_section": [1, 1, 0], "mrope_interleaved": True}
    text = teacher.config.to_dict() | {"rope_parameters": rope}
    config = CONFIG_MAPPING["qwen3_5"](text_config=text, vision_config=vision, tie_word_embeddings=False)
    whole = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    whole.model.language_model.load_state_dict(teacher.model.state_dict())
    whole.lm_head.load_state_dict(teacher.lm_head.state_dict())
    whole.save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    save_file(load_file(path) | {"mtp.fc.weight": torch.ones(2, 4)}, path, metadata={"format": "pt"})
    taken = load_teacher(str(tmp_path), dtype=torch.float32)
    assert find_family(taken.config).model_type == "qwen3_5_text"
    assert "mtp.fc.weight" in open_teacher_weights(str(tmp_path), taken.config).left_out
    expected = whole(input_ids=tokens).logits
    assert torch.equal(taken(tokens).logits, expected)
    assert torch.equal(make_student(taken, attention_layers=SOFTMAX, attention_rope=True)(tokens).logits, expected)


def test_layers_that_predict_further_ahead_are_left_out(teacher, tmp_path: Path) -> None:
    teacher.save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    save_file(load_file(path) | {"mtp.fc.weight": torch.ones(2, 4)}, path, metadata={"format": "pt"})
    assert open_teacher_weights(str(tmp_path), teacher.config).left_out == {"mtp.fc.weight": 8}
