"""What the report and the card say of a choice of layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from radlads.tasks.contracts.recipe.recipe import parse_recipe
from radlads.tasks.jobs.choose.choice_chart import draw_choice
from radlads.tasks.jobs.report.choice_report import choice_blocks, choice_summary, choice_table
from radlads.tasks.jobs.report.products import Products
from radlads.tasks.jobs.report.report_blocks import Picture, render_markdown

NUMBERS = {
    "tokens": 6984, "token_share": 0.0474, "recall_teacher": -0.001, "accuracy_teacher": 1.0,
    "recall_before": -4.1, "recall_after": -1.4, "kl_before": 1.9, "kl_after": 1.8,
}  # fmt: skip


def row(layer: int, score: float, *, taken: int | None = None) -> dict[str, Any]:
    more = {"recall_gained": score, "kl_saved": 0.1, "kl": 1.0, "accuracy": 0.5}
    return {"layer": layer, "score": score, **more, "chosen": taken is not None, "round": taken}


RECALL = {
    "choose": "recall", "attention_layers": [1, 3], "numbers": NUMBERS, "probe": {"answers": 17, "text_tokens": 640},
    "layers": [row(0, -0.2), row(1, 0.3, taken=2), row(2, 0.1), row(3, 1.5, taken=1)],
}  # fmt: skip
DIFFICULTY = {
    "choose": "difficulty", "attention_layers": [0], "numbers": {"tokens": 0, "token_share": 0.0},
    "layers": [
        {"layer": 0, "score": 1.0, "loss": 0.4, "chosen": True},
        {"layer": 1, "score": 0.2, "loss": 0.1, "chosen": False},
    ],
}  # fmt: skip


def products(sheet: dict[str, Any] | None) -> Any:
    return SimpleNamespace(choice=sheet, of_stage=lambda stage: SimpleNamespace(short="abc123") if sheet else None)


def test_every_layer_has_a_row_and_the_chosen_are_marked():
    table = choice_table(products(RECALL))
    assert table is not None
    assert [cells[0] for cells in table.rows] == ["0", "1", "2", "3"]
    assert [cells[-2] for cells in table.rows] == ["", "yes, round 2", "", "yes, round 1"]
    assert {cells[-1] for cells in table.rows} == {"abc123"}
    assert all(len(cells) == len(table.header) for cells in table.rows)


def test_the_cost_and_what_it_bought_are_said():
    said = choice_summary(products(RECALL))
    assert said is not None
    for words in ("layers 1, 3", "17 answers", "-4.1000 to -1.4000", "6,984 tokens", "4.74 % of the run's"):
        assert words in said


def test_difficulty_has_its_own_columns():
    text = render_markdown("t", choice_blocks(products(DIFFICULTY), []))
    assert "| 0 | 1.0000 | 0.4000 | yes | abc123 |" in text
    assert "layer 0, whose mixers fitted it worst" in text


def test_what_is_scored_with_positions_and_goes_on_without_is_said():
    without = {**RECALL, "attention_rope": False}
    assert "the student has none" in (choice_summary(products(without)) or "")
    assert "positions" not in (choice_summary(products({**RECALL, "attention_rope": True})) or "")


def test_the_ratio_stands_beside_its_parts():
    table = choice_table(products(RECALL))
    assert table is not None
    assert table.header[1:5] == ("recall gained", "KL saved", "remaining KL", "recall gained per remaining KL")
    assert table.rows[1][1:5] == ("0.3000", "0.1000", "1.0000", "0.3000")


def scored(**values: float) -> dict[str, Any]:
    return {layers.removeprefix("l").replace("_", "+"): {"score": value} for layers, value in values.items()}


def test_every_round_of_a_search_is_told():
    rounds = [
        {"round": 1, "kept": [], "candidates": scored(l0=0.1, l1=0.4, l2=0.0, l3=0.3), "chosen": []},
        {"round": 2, "kept": [], "candidates": scored(l1_3=0.5, l0_1=0.6), "chosen": [1, 3]},
    ]
    text = render_markdown("t", choice_blocks(products({**RECALL, "search": "pairs", "rounds": rounds}), []))
    assert "| 1 | none | 4 | 1 (0.4000), 3 (0.3000), 0 (0.1000) | none | abc123 |" in text
    assert "| 2 | none | 2 | 0+1 (0.6000), 1+3 (0.5000) | 1, 3 | abc123 |" in text
    assert "The search: pairs." in text
    assert "restored in all" not in render_markdown("t", choice_blocks(products(RECALL), []))  # a former sheet


def test_a_teacher_that_fails_the_probe_is_told():
    failed = {**RECALL, "numbers": {**NUMBERS, "accuracy_teacher": 0.21}}
    assert "The teacher itself answers only 21" in (choice_summary(products(failed)) or "")
    assert "itself" not in (choice_summary(products(RECALL)) or "")


def test_nothing_is_said_where_nothing_was_chosen():
    assert choice_blocks(products(None), ["choose.png"]) == []


@pytest.mark.parametrize("sheet", [RECALL, DIFFICULTY])
def test_the_picture_is_drawn_and_shown(sheet: dict[str, Any], tmp_path: Any):
    draw_choice(sheet, tmp_path / "choose.png")
    assert (tmp_path / "choose.png").read_bytes().startswith(b"\x89PNG")
    blocks = choice_blocks(products(sheet), ["choose.png"])
    assert any(isinstance(block, Picture) and block.caption for block in blocks)


@pytest.mark.parametrize(
    ("choice", "plan", "layers"),
    [
        ({"attention_layers": [2]}, None, (2,)),
        (None, SimpleNamespace(attention_layers=(1, 2)), (1, 2)),
        (None, None, (0, 3)),
    ],
)
def test_the_layers_of_the_model_are_those_it_has(choice: Any, plan: Any, layers: tuple[int, ...]):
    data = {"train": {"sources": [{"kind": "files", "paths": ["a.txt"]}]}}
    student = {"attention_layers": [3, 0]}
    recipe = parse_recipe({"name": "tiny", "teacher": {"path": "demo"}, "student": student, "data": data})
    assert Products.attention_layers(SimpleNamespace(choice=choice, plan=plan), recipe) == layers  # type: ignore[arg-type]
