"""A recipe that names a way to choose its attention layers: what it may say, and how large a probe it gets."""

from types import SimpleNamespace

import pytest
import yaml

from radlads.tasks.contracts.identity import identity
from radlads.tasks.contracts.recipe.choice import (
    AttentionChoice,
    RecallProbe,
    fit_probe,
    late_choice,
    run_tokens,
)
from radlads.tasks.contracts.recipe.recipe import RecipeError, Student, dump_recipe, parse_recipe
from radlads.tasks.contracts.specs import ChooseSpec, TeacherRef, TransplantSpec, spec_digest
from radlads.tasks.stage_specs import transplant_spec

TRAINING = {"tokens": 40960, "context": 64, "batch": 4}


def recipe(layers, **changes):
    raw = {
        "name": "tiny",
        "teacher": {"path": "demo"},
        "student": {"attention_layers": layers, **changes.pop("student", {})},
        "data": {name: {"sources": [{"kind": "files", "paths": ["a.txt"]}]} for name in ("train", "other")},
        "align": TRAINING,
        "distill": TRAINING,
    }
    return parse_recipe({key: value for key, value in (raw | changes).items() if value is not None})


@pytest.mark.parametrize("way", ["even", "last", "difficulty", "recall"])
def test_a_choice_survives_yaml(way):
    made = recipe({"count": 2, "choose": way})
    assert isinstance(made.student.attention_layers, AttentionChoice)
    assert parse_recipe(yaml.safe_load(dump_recipe(made))) == made
    assert (late_choice(made) is None) == (way in ("even", "last"))


def test_a_list_is_what_it_was():
    made = recipe([3, 1])
    assert made.student.attention_layers == (3, 1)
    assert late_choice(made) is None
    assert "attention_layers:\n  - 3\n  - 1" in dump_recipe(made)


def test_scaled_scores_need_kept_layers_and_leave_other_digests():
    def told(**changes):
        student = Student(attention_layers=(1,), **changes)
        return identity(TransplantSpec(student=student, teacher=TeacherRef(path="demo", fingerprint="f")), None)

    assert "attention_log_scale" not in str(told())
    assert "'attention_log_scale': 512" in str(told(attention_log_scale=512))
    with pytest.raises(RecipeError, match="attention_layers names none"):
        recipe([], student={"attention_log_scale": 512})
    assert recipe({"count": 1, "choose": "recall"}, student={"attention_log_scale": 512}).student.attention_log_scale


@pytest.mark.parametrize("choose", ["recall", "difficulty"])
def test_a_student_whose_layers_are_chosen_after_align_carries_their_scale(choose: str):
    """It has no such layer until then."""
    asked = recipe({"count": 1, "choose": choose}, student={"attention_log_scale": 512})
    report = SimpleNamespace(attention_layers=(), teacher=TeacherRef(path="demo", fingerprint="f"))
    made = TransplantSpec.model_validate(transplant_spec(asked, report).model_dump(mode="json"))
    assert (made.student.attention_layers, made.student.attention_log_scale) == ((), 512)


def test_positions_fade_where_there_are_some_to_lose():
    def fading(layers, tokens=4096, **student):
        return recipe(layers, student=student, distill={**TRAINING, "rope_fade": {"tokens": tokens}})

    assert fading({"count": 1, "choose": "recall"}).distill.rope_factor(8) == 0.5
    assert fading([1]).distill.rope_factor(16) == 0
    assert "rope_fade" not in str(identity(recipe([1]).distill, None))
    for made, words in (
        (lambda: fading([1], attention_rope=True), "attention_rope keeps them; drop one"),
        (lambda: fading([]), "student.attention_layers names none"),
        (lambda: fading([1], tokens=40961), "more than the stage has (40960)"),
    ):
        with pytest.raises(RecipeError) as caught:
            made()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"count": 0, "choose": "even"}, "count: Input should be greater than 0"),
        ({"count": 1, "choose": "best"}, "'even', 'last', 'difficulty' or 'recall'"),
        ({"cuont": 1, "count": 1, "choose": "even"}, "did you mean 'count'"),
        ({"count": 1, "choose": "recall", "recall": {"lenghts": [64]}}, "did you mean 'lengths'"),
        ({"count": 1, "choose": "even", "recall": {"seed": 1}}, "settings of `recall` are given, but `choose` is even"),
        ({"count": 1, "choose": "recall", "recall": {"data": "no"}}, "recall.data is 'no'"),
        ({"count": 1, "choose": "recall", "recall": {"budget": 0.5}}, "less than or equal to 0.05"),
        ({"count": 1, "choose": "recall", "recall": {"heldout_tokens": 64}}, "fewer than one window of 512"),
        ({"count": 1, "choose": "last", "search": "pairs", "candidates": 3}, "`search` is given, but `choose` is last"),
        (
            {"count": 2, "choose": "recall", "probe": {}},
            "name text files in recall.haystack, or list other probe.tasks",
        ),
        ({"count": 1, "choose": "recall", "search": "pairs"}, "chooses two layers or more among `candidates`"),
        ({"count": 3, "choose": "recall", "search": "pairs", "candidates": 2}, "not 3 among 2; change count"),
        ({"count": 1, "choose": "recall", "search": "one_at_a_time", "candidates": 2}, "measures all layers once"),
        ({"count": 1, "choose": "recall", "probe": {"tasks": ["vt"]}}, "probe.tasks"),
        ({"count": 1, "choose": "recall", "probe": {"least": 2}}, "less than or equal to 1"),
        ({"count": 1, "choose": "difficulty", "difficulty": {"min_gap": 9}}, "min_gap must not be larger"),
        ("even", "give a list of layers, or {count: N, choose:"),
        ([-1], "counted from 0"),
        ([1, 1], "has a layer twice"),
    ],
)
def test_bad_choices_are_one_line(layers, words):
    with pytest.raises(RecipeError) as caught:
        recipe(layers)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("way", ["difficulty", "recall"])
