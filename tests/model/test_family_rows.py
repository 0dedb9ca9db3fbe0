"""What a family's row and the readings from its modules claim, held against the family's own code; and its training."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

from radlads.model.convert.transplant import transplant
from radlads.model.student.load import build_student
from radlads.model.teacher.load import find_family, list_families, load_teacher
from radlads.model.training.hidden_states import head_inputs, plain_hidden
from radlads.model.training.objectives import build_objective
from radlads.model.training.probe import AttentionProbe
from radlads.tasks.contracts.recipe.recipe import Align, Distill, Finetune
from radlads.tasks.contracts.specs import TeacherRef, TrainSpec

FAMILIES = list_families()
SECTIONS: dict[str, Any] = {"align": Align, "distill": Distill, "finetune": Finetune}


def scored(monkeypatch: pytest.MonkeyPatch, teacher: PreTrainedModel, tokens: Tensor) -> list[tuple[Tensor, ...]]:
    """Layer by layer what a teacher's attention scores: q times its scale over the usual one, k, v, all [B,T,·,K]."""
    seen: list[tuple[Tensor, ...]] = []
    module = sys.modules[type(find_family(teacher.config).attention_modules(teacher)[0]).__module__]
    original = module.eager_attention_forward

    def watch(attention: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((q.transpose(1, 2) * kwargs["scaling"] * q.shape[-1] ** 0.5, k.transpose(1, 2), v.transpose(1, 2)))
        return original(attention, q, k, v, *args, **kwargs)

    monkeypatch.setattr(module, "eager_attention_forward", watch)
    teacher.set_attn_implementation("eager")
    with torch.no_grad():
        teacher(tokens)
    return seen


@pytest.mark.parametrize("model_type", FAMILIES)
def test_mixers_project_norm_rotate_and_scale_as_attention_does(
    monkeypatch, make_teacher, make_student, tokens: Tensor, model_type: str
) -> None:
    teacher = make_teacher(model_type)
    student = make_student(teacher)
    short = tokens[:, :12]  # Ministral 3 scales the queries beyond, which mixers leave
    theirs = scored(monkeypatch, teacher, short)
    ours: list[tuple[Tensor, ...]] = []

    class Recorder(AttentionProbe):
        def compare(self, layer: int, mixer: Any, x_BTD: Tensor, rope: Any, wanted_BTD: Tensor) -> None:
            ours.append(mixer.project(x_BTD, rope)[:3])

    with torch.no_grad(), Recorder(teacher, student):
        plain_hidden(teacher, short, None)
    assert len(ours) == 3
    for mine, attention in zip(ours, theirs, strict=False):
        for actual, expected in zip(mine, attention, strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_the_tiny_teachers_differ_where_their_families_do(make_teacher, make_student) -> None:
    shapes = {name: make_student(make_teacher(name)).mixers() for name in FAMILIES}
    still = {
        name: [layer for layer, mixer in mixers.items() if not mixer.shape.rotates] for name, mixers in shapes.items()
    }
    assert {name: layers for name, layers in still.items() if layers} == {
        "smollm3": [1],
        "cohere2": [1],
        "exaone4": [1],
    }
    assert {name for name, mixers in shapes.items() if mixers[0].shape.norm_all_heads} == {"olmo2", "olmo3"}
    assert {name for name, mixers in shapes.items() if mixers[0].shape.q_scale != 1} == {"granite", "gemma3_text"}
    everywhere = make_teacher("exaone4", sliding_window=None, layer_types=["full_attention"] * 3)
    assert all(mixer.shape.rotates for mixer in make_student(everywhere).mixers().values())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_hidden_states_times_the_head_are_the_logits(
    make_teacher, make_student, tokens: Tensor, model_type: str
) -> None:
    teacher = make_teacher(model_type)
    student = make_student(teacher, attention_layers=(1,))
    with torch.no_grad():
        for model, hidden in ((teacher, plain_hidden(teacher, tokens, None)), (student, student.hidden(tokens))):
            logits = head_inputs(model, hidden) @ model.get_output_embeddings().weight.T
            torch.testing.assert_close(logits, model(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_packed_documents_are_read_apart_by_every_family(
    make_teacher, make_student, tokens: Tensor, model_type: str
) -> None:
    bounds = torch.tensor([0, 8, 21, 30, 42])
    flat = tokens.flatten()
    for kept in ((1,), (0, 1, 2)):
        student = make_student(make_teacher(model_type), attention_layers=kept, attention_rope=True)
        if find_family(student.model.config).linear_attention is not None:
            with pytest.raises(ValueError, match="do not restart where documents do"):
                student.hidden(tokens, cu_seqlens=bounds)
            continue
        with torch.no_grad():
            packed = student.hidden(tokens, cu_seqlens=bounds).flatten(0, 1)
            apart = torch.cat([student.hidden(flat[None, start:stop])[0] for start, stop in pairwise(bounds.tolist())])
        torch.testing.assert_close(packed, apart, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_student_learns_in_every_stage(make_teacher, make_student, tokens: Tensor, model_type: str) -> None:
    """Twenty steps through the objectives of the product, in training mode, layer 1 kept."""
    torch.manual_seed(0)
    teacher = make_teacher(model_type)
    student = make_student(teacher, attention_layers=(1,), scrambled=False)
    reference = TeacherRef(path="x", fingerprint="y")
    for name, steps in (("align", 10), ("distill", 7), ("finetune", 3)):
        section = SECTIONS[name](tokens=10_000, context=20, batch=2)
        objective = build_objective(TrainSpec(objective=name, section=section, teacher=reference), student, teacher)
        objective.train()
        trained = []
        for key, parameter in student.named_parameters():
            parameter.requires_grad_(objective.trainable(key))
            trained += [parameter] if parameter.requires_grad else []
        optimizer = torch.optim.Adam(trained, lr=3e-3)
        losses = []
        for step in range(steps):
            objective.begin_step(step)
            loss, _ = objective({"input_ids": tokens})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0], (name, losses)


def wrapper(model_type: str, text: dict[str, Any]) -> PreTrainedModel:
    """A tiny vision-language model around a text part."""
    torch.manual_seed(0)
    vision = {
        "model_type": "pixtral" if model_type == "mistral3" else "siglip_vision_model",
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = CONFIG_MAPPING[model_type](text_config=text, vision_config=vision)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


@pytest.mark.parametrize(
    ("model_type", "text_type"),
    [("gemma3", "gemma3_text"), ("mistral3", "ministral3"), ("mistral3", "mistral"), ("cohere2_vision", "cohere2")],
)
def test_the_text_part_of_a_wrapper_is_its_familys(
    make_teacher, tokens: Tensor, tmp_path: Path, model_type: str, text_type: str
) -> None:
    text = make_teacher(text_type).config.to_dict() | {"tie_word_embeddings": True}
    whole = wrapper(model_type, text)
    whole.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert find_family(raw).model_type == text_type
    teacher = load_teacher(str(tmp_path), dtype=torch.float32)
    student = build_student(
        teacher.config, variant="rad_rwkv7", options={}, attention_layers=(0, 1, 2), attention_rope=True
    )
    transplant(teacher, student)
    with torch.no_grad():
        expected = whole(input_ids=tokens).logits
        if model_type == "cohere2_vision":  # transformers' wrapper leaves out what the language model was trained with
            expected = expected * whole.config.text_config.logit_scale
        torch.testing.assert_close(teacher(tokens).logits, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(student.eval()(tokens).logits, teacher(tokens).logits)
