"""What each stage minimises and trains; packed documents; gradient checkpointing; what stays exact under a cast."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from radlads.model.student.documents import document_bounds
from radlads.model.training.align_losses import l2_loss
from radlads.model.training.objectives import OBJECTIVES, Objective, build_objective
from radlads.model.training.probe import AttentionProbe
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.losses import ExtendPhase
from radlads.tasks.contracts.recipe.recipe import Align, Distill, Extend, Finetune, Pretrain
from radlads.tasks.contracts.specs import TeacherRef, TrainSpec
from radlads.tasks.contracts.stages import STAGES, TRAINING_STAGES

SECTIONS: dict[str, Any] = {
    "align": Align,
    "distill": Distill,
    "finetune": Finetune,
    "extend": Extend,
    "pretrain": Pretrain,
}


def objective(name: str, student, teacher=None, **changes: Any) -> Objective:
    extra = {"config": {}, "tokenizer": "x"} if name == "pretrain" else {}
    section = SECTIONS[name](tokens=100, context=20, batch=2, **extra, **changes)
    reference = TeacherRef(path="x", fingerprint="y")
    return build_objective(TrainSpec(objective=name, section=section, teacher=reference), student, teacher)


def set_trainable(built: Objective) -> dict[str, Tensor]:
    parameters = dict(built.student.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(built.trainable(name))
        parameter.grad = None
    return parameters


@pytest.fixture
def batch(tokens: Tensor) -> dict[str, Tensor]:
    document_ids = torch.zeros_like(tokens)
    document_ids[0, 7:] = 1
    document_ids[1, 1:] = 2
    document_ids[1, 13:] = 3
    return {"input_ids": tokens, "document_ids": document_ids}


def test_only_two_stages_always_need_a_teacher_and_the_table_says_so() -> None:
    assert [name for name in SECTIONS if OBJECTIVES[name].needs_teacher] == ["align", "distill"]
    assert {name: STAGES[name].needs_teacher for name in OBJECTIVES} == {
        name: objective.needs_teacher for name, objective in OBJECTIVES.items()
    }
    assert set(OBJECTIVES) == set(TRAINING_STAGES)


def test_align_is_the_mean_over_layers_of_what_each_mixer_misses(make_teacher, make_student, batch) -> None:
    teacher = make_teacher("qwen3")
    student = make_student(teacher, attention_layers=(1,))
    loss, metrics = objective("align", student, teacher)(batch)
    assert set(metrics) == {"loss", "layer_00", "layer_02"}
    torch.testing.assert_close(loss, (metrics["layer_00"] + metrics["layer_02"]) / 2)

    # by hand for layer 0: the teacher's own input, its attention, the mixer
    x = teacher.model.embed_tokens(batch["input_ids"][:, :-1])
    normed = teacher.model.layers[0].input_layernorm(x)
    rope = teacher.model.rotary_emb(x, torch.arange(20)[None])
    wanted, _ = teacher.model.layers[0].self_attn(normed, position_embeddings=rope, attention_mask=None)
    got = student.mixers()[0].mix(normed, rope=rope).out
    by_hand = ((wanted - got).square().sum(-1).sqrt() / 32**0.5).mean()
    torch.testing.assert_close(metrics["layer_00"], by_hand.detach())
    mse = objective("align", student, teacher, loss="mse")(batch)[1]["layer_00"]
    torch.testing.assert_close(mse, (wanted - got).square().mean().detach())


def test_a_perfect_mixer_has_no_loss_and_a_finite_gradient() -> None:
    wanted = torch.randn(2, 5, 8)
    out = wanted.clone().requires_grad_()
    loss = l2_loss(out, wanted).sum()
    loss.backward()
    assert loss == 0
    assert torch.isfinite(out.grad).all()


def test_align_trains_mixers_only_and_reaches_layer_0_through_its_values(make_teacher, make_student, batch) -> None:
    teacher = make_teacher("qwen3")
    student = make_student(teacher)
    built = objective("align", student, teacher).train()
    parameters = set_trainable(built)
    _, metrics = built(batch)
    assert set(metrics) == {"loss", "layer_00", "layer_01", "layer_02"}
    with AttentionProbe(teacher, student) as probe:
        teacher(batch["input_ids"])
    probe.losses[2].backward()
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert all(student.parameter_group(name) == "mixer" for name in grads)
    assert grads["model.layers.0.self_attn.v_proj.weight"].abs().sum() > 0
    assert "model.layers.0.self_attn.q_proj.weight" not in grads
    assert not any(name.startswith("model.layers.1.") for name in grads)
    assert grads["model.layers.2.self_attn.v1"].abs().sum() > 0


def test_the_probe_leaves_nothing_behind(make_teacher, make_student, tokens) -> None:
    teacher = make_teacher("llama")
    student = make_student(teacher)
    with pytest.raises(RuntimeError, match="on purpose"), AttentionProbe(teacher, student):
        raise RuntimeError("on purpose")
    assert not any(module._forward_hooks for module in teacher.modules())
    with AttentionProbe(teacher, student) as probe:
        watched = teacher(tokens).logits
    assert torch.equal(watched, teacher(tokens).logits)
    assert sorted(probe.losses) == [0, 1, 2]


def test_nothing_to_align_is_said(make_teacher, make_student, batch) -> None:
    teacher = make_teacher("llama")
    student = make_student(teacher, attention_layers=(0, 1, 2))
    with pytest.raises(UserError, match="nothing to align"):
        objective("align", student, teacher)(batch)


def test_a_student_that_is_its_teacher_has_no_divergence(make_teacher, make_student, batch) -> None:
    teacher = make_teacher("llama")
    student = make_student(teacher, attention_layers=(0, 1, 2), attention_rope=True)
    loss, metrics = objective("distill", student, teacher)(batch)
    assert abs(float(loss.detach())) < 1e-6
    assert metrics["top1_agreement"] == 1


def test_distill_is_forward_kl_with_cross_entropy(make_teacher, make_student, batch) -> None:
    teacher = make_teacher("qwen3", tie_word_embeddings=True)
    student = make_student(teacher, attention_layers=(1,))
    loss, metrics = objective("distill", student, teacher, temperature=2.0, kl_weight=0.5, ce_weight=0.25)(batch)
    ids, labels = batch["input_ids"][:, :-1], batch["input_ids"][:, 1:]
    p, q = (model(ids).logits.flatten(0, 1) for model in (teacher, student))
    kl = 4 * torch.nn.functional.kl_div(
        (q / 2).log_softmax(-1), (p / 2).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    ce = torch.nn.functional.cross_entropy(q, labels.flatten())
    torch.testing.assert_close(metrics["kl"], kl.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loss, 0.5 * kl + 0.25 * ce, atol=1e-5, rtol=1e-4)


def test_finetune_counts_the_assistants_tokens_alone(make_teacher, make_student, batch) -> None:
    student = make_student(make_teacher("llama"))
    mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    mask[:, 9:14] = True
    built = objective("finetune", student, assistant_only=True, label_smoothing=0.1)
    loss, metrics = built({**batch, "loss_mask": mask})
    logits = student(batch["input_ids"][:, :-1]).logits[:, 8:13].flatten(0, 1)
    labels = batch["input_ids"][:, 9:14].flatten()
    wanted = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-4)
    assert set(metrics) == {"loss", "ce", "accuracy"}
    with pytest.raises(UserError, match="messages_field"):
        built(batch)


def test_extend_alone_is_finetune(make_teacher, make_student, batch) -> None:
    student = make_student(make_teacher("llama"))
    loss, metrics = objective("extend", student, label_smoothing=0.1)(batch)
    expected, _ = objective("finetune", student, label_smoothing=0.1)(batch)
    assert torch.equal(loss, expected)
    assert set(metrics) == {"loss", "ce", "accuracy"}


@pytest.mark.parametrize("family", ["qwen3", "granite"])  # granite: logits have a scale of their own
def test_the_kl_of_extend_is_distills_beside_the_whole_cross_entropy(family, make_teacher, make_student, batch) -> None:
    teacher = make_teacher(family)
    student = make_student(teacher, attention_layers=(1,))
    found = []
    for built in (
        objective("extend", student, teacher, teacher_kl=0.3),
        objective("distill", student, teacher, kl_weight=0.3, ce_weight=1.0),
    ):
        parameters = set_trainable(built.train())
        loss, metrics = built(batch)
        loss.backward()
        found.append((loss.detach(), metrics, {name: p.grad for name, p in parameters.items() if p.grad is not None}))
    (ours, our_metrics, our_grads), (theirs, their_metrics, their_grads) = found
    assert torch.equal(ours, theirs)
    assert our_metrics == their_metrics
    assert our_metrics["kl"] > 0
    assert our_grads.keys() == their_grads.keys()
    assert all(torch.equal(our_grads[name], their_grads[name]) for name in our_grads)


def test_the_kl_of_extend_is_over_the_tokens_that_count(make_teacher, make_student, batch) -> None:
    teacher = make_teacher("qwen3")
    student = make_student(teacher)
    mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    mask[0, 9:14] = True
    built = objective("extend", student, teacher, teacher_kl=0.5, assistant_only=True)
    loss, metrics = built({**batch, "loss_mask": mask})
    ids, labels = batch["input_ids"][:, :-1], batch["input_ids"][0, 9:14]
    p, q = (model(ids).logits[0, 8:13] for model in (teacher, student))
    kl = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    ce = torch.nn.functional.cross_entropy(q, labels)
    torch.testing.assert_close(metrics["kl"], kl.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loss, ce + 0.5 * kl, atol=1e-5, rtol=1e-4)


def test_each_phase_of_extend_has_its_own_kl(make_teacher, make_student, batch) -> None:
    teacher = make_teacher("qwen3")
    student = make_student(teacher)
    phases = (ExtendPhase(tokens=80, teacher_kl=0.3), ExtendPhase(tokens=60, context=30))
    section = Extend(tokens=140, context=20, batch=2, phases=phases)
    with pytest.raises(ValueError, match="needs a teacher where a phase has teacher_kl"):
        build_objective(TrainSpec(objective="extend", section=section, teacher=None), student, None)
    built = build_objective(TrainSpec(objective="extend", section=section, teacher=None), student, teacher).train()
    seen = []
    for step in range(3):
        built.begin_step(step)
        seen.append("kl" in built(batch)[1])
    assert seen == [True, True, False]
    built.begin_step(0)
    assert "kl" not in built.eval()(batch)[1]  # judged as the last phase trains


def test_pretraining_takes_a_plain_model(make_teacher, batch) -> None:
    model = make_teacher("qwen3", tie_word_embeddings=True).requires_grad_(True)
    built = objective("pretrain", model)
    assert all(built.trainable(name) for name, _ in model.named_parameters())
    loss, _ = built(batch)
    logits = model(batch["input_ids"][:, :-1]).logits.flatten(0, 1)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:].flatten()))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_frozen_groups_do_not_train_and_a_tied_head_goes_with_its_embeddings(make_teacher, make_student) -> None:
    teacher = make_teacher("qwen3", tie_word_embeddings=True)
    student = make_student(teacher, attention_layers=(1,))
    built = objective("distill", student, teacher, freeze=("mlp", "attention", "embeddings", "head"))
    trained = {student.parameter_group(name) for name, _ in student.named_parameters() if built.trainable(name)}
    assert trained == {"mixer", "norms"}
    with pytest.raises(UserError, match="tied"):
        objective("distill", student, teacher, freeze=("head",))
    untied = make_teacher("qwen3")
    objective("distill", make_student(untied), untied, freeze=("head",))


def test_the_teacher_is_not_part_of_what_is_trained(make_teacher, make_student) -> None:
    teacher = make_teacher("llama")
    built = objective("distill", make_student(teacher), teacher)
    assert {name.split(".")[0] for name, _ in built.named_parameters()} == {"student"}
    built.train()
    assert not teacher.training
    with pytest.raises(ValueError, match="needs a teacher"):
        objective("distill", make_student(teacher))


@pytest.mark.parametrize("name", ["align", "distill", "finetune", "extend"])
@pytest.mark.parametrize("reset", [False, True])
def test_gradient_checkpointing_changes_no_gradient(make_teacher, make_student, batch, name: str, reset: bool) -> None:
    teacher = make_teacher("qwen3")
    student = make_student(teacher, attention_layers=(1,))
    built = objective(name, student, teacher, reset_at_documents=reset).train()
    found = []
    for enable in (student.gradient_checkpointing_disable, student.gradient_checkpointing_enable):
        enable()
        parameters = set_trainable(built)
        built(batch)[0].backward()
        found.append({key: p.grad for key, p in parameters.items() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == {key for key in parameters if built.trainable(key)}
    for key, grad in found[0].items():
        assert torch.equal(grad, found[1][key]), key


@pytest.mark.parametrize("kept", [(), (1,)], ids=str)
def test_packed_documents_are_read_apart(make_teacher, make_student, batch, kept) -> None:
    teacher = make_teacher("qwen3")
    student = make_student(teacher, attention_layers=kept, attention_rope=True)
    ids, documents = batch["input_ids"][:, :-1], batch["document_ids"][:, :-1]
    bounds = document_bounds(documents)
    assert bounds.tolist() == [0, 7, 20, 21, 33, 40]
    flat = ids.flatten()
    with torch.no_grad():
        packed = student.hidden(ids, cu_seqlens=bounds).flatten(0, 1)
        apart = torch.cat([student.hidden(flat[None, a:b])[0] for a, b in pairwise(bounds)])
        torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-4)
        built = objective("distill", student, teacher, reset_at_documents=True)
        wanted = built.teacher_hidden(ids, cu_seqlens=bounds).flatten(0, 1)
        alone = torch.cat([teacher.model(flat[None, a:b]).last_hidden_state[0] for a, b in pairwise(bounds)])
        torch.testing.assert_close(wanted, alone, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="document_ids"):
        built({"input_ids": batch["input_ids"]})


def test_rotary_frequencies_survive_a_cast(make_teacher, make_student) -> None:
    model = make_teacher("llama")
    before = model.model.rotary_emb.inv_freq.clone()
    objective("pretrain", model).bfloat16()
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    student = make_student(make_teacher("llama"))
    student.to(torch.bfloat16)
    assert student.dtype == torch.bfloat16
    assert torch.equal(student.model.rotary_emb.inv_freq, before)