def test_a_choice_after_align_needs_align(way):
    with pytest.raises(RecipeError, match="the recipe has none; choose even or last"):
        recipe({"count": 1, "choose": way}, align=None)
    assert recipe({"count": 1, "choose": "even"}, align=None)


def test_calibration_needs_align():
    with pytest.raises(RecipeError, match="calibrate needs an align stage"):
        recipe([1], align=None, student={"calibrate": {}})


def test_a_dataset_for_the_probe_alone_is_made():
    assert recipe({"count": 1, "choose": "recall"}).datasets_used == ("train",)
    made = recipe({"count": 1, "choose": "recall", "recall": {"data": "other"}})
    assert made.datasets_used == ("train", "other")
    assert run_tokens(made) == 2 * 40960


def by_recall(count, **changes):
    return AttentionChoice(count=count, choose="recall", **changes)


@pytest.mark.parametrize("search", ["one_at_a_time", "greedy", "pairs"])
@pytest.mark.parametrize("tokens", [1_000_000, 500_000_000])
@pytest.mark.parametrize(("count", "layers"), [(2, 4), (6, 44), (7, 28)])
def test_the_probe_keeps_within_its_budget(tokens, count, layers, search):
    probe = RecallProbe(lengths=(32, 64), context=32, documents=1000, heldout_tokens=1 << 20)
    choice = by_recall(count, recall=probe, search=search)
    fitted = fit_probe(choice, num_layers=layers, tokens=tokens * count).recall
    cost = choice.passes(layers) * (fitted.quiz_tokens + fitted.heldout_tokens)
    assert cost <= 0.05 * tokens * count
    assert fitted.documents >= 4
    assert fitted.heldout_tokens >= fitted.context
    if fitted != probe:  # all of the budget is used, but for what the parts do not divide
        assert cost > 0.05 * tokens * count - choice.passes(layers) * (32 + 2)


def test_a_search_costs_the_passes_that_it_makes():
    """The student as it is, every set of layers, and a teacher's pass for every call."""
    assert by_recall(3).passes(8) == 1 + (8 + 7 + 6) + 3
    assert by_recall(3, candidates=2).passes(8) == 1 + (8 + 2 + 2) + 3
    assert by_recall(3, search="one_at_a_time").passes(8) == 1 + 8 + 1 + 2
    assert by_recall(3, search="pairs").passes(8) == 1 + 8 + 15 + 1 + 3
    assert by_recall(3, search="pairs", candidates=4).passes(8) == 1 + 8 + 6 + 1 + 3


def test_a_probe_within_its_budget_is_left_alone():
    assert fit_probe(by_recall(4), num_layers=28, tokens=500_000_000) == by_recall(4)


def test_too_few_tokens_are_refused_with_what_would_help():
    with pytest.raises(ValueError, match=r"train on more tokens, shorten recall.lengths"):
        fit_probe(by_recall(7), num_layers=28, tokens=100_000)


def test_the_digest_is_of_what_the_choice_is():
    def digest(run=1000, **probe):
        choice = AttentionChoice(count=1, choose="recall", recall=RecallProbe(**probe))
        teacher = TeacherRef(path="demo", fingerprint="f")
        spec = ChooseSpec(section=choice, teacher=teacher, attention_rope=False, run_tokens=run)
        return spec_digest("choose", spec, {})

    # That of a recipe before probe, search and candidates.
    assert digest() == "419a00bc18f72dbe4f0e20469c34c036e18e2a08e8c5130e1c3c5a1869ecc880"
    assert digest() == digest(run=2000) == digest(micro_batch=1)
    assert len({digest(), digest(seed=1), digest(documents=64), digest(lengths=(64,))}) == 4


def test_search_and_probe_make_another_choice():
    def digest(**changes):
        teacher = TeacherRef(path="demo", fingerprint="f")
        spec = ChooseSpec(section=by_recall(2, **changes), teacher=teacher, attention_rope=False, run_tokens=1)
        return spec_digest("choose", spec, {})

    assert digest() == digest(search="greedy", candidates=None, probe=None)
    others = [
        {"search": "pairs"},
        {"search": "one_at_a_time"},
        {"candidates": 3},
        {"probe": {"tasks": ["niah_single_1"]}},
    ]
    assert len({digest(), *(digest(**one) for one in others)}) == 5
