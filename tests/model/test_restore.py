"""Giving layers their softmax back: exact, reversible, saved and loaded again; and what it scores."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from radlads.model.convert.layer_scores import ProbeBatch, TokenCount, sum_layers, teacher_recall
from radlads.model.convert.layer_search import search_layers
from radlads.model.convert.restore import restore_attention, restored
from radlads.model.mixers.shared.registry import list_variants
from radlads.model.student.export import export_student
from radlads.model.student.load import load_student
from radlads.model.student.modeling import RadladsForCausalLM
from radlads.tasks.contracts.errors import UserError


@pytest.fixture
def teacher(make_teacher):
    return make_teacher("qwen3")


def test_inside_it_is_the_student_built_with_these_layers(teacher, make_student, tokens):
    student = make_student(teacher)
    plain = student(tokens).logits
    with restored(student, teacher, [1]):
        inside = student(tokens, use_cache=False).logits
    assert torch.equal(student(tokens).logits, plain)
    assert student.config.attention_layers == []
    wanted = make_student(teacher, attention_layers=(1,), attention_rope=True)
    for layer in (0, 2):
        wanted.model.layers[layer].self_attn.load_state_dict(student.model.layers[layer].self_attn.state_dict())
    assert torch.equal(inside, wanted(tokens).logits)
    assert not torch.equal(inside, plain)


@pytest.mark.parametrize("family", ["qwen3", "llama", "phi3", "mistral"])
def test_restored_for_good_survives_export(make_teacher, make_student, tokens, tmp_path, family):
    teacher = make_teacher(family)
    student = make_student(teacher)
    with restored(student, teacher, [0, 2]):
        wanted = student(tokens, use_cache=False).logits
    report = restore_attention(student, teacher, [0, 2], attention_rope=True)
    assert torch.equal(student(tokens, use_cache=False).logits, wanted)
    assert any("layers.0" in name for name in report["restored"])
    # Layer 1 goes on to take first values from layer 0.
    assert {name.split(".")[2] for name in report["dropped"]} == {"0", "2"}
    export_student(student, None, tmp_path)
    again = load_student(tmp_path)
    assert again.config.attention_layers == [0, 2]
    assert again.config.attention_rope
    assert list(again.mixers()) == [1]
    assert torch.equal(again(tokens, use_cache=False).logits, wanted)
    theirs = teacher.model.layers[2].self_attn.state_dict()
    assert all(
        torch.equal(tensor, theirs[name]) for name, tensor in again.model.layers[2].self_attn.state_dict().items()
    )


@pytest.mark.parametrize("variant", list_variants())
def test_restoring_the_first_layer_changes_only_its_mixing(teacher, make_student, tokens, variant):
    """Where layer 0's attention says nothing to the others but by first values, the student stays what it was."""
    with torch.no_grad():
        teacher.model.layers[0].self_attn.o_proj.weight.zero_()
    student = make_student(teacher, variant=variant)
    shift = getattr(student.mixers()[0], "x_v", None)
    if shift is not None:  # attention has no token shift
        shift.data.zero_()
    wanted, names = student(tokens, use_cache=False).logits, set(student.state_dict())
    with restored(student, teacher, [0]):
        torch.testing.assert_close(student(tokens, use_cache=False).logits, wanted, atol=1e-5, rtol=1e-5)
    report = restore_attention(student, teacher, [0], attention_rope=False)
    torch.testing.assert_close(student(tokens, use_cache=False).logits, wanted, atol=1e-5, rtol=1e-5)
    assert all(name.startswith("model.layers.0.") for name in report["dropped"])
    assert {n for n in names if ".layers.0." not in n} == {n for n in student.state_dict() if ".layers.0." not in n}
    built = make_student(teacher, variant=variant, attention_layers=(0,))
    built.load_state_dict(student.state_dict())
    assert torch.equal(built(tokens, use_cache=False).logits, student(tokens, use_cache=False).logits)


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_a_step_hands_on_what_the_whole_text_does(make_teacher, make_student, tokens, family):
    """First keys as well; the values of a fused projection too."""
    teacher = make_teacher(family)
    student = make_student(teacher, variant="hxa079")
    restore_attention(student, teacher, [0], attention_rope=False)
    with torch.no_grad():
        wanted = student(tokens, use_cache=False).logits
        begun = student(tokens[:, :9], use_cache=True)
        got = [begun.logits]
        for t in range(9, tokens.shape[1]):
            got.append(student(tokens[:, t : t + 1], past_key_values=begun.past_key_values).logits)
    torch.testing.assert_close(torch.cat(got, 1), wanted, atol=2e-4, rtol=2e-4)


