"""Objectives that change on the way, and what each of them trains."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch

from radlads.model.mixers.shared.mixer import AttentionShape
from radlads.model.mixers.shared.registry import find_variant, list_variants
from radlads.model.training.lora import add_lora
from radlads.model.training.mixer_parts import is_decay_base, mixer_parts
from radlads.model.training.objectives import build_objective
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.loss_terms import RopeFade
from radlads.tasks.contracts.recipe.recipe import Distill, Finetune, Lora, Phase
from radlads.tasks.contracts.specs import TeacherRef, TrainSpec

SIZES = {"context": 20, "batch": 2}


def objective(name: str, student, teacher=None, **changes: Any):
    kind = {"distill": Distill, "finetune": Finetune}[name]
    section = kind(**{"tokens": 400, **SIZES, **changes})
    reference = TeacherRef(path="x", fingerprint="y")
    return build_objective(TrainSpec(objective=name, section=section, teacher=reference), student, teacher)


def trained(built) -> set[str]:
    return {name for name, _ in built.student.named_parameters() if built.trainable(name)}


def kl(student, teacher, ids, ours: float, theirs: float) -> torch.Tensor:
    p = (teacher(ids).logits.flatten(0, 1) / theirs).log_softmax(-1)
    q = (student(ids).logits.flatten(0, 1) / ours).log_softmax(-1)
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")


def test_each_phase_has_its_temperature_and_judging_has_none(make_teacher, make_student, tokens) -> None:
    teacher = make_teacher("llama")
    student = make_student(teacher)
    phases = (
        Phase(tokens=80, temperature=1.5),
        Phase(tokens=120, temperature=1.2, ce_weight=0.25),
        Phase(tokens=200, temperature=1.0, teacher_temperature=2.0),
    )
    built = objective("distill", student, teacher, phases=phases, ce_weight=0.5)
    ids, labels = tokens[:, :-1], tokens[:, 1:].flatten()
    ce = torch.nn.functional.cross_entropy(student(ids).logits.flatten(0, 1), labels)
    expected = [
        (0, 1.5**2 * kl(student, teacher, ids, 1.5, 1.5) + 0.5 * ce),
        (2, 1.2**2 * kl(student, teacher, ids, 1.2, 1.2) + 0.25 * ce),
        (9, kl(student, teacher, ids, 1.0, 2.0) + 0.5 * ce),
    ]
    for step, loss in expected:
        built.begin_step(step)
        torch.testing.assert_close(built({"input_ids": tokens})[0], loss, atol=1e-5, rtol=1e-4)
    built.begin_step(0)
    built.eval()
    judged = kl(student, teacher, ids, 1.0, 1.0) + 0.5 * ce
    torch.testing.assert_close(built({"input_ids": tokens})[0], judged, atol=1e-5, rtol=1e-4)


def test_each_phase_has_its_divergence_and_kl_is_always_the_forward_one(make_teacher, make_student, tokens) -> None:
    teacher = make_teacher("llama")
    student = make_student(teacher)
    phases = (Phase(tokens=200), Phase(tokens=200, divergence="reverse", temperature=2.0))
    built = objective("distill", student, teacher, phases=phases)
    ids = tokens[:, :-1]

    def reverse(tau: float) -> torch.Tensor:
        return tau**2 * kl(teacher, student, ids, tau, tau)

    loss, metrics = built({"input_ids": tokens})
    torch.testing.assert_close(loss, kl(student, teacher, ids, 1.0, 1.0), atol=1e-5, rtol=1e-4)
    assert "reverse_kl" not in metrics
    built.begin_step(5)
    loss, metrics = built({"input_ids": tokens})
    torch.testing.assert_close(loss, reverse(2.0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(metrics["reverse_kl"], loss.detach())
    torch.testing.assert_close(metrics["kl"], 4 * kl(student, teacher, ids, 2.0, 2.0).detach(), atol=1e-5, rtol=1e-4)
    built.begin_step(0)
    built.eval()
    loss, metrics = built({"input_ids": tokens})
    torch.testing.assert_close(loss, reverse(1.0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(metrics["kl"], kl(student, teacher, ids, 1.0, 1.0).detach(), atol=1e-5, rtol=1e-4)


def test_the_jensen_shannon_divergence_of_a_phase(make_teacher, make_student, tokens) -> None:
    teacher = make_teacher("llama")
    student = make_student(teacher)
    built = objective("distill", student, teacher, phases=(Phase(tokens=400, divergence="jsd", jsd_beta=0.3),))
    loss, metrics = built({"input_ids": tokens})
    p, q = (model(tokens[:, :-1]).logits.softmax(-1) for model in (teacher, student))
    m = 0.3 * p + 0.7 * q
    wanted = (0.3 * p * (p / m).log() + 0.7 * q * (q / m).log()).sum(-1).mean()
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(metrics["jsd"], loss.detach())
    torch.testing.assert_close(metrics["kl"], kl(student, teacher, tokens[:, :-1], 1.0, 1.0), atol=1e-5, rtol=1e-4)


def test_positions_of_kept_layers_fade_with_the_steps(make_teacher, make_student, tokens) -> None:
    teacher = make_teacher("llama")
    student = make_student(teacher, attention_layers=(0, 1, 2))
    # Steps of 40, 40, 60 and 60 tokens; the factor says how many were seen before a step.
    phases = (Phase(tokens=80), Phase(tokens=120, context=30))
    built = objective("distill", student, teacher, phases=phases, tokens=200, rope_fade=RopeFade(tokens=160))
    assert [built.section.rope_factor(step) for step in range(4)] == [1, 0.75, 0.5, 0.125]
    assert objective("distill", student, teacher).section.rope_factor(0) == 0
    losses, address = [], built.rope_factor.data_ptr()
    for step in range(4):
        built.begin_step(step)
        losses.append(float(built({"input_ids": tokens})[0].detach()))
    assert abs(losses[0]) < 1e-6  # still its teacher
    assert losses == sorted(losses)
    assert built.rope_factor.data_ptr() == address  # a recorded pass reads it there
    assert len({built.begin_step(step) or built.fixed_settings() for step in (0, 1)}) == 1
    without = objective("distill", student, teacher)
    assert torch.equal(built.eval()({"input_ids": tokens})[0], without.eval()({"input_ids": tokens})[0])
    assert not [name for name in built.state_dict() if "rope_factor" in name]
    assert built.bfloat16().rope_factor.dtype == torch.float32
    for other in ({"attention_layers": (1,), "attention_rope": True}, {}):
        with pytest.raises(UserError, match="this student has none"):
            objective("distill", make_student(teacher, **other), teacher, rope_fade=RopeFade(tokens=160))


def test_cross_entropy_comes_in_spikes(make_teacher, make_student, tokens) -> None:
    teacher = make_teacher("llama")
    built = objective("distill", make_student(teacher), teacher, ce_spikes={"every": 3, "weight": 2.0})
    seen = []
    for step in range(7):
        built.begin_step(step)
        loss, metrics = built({"input_ids": tokens})
        seen.append(round(float((loss.detach() - metrics["kl"]) / metrics["ce"]), 4))
    assert seen == [0, 0, 2, 0, 0, 2, 0]


def test_l2wrap_moves_gradients_and_not_the_loss(make_teacher, make_student, tokens) -> None:
    teacher = make_teacher("llama")
    student = make_student(teacher).requires_grad_(True)
    found = []
    for l2wrap in (0.0, 0.01):
        student.zero_grad()
        loss, _ = objective("distill", student, teacher, l2wrap=l2wrap)({"input_ids": tokens})
        loss.backward()
        found.append((float(loss.detach()), student.lm_head.weight.grad.clone()))
    assert found[0][0] == found[1][0]
    assert not torch.allclose(found[0][1], found[1][1])


def test_step_3a_trains_decay_and_token_shift(make_teacher, make_student) -> None:
    teacher = make_teacher("qwen3")
    student = make_student(teacher, variant="rwkv7")
    names = {name.rpartition(".")[2] for name in trained(objective("finetune", student, train_only=["decay"]))}
    assert names == {"w0", "w1", "w2"}
    both = trained(objective("finetune", student, train_only=["decay", "token_shift"]))
    assert {name.rpartition(".")[2] for name in both} == names | {f"x_{branch}" for branch in "rwkvag"}
    whole = trained(objective("finetune", student, train_only=["mixer"]))
    assert {student.parameter_group(name) for name in whole} == {"mixer"}
    six = make_student(teacher, variant="rad_rwkv6")
    shifts = {n.rpartition(".")[2] for n in trained(objective("finetune", six, train_only=["decay", "token_shift"]))}
    assert {"time_decay", "time_decay_w1", "time_decay_w2", "time_maa_x", "time_maa_w", "time_maa_w1"} <= shifts
    assert all(name.startswith(("time_decay", "time_maa")) for name in shifts)
    delta = make_student(teacher, variant="gated_deltanet", options={"short_conv": 4})
    names = {n.split("self_attn.")[1] for n in trained(objective("finetune", delta, train_only=["decay"]))}
    assert names == {"A_log", "dt_bias", "a_proj.weight"}
    both = trained(objective("finetune", delta, train_only=["decay", "token_shift"]))
    assert {n.split("self_attn.")[1] for n in both} == names | {"conv"}


@pytest.mark.parametrize("variant", list_variants())
def test_a_name_is_the_same_part_in_every_variant(variant: str) -> None:
    """Parts are looked up by name alone, so what one variant declares must not catch another's parameters."""
    options = find_variant(variant).Options().resolve(32, 64)
    flags = dict.fromkeys(("q_bias", "k_bias", "v_bias", "o_bias", "qk_norm"), True)
    shape = AttentionShape(32, 4, 2, 16, norm_eps=1e-6, **flags)
    mixer = find_variant(variant).Mixer(shape, options, layer=1, num_layers=4, first=False)
    own = mixer.PARTS
    assert set(own) == {"decay_base", "decay", "token_shift"}
    found = {part: set() for part in own}
    for name, _ in mixer.named_parameters():
        for part in mixer_parts(f"model.layers.1.self_attn.{name}") - {"mixer"}:
            found[part].add(name)
        if is_decay_base(f"model.layers.1.self_attn.{name}"):
            found["decay_base"].add(name)
    for part, names in found.items():
        declared = {
            name
            for name, _ in mixer.named_parameters()
            if any(fnmatchcase(word, pattern) for word in name.split(".") for pattern in own[part])
        }
        assert names == declared, part
    if variant == "sliding_window":  # of the teacher's parameters alone
        assert not any(found.values())
        return
    assert found["decay_base"]
    assert found["decay_base"] < found["decay"]


