"""The section `extend` of a recipe: what is refused, its digest, which datasets and teacher it asks for."""

from __future__ import annotations

from typing import Any

import pytest

from radlads.tasks.contracts.identity import identity
from radlads.tasks.contracts.parsing.document import DocumentError
from radlads.tasks.contracts.recipe.recipe import RecallSource, Recipe, load_recipe, parse_recipe
from radlads.tasks.contracts.specs import PlanReport, TeacherRef, spec_digest
from radlads.tasks.stage_specs import needle_spec, train_spec

GROWING = [{"tokens": 128}, {"tokens": 256, "context": 32}, {"tokens": 512, "context": 64, "batch": 2}]


def recipe(**extend: Any) -> Recipe:
    raw = load_recipe("smoke").model_dump(mode="json")
    raw["data"]["recall"] = {"sources": [{"kind": "recall", "documents": 40, "lengths": [64]}]}
    raw["needle"]["training_length"] = None
    raw["extend"] = {"data": "stories", "tokens": 896, "context": 16, "batch": 4, "phases": GROWING} | extend
    return parse_recipe(raw)


REPORT = PlanReport(
    teacher=TeacherRef(path="demo", fingerprint="f", tokenizer_fingerprint="t"),
    tokenizer="demo", tokenizer_fingerprint="t", teacher_parameters=10, student_parameters=12, mixer_parameters=3,
    num_layers=2, attention_layers=(1,), stages={},
)  # fmt: skip


@pytest.mark.parametrize(
    ("extend", "message"),
    [
        ({"phases": [{"tokens": 400, "context": 32}, {"tokens": 496, "context": 32}]},
         "extend: contexts grow from phase to phase, but phase 2 has 32 after 32"),
        ({"phases": [{"tokens": 400}, {"tokens": 96, "context": 32}, {"tokens": 400, "context": 24}]},
         "contexts grow from phase to phase, but phase 3 has 24 after 32"),
        ({"tokens": 900}, "tokens is 900, but the phases' tokens add up to 896"),
        ({"phases": [{"tokens": 896, "batch": 3, "micro_batch": 2}]}, "phase 1: batch .3. must be a multiple of"),
        ({"phases": [{"tokens": 896, "temperature": 2}]}, "extend.phases.0.temperature: unknown key 'temperature'"),
        ({"recall": {"data": "recal"}}, "extend mixes in rows of 'recal', but `data` has 'stories' .* and 'recall'"),
        ({"recall": {"data": "recall"}, "data": "recall"}, "extend mixes rows of 'recall' into itself"),
        ({"recall": {"data": "recall", "share": 1.0}}, "extend.recall.share: Input should be less than or"),
        ({"recall": {"data": "recall", "share": 0}}, "extend.recall.share: Input should be greater than"),
        ({"recall": {"share": 0.1}}, "extend.recall.data: Field required"),
        ({"teacher_kl": -1}, "extend.teacher_kl: Input should be greater than or equal to 0"),
        ({"teacher_kl": 0.1, "label_smoothing": 0.1}, "label_smoothing and teacher_kl both soften the labels"),
        ({"phases": [{"tokens": 896, "teacher_kl": 0.1}], "label_smoothing": 0.1}, "give one of them"),
        ({"train_only": ["decay"], "lora": {}}, "train_only and lora cannot be combined"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(extend: dict[str, Any], message: str) -> None:
    with pytest.raises(DocumentError, match=message) as raised:
        recipe(**extend)
    assert "\n" not in str(raised.value)


def test_it_comes_after_finetune_and_reads_its_datasets() -> None:
    plain, mixed = recipe(), recipe(recall={"data": "recall"})
    assert plain.training_stages == ("align", "distill", "finetune", "extend")
    assert "recall" not in plain.datasets_used
    assert "recall" in mixed.datasets_used
    assert mixed.extend.datasets == {"data": "stories", "mixed_data": "recall"}
    assert [part.context for part in mixed.extend.parts] == [16, 32, 64]


def test_needle_marks_the_longest_context_of_all_stages() -> None:
    smoke = load_recipe("smoke")
    before = max(getattr(smoke, stage).context for stage in smoke.training_stages)
    assert before > recipe().extend.longest_context
    assert needle_spec(recipe(), REPORT).training_length == before
    long = recipe(phases=[{"tokens": 384}, {"tokens": 512, "context": 4096}])
    assert needle_spec(long, REPORT).training_length == 4096


def digest(**extend: Any) -> str:
    return spec_digest("extend", train_spec(recipe(**extend), REPORT, "extend"), {})


def test_its_digest_is_of_what_changes_the_result() -> None:
    plain = digest()
    same = [
        {"micro_batch": 2},
        {"phases": [GROWING[0] | {"micro_batch": 4}, *GROWING[1:]]},
        {"gradient_checkpointing": True},
        {"checkpoint_every": 7, "keep_checkpoints": 3, "heldout_every": 5},
    ]
    assert {digest(**changes) for changes in same} == {plain}
    others = [
        {"recall": {"data": "recall"}},
        {"recall": {"data": "recall", "share": 0.2}},
        {"teacher_kl": 0.1},
        {"phases": [GROWING[0] | {"teacher_kl": 0.1}, *GROWING[1:]]},
        {"phases": [GROWING[0], GROWING[1] | {"context": 48}, GROWING[2]]},
        {"phases": [GROWING[0] | {"fresh_optimizer": True}, *GROWING[1:]]},
        {"seed": 1},
    ]
    assert len({plain, *(digest(**changes) for changes in others)}) == 1 + len(others)


def test_a_setting_that_came_later_is_in_no_digest_until_it_is_used() -> None:
    """Recall datasets that were made before `facts` keep their names."""
    plain = RecallSource(kind="recall", documents=40, lengths=(64,))
    assert "extend" not in identity(load_recipe("smoke"), None)
    assert "extend" in identity(recipe(), None)
    before = {"kind", "documents", "lengths", "haystack", "haystack_separator", "seed"}
    assert identity(plain, None).keys() == before
    assert identity(plain.model_copy(update={"facts": 30}), None).keys() == before | {"facts"}


def test_a_teacher_is_named_only_where_a_phase_asks_for_it() -> None:
    assert train_spec(recipe(), REPORT, "extend").teacher is None
    assert train_spec(recipe(teacher_kl=0.1), REPORT, "extend").teacher == REPORT.teacher
    first = recipe(phases=[GROWING[0] | {"teacher_kl": 0.1}, *GROWING[1:]])
    assert train_spec(first, REPORT, "extend").teacher == REPORT.teacher
    last = recipe(teacher_kl=0.1, phases=[phase | {"teacher_kl": 0} for phase in GROWING])
    assert train_spec(last, REPORT, "extend").teacher is None
    assert train_spec(first, REPORT, "finetune").teacher is None
