"""Calibration of every variant: nearer to its teacher before any training, on text it has not seen."""

from __future__ import annotations

import copy

import pytest
import torch

from radlads.model.mixers.shared.registry import list_variants
from radlads.model.training.calibration import SHIFTS, alignment_loss, alignment_losses, calibrate
from radlads.model.training.hidden_states import plain_hidden
from radlads.model.training.probe import AttentionProbe

PARTS = ("value", "iclr", "decay", "gate")


@pytest.fixture
def teacher(make_teacher):
    return make_teacher("qwen3")


def batches(count, seed, T=32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 64, (4, T), generator=generator) for _ in range(count)]


def moved_parts(student):
    return {part for mixer in student.mixers().values() for part, name in mixer.CALIBRATED.items() if held(mixer, name)}


def held(mixer, name):
    return getattr(mixer, name, None) is not None


def test_the_loss_is_that_of_the_align_stage(teacher, make_student):
    student = make_student(teacher)
    given = batches(2, seed=1)
    totals = []
    for ids in given:
        with AttentionProbe(teacher, student) as probe:
            plain_hidden(teacher, ids, None)
        totals.append({layer: value.item() for layer, value in probe.losses.items()})
    losses = alignment_losses(student, teacher, given)
    for layer in range(3):
        assert losses[layer] == pytest.approx((totals[0][layer] + totals[1][layer]) / 2, rel=1e-5)
    assert alignment_loss(student, teacher, given) == pytest.approx(sum(losses.values()) / 3)


@pytest.mark.parametrize("variant", list_variants())
def test_every_variant_starts_nearer(teacher, make_student, variant):
    student = make_student(teacher, variant=variant, scrambled=False)
    unseen = batches(2, seed=9)
    before = alignment_loss(student, teacher, unseen)
    started = copy.deepcopy(student.state_dict())
    report = calibrate(student, teacher, batches(2, seed=1))
    after = alignment_loss(student, teacher, unseen)
    if not student.mixers()[0].CALIBRATED:
        assert after == before
        assert not report[1]
        return
    has_gain = any(
        held(mixer, mixer.CALIBRATED[part]) for mixer in student.mixers().values() for part in ("gate", "norm")
    )
    assert after < before * (0.99 if has_gain else 1.0 + 1e-6)
    assert set(report[1]) == {"decay", "gate"} if has_gain else {"decay"}
    assert set(report[1]["decay"]) <= set(SHIFTS)
    touched = {
        name.split(".")[-1] for name, tensor in student.state_dict().items() if not torch.equal(tensor, started[name])
    }
    assert touched <= {"w0", "time_decay", "dt_bias", "g2", "weight"}
    assert not any(
        "_proj" in name for name, tensor in student.state_dict().items() if not torch.equal(tensor, started[name])
    )
    assert all(torch.isfinite(tensor).all() for tensor in student.state_dict().values())


@pytest.mark.parametrize("variant", ["rad_rwkv7", "hxa079"])
def test_all_parts_are_better_than_two(teacher, make_student, variant):
    unseen = batches(2, seed=9)
    losses = []
    for parts in (("decay", "gate"), PARTS):
        student = make_student(teacher, variant=variant, scrambled=False)
        report = calibrate(student, teacher, batches(3, seed=1), parts=parts)
        losses.append(alignment_loss(student, teacher, unseen))
    assert set(report[1]) == set(PARTS)
    assert "value" not in report[0]  # the first recurrent layer has no other layer's values
    assert losses[1] < losses[0] * 1.02


def test_gains_are_those_of_least_squares(teacher, make_student):
    """No other gain of any one channel fits z better."""
    student = make_student(teacher, scrambled=False)
    given = batches(1, seed=1)
    calibrate(student, teacher, given, parts=("gate",))
    mixer = student.model.layers[1].self_attn
    best = residual(student, teacher, given[0], 1)
    for channel in (0, 17, 63):
        for change in (-0.05, 0.05):
            before = mixer.g2.detach().clone()
            with torch.no_grad():
                mixer.g2[:, channel] += change / (mixer.g2.shape[0] / 2)
            assert residual(student, teacher, given[0], 1) > best
            with torch.no_grad():
                mixer.g2.copy_(before)


def residual(student, teacher, ids, layer):
    """Σ (z* - z)² of one layer."""
    seen = {}
    hooks = [
        teacher.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen.update(theirs=a[0])),
        student.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen.update(ours=a[0])),
    ]
    with AttentionProbe(teacher, student), torch.no_grad():
        plain_hidden(teacher, ids, None)
    for hook in hooks:
        hook.remove()
    return (seen["theirs"] - seen["ours"]).square().sum().item()


def test_a_shrunken_projection_is_made_up_for(teacher, make_student):
    """The published transplant halves o and takes v times 0.3; the fitted output is as near as without."""
    unseen = batches(2, seed=9)
    losses = []
    for v, o in ((1.0, 1.0), (0.3, 0.5)):
        student = make_student(teacher, scrambled=False)
        with torch.no_grad():
            for mixer in student.mixers().values():
                mixer.v_proj.weight.mul_(v)
                mixer.o_proj.weight.mul_(o)
        calibrate(student, teacher, batches(2, seed=1))
        losses.append(alignment_loss(student, teacher, unseen))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_it_is_the_same_again(teacher, make_student):
    made = []
    for _ in range(2):
        student = make_student(teacher, scrambled=False)
        calibrate(student, teacher, batches(2, seed=1), parts=PARTS)
        made.append(student.state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_it_leaves_no_hooks_and_no_graph(teacher, make_student):
    student = make_student(teacher, scrambled=False)

    def hooks():
        return [(*m._forward_hooks, *m._forward_pre_hooks) for m in (*teacher.modules(), *student.modules())]

    before = hooks()
    calibrate(student, teacher, batches(1, seed=1))
    assert hooks() == before
    assert all(parameter.requires_grad and parameter.grad is None for parameter in student.parameters())
    assert isinstance(student.model.layers[1].self_attn.w0, torch.nn.Parameter)


@pytest.mark.parametrize("family", ["llama", "phi3", "mistral", "qwen2"])
def test_every_family_can_be_watched(make_teacher, make_student, family):
    teacher = make_teacher(family)
    student = make_student(teacher, scrambled=False, attention_layers=(2,))
    before = alignment_loss(student, teacher, batches(1, seed=9))
    report = calibrate(student, teacher, batches(1, seed=1))
    assert set(report) == {0, 1}
    assert alignment_loss(student, teacher, batches(1, seed=9)) < before


def test_an_unknown_part_is_named(teacher, make_student):
    with pytest.raises(ValueError, match="no part 'colour' to calibrate; there are value, iclr, decay, gate"):
        calibrate(make_student(teacher), teacher, [], parts=("colour",))