def test_lora_trains_pairs_and_what_the_mixers_add(make_teacher, make_student) -> None:
    teacher = make_teacher("qwen3")
    student = make_student(teacher, attention_layers=(1,))
    built = objective("distill", student, teacher, lora=Lora(rank=2, targets=("q_proj", "up_proj")))
    add_lora(student, built.section.lora)
    names = trained(built)
    assert {"model.layers.1.self_attn.q_proj.lora_a", "model.layers.0.mlp.up_proj.lora_b"} <= names
    assert "model.layers.0.self_attn.q_proj.weight" not in names
    rest = {name for name in names if "lora_" not in name}
    assert {student.parameter_group(name) for name in rest} == {"mixer"}
    assert "model.layers.0.self_attn.v_proj.weight" in rest


def test_the_final_norm_can_stay_while_the_others_train(make_teacher, make_student) -> None:
    built = objective("finetune", make_student(make_teacher("llama")), freeze=["final_norm", "mlp"])
    names = trained(built)
    assert "model.norm.weight" not in names
    assert {"model.layers.0.input_layernorm.weight", "lm_head.weight"} <= names


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"phases": [{"tokens": 1}]}, "phases' tokens add up to 1"),
        ({"phases": [{"tokens": 400, "micro_batch": 3}]}, "phase 1: batch .2. must be a multiple"),
        ({"temperature": 2.0, "teacher_temperature": 2.0}, "not both"),
        ({"divergence": "jsd", "jsd_beta": 1.0}, "less than or equal to 0.999"),
        ({"divergence": "jsd", "jsd_beta": 1e-9}, "greater than or equal to 0.001"),
        ({"jsd_beta": 0.3}, "jsd_beta is of the divergence jsd"),
        ({"divergence": "reverse", "jsd_beta": 0.3}, "jsd_beta is of the divergence jsd"),
        ({"jsd_beta": 0.3, "phases": [{"tokens": 400}]}, "jsd_beta is of the divergence jsd"),
        ({"divergence": "jsd", "phases": [{"tokens": 400, "divergence": "forward", "jsd_beta": 0.3}]}, "phase 1: jsd"),
        ({"lora": {"targets": ["up_proj"]}, "freeze": ["mlp"]}, "freeze has mlp"),
        ({"mixer_rate": {"start": 1e-4, "final": 0.0}, "schedule": {"kind": "exponential"}}, "rate of 0"),
    ],
)
def test_settings_that_contradict_are_told(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Distill(**{"tokens": 400, **SIZES, **change})


def test_a_stages_beta_is_of_its_phases_with_jsd() -> None:
    phases = [
        {"tokens": 200},
        {"tokens": 100, "divergence": "jsd"},
        {"tokens": 100, "divergence": "jsd", "jsd_beta": 0.2},
    ]
    section = Distill(tokens=400, jsd_beta=0.9, phases=phases, **SIZES)
    assert [part.jsd_beta for part in section.parts] == [0.5, 0.9, 0.2]
    assert Distill.model_validate(section.model_dump()) == section
    anew = Distill.model_validate(section.after_rollbacks(1).model_dump())
    assert [part.jsd_beta for part in anew.parts] == [0.5, 0.9, 0.2]