def test_students_exported_before_keep_their_first_values(teacher, make_student, tokens, tmp_path):
    """Their config has no such key: the first mixer hands on its values, and has nothing that would take others."""
    student = make_student(teacher)
    student.config.first_values = "first_mixer"
    with torch.device("meta"):
        mixer = student.mixers()[1]
        student.config.attention_layers = [0]
        former = student.build_mixer(1, mixer.shape).state_dict().keys()
    config = copy.deepcopy(student.config)
    old = RadladsForCausalLM(config).eval()
    state = student.state_dict() | {
        f"model.layers.0.self_attn.{name}": tensor
        for name, tensor in teacher.model.layers[0].self_attn.state_dict().items()
    }
    old.load_state_dict({name: state[name] for name in old.state_dict()})
    assert set(old.mixers()[1].state_dict()) == former < set(mixer.state_dict())
    export_student(old, None, tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    raw.pop("first_values", None)
    path.write_text(json.dumps(raw))
    again = load_student(tmp_path)
    assert again.config.first_attention() is None
    assert torch.equal(again(tokens).logits, old(tokens).logits)
    assert torch.isfinite(old(tokens).logits).all()
    with pytest.raises(ValueError, match="must be first_layer or first_mixer"):
        type(config)(teacher=config.teacher, family=config.family, first_values="other")


def test_generation_goes_on_as_the_whole_text_says(teacher, make_student, tokens):
    student = make_student(teacher)
    restore_attention(student, teacher, [1], attention_rope=False)
    made = student.generate(tokens, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    for t in range(tokens.shape[1], made.shape[1]):
        assert torch.equal(student(made[:, :t], use_cache=False).logits[:, -1].argmax(-1), made[:, t])


def test_it_is_a_copy_that_trains_alone(teacher, make_student, tokens):
    student = make_student(teacher)
    restore_attention(student, teacher, [1], attention_rope=True)
    student(tokens, use_cache=False).logits.sum().backward()
    own = student.model.layers[1].self_attn.q_proj.weight
    assert own.grad is not None
    assert own.data_ptr() != teacher.model.layers[1].self_attn.q_proj.weight.data_ptr()
    assert not teacher.model.layers[1].self_attn.q_proj.weight.requires_grad


def test_one_layer_stays_converted(teacher, make_student):
    student = make_student(teacher)
    with pytest.raises(UserError, match="at least one stays converted"):
        restore_attention(student, teacher, [0, 1, 2], attention_rope=True)
    with pytest.raises(UserError, match="3 layers"), restored(student, teacher, [3]):
        pass


def probe(num_answers=3, T=24, seed=3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (2, T), generator=generator)
    answers = torch.zeros_like(ids)
    for number in range(num_answers):
        answers[:, 6 + 5 * number : 8 + 5 * number] = number + 1
    return [ProbeBatch(ids, answers), ProbeBatch(torch.randint(3, 64, (3, T), generator=generator))]


def scorer(student, teacher, batches):
    return lambda sets: {found: sums.score() for found, sums in sum_layers(student, teacher, batches, sets).items()}


def test_scores_are_those_of_plain_forward_passes(teacher, make_student):
    student = make_student(teacher)
    recall, text = batches = probe()
    for layers, found in scorer(student, teacher, batches)([(2,), (1, 2)]).items():
        with restored(student, teacher, layers), torch.no_grad():
            ours = student(recall.input_ids, use_cache=False).logits[:, :-1].log_softmax(-1)
            told = student(text.input_ids[:, :-1], use_cache=False).logits.log_softmax(-1)
        at = recall.answers[:, 1:] > 0
        labels = recall.input_ids[:, 1:]
        assert found.recall == pytest.approx(ours.gather(2, labels[..., None])[..., 0][at].mean().item(), abs=1e-5)
        theirs = teacher(text.input_ids[:, :-1]).logits.log_softmax(-1)
        kl = (theirs.exp() * (theirs - told)).sum(-1).mean().item()
        assert found.kl == pytest.approx(kl, abs=1e-5)
        right = ours.argmax(-1) == labels
        whole = [bool(right[row][recall.answers[row, 1:] == number].all()) for row in range(2) for number in (1, 2, 3)]
        assert found.accuracy == pytest.approx(sum(whole) / 6)


def test_parts_of_the_probe_add_up(teacher, make_student):
    student = make_student(teacher)
    batches = probe()
    sets = [(), (1,)]
    whole = sum_layers(student, teacher, batches, sets)
    parts = [sum_layers(student, teacher, [batch], sets) for batch in batches]
    for layers in sets:
        assert vars(parts[0][layers] + parts[1][layers]) == pytest.approx(vars(whole[layers]))
    assert (whole[1,].answers, whole[1,].answer_tokens, whole[1,].text_tokens) == (6, 12, 69)


def test_every_token_is_counted(teacher, make_student):
    count = TokenCount()
    sum_layers(make_student(teacher), teacher, probe(), [(), (0,), (1,), (2,)], count=count)
    teacher_recall(teacher, probe(), count=count)
    assert count.student == 4 * (2 * 23 + 3 * 23)
    assert count.teacher == 3 * 23 + 2 * 23


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_the_only_layer_that_matters_is_chosen(teacher, make_student, needed):
    """Where every other attention says nothing, restoring this one gives the teacher back."""
    with torch.no_grad():
        for layer in {0, 1, 2} - {needed}:
            teacher.model.layers[layer].self_attn.o_proj.weight.zero_()
    student = make_student(teacher)
    batches = [sharpened(teacher), *probe()[1:]]
    score = scorer(student, teacher, batches)
    for search in ("one_at_a_time", "greedy"):
        chosen, rounds = search_layers(score, 1, range(3), search=search)
        assert chosen == (needed,)
        assert rounds[0].scores[needed,].kl == pytest.approx(0.0, abs=1e-5)
        assert rounds[0].scores[needed,].accuracy == 1.0
        assert rounds[0].before.kl > 1e-3
    assert needed in search_layers(score, 2, range(3), search="pairs", candidates=3)[0]


def sharpened(teacher):
    """Recall that the teacher has: its own most likely tokens as answers."""
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    ids = teacher.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    answers = torch.zeros_like(ids)
    answers[:, 12:] = 1
    return ProbeBatch(ids, answers)


def test_choices_are_the_same_again(teacher, make_student):
    student = make_student(teacher)
    batches = probe()

    def run():
        return search_layers(scorer(student, teacher, batches), 2, range(3))

    first, second = run(), run()
    assert first == second
    assert len(first[0]) == 2
