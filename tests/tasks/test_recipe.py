"""Recipes: shipped ones validate, faults are told in one line each, overrides are typed, digests name what matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from radlads.tasks.contracts.job import InputRef, canonical_json
from radlads.tasks.contracts.recipe.recipe import RecipeError, dump_recipe, list_recipes, load_recipe, parse_recipe
from radlads.tasks.contracts.specs import Pin, TeacherRef, TokenizeSpec, TrainSpec, spec_digest


def minimal(**more: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "teacher": {"path": "demo"},
        "data": {"train": {"sources": [{"kind": "files", "paths": ["a.txt"]}]}},
        **more,
    }


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_validates_and_survives_a_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe
    assert recipe.sources, "a shipped recipe says where its numbers come from"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"distil": {"tokens": 1, "context": 2, "batch": 1}}, "unknown key 'distil'; did you mean 'distill'?"),
        ({"align": {"tokens": 9, "context": 4, "batch": 1, "loss": "l1"}}, "align.loss"),
        ({"align": {"tokens": 9, "context": 4, "batch": 3, "micro_batch": 2}}, "must be a multiple of micro_batch"),
        (
            {"align": {"tokens": 9, "context": 4, "batch": 1, "data": "web"}},
            "align.data is 'web', but `data` has 'train'",
        ),
        *(
            ({"align": {"tokens": 9, "context": 4, "batch": 1, **changes}}, f"align.{told}")
            for changes, told in (
                (
                    {"rest_rate": {"start": 1e300, "final": 0}},
                    "rest_rate.start: Input should be less than or equal to",
                ),
                ({"mixer_rate": {"start": 1e-300, "final": 0}}, "mixer_rate.start: a number from 1e-30 to 1e+09 is"),
                ({"optimizer": {"weight_decay": 1e300}}, "optimizer.weight_decay: Input should be less than or equal"),
                ({"optimizer": {"eps": 1e-300}}, "optimizer.eps: a number from 1e-30 to 1e+09 is needed"),
                ({"optimizer": {"decay_base_rate": 1e300}}, "optimizer.decay_base_rate: a number from 1e-30 to 1e+09"),
            )
        ),
        ({"student": {"attention_layers": [-1]}}, "cannot be negative"),
        ({"student": {"attention_layers": [2, 2]}}, "has a layer twice"),
        ({"teacher": None}, "give exactly one of `teacher` (to convert it) and `pretrain`"),
        ({"needle": {"trials": 3}}, "needle.trials"),
        ({"name": "No Spaces"}, "name"),
    ],
)
def test_a_fault_is_told_in_one_line_that_names_its_place(change: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(minimal(**change), where="mine.yaml")
    lines = str(caught.value).splitlines()
    assert any(told in line for line in lines)
    assert all(line.startswith("mine.yaml: ") for line in lines)


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(minimal(evalute={}, align={"tokens": 0, "context": 4, "batch": 1}))
    assert len(str(caught.value).splitlines()) == 2


def test_a_typo_in_a_nested_section_is_matched_with_that_sections_keys() -> None:
    raw = minimal()
    raw["data"]["train"]["sources"][0]["sepparator"] = "x"
    with pytest.raises(RecipeError, match="did you mean 'separator'"):
        parse_recipe(raw)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"student": {"attention_layers": {"count": 1, "choose": "recal"}}},
            "student.attention_layers.choose: Input should be 'even', 'last', 'difficulty' or 'recall' "
            "(given: 'recal')",
        ),
        ({"student": {"attention_layers": {"choose": "last"}}}, "student.attention_layers.count: Field required"),
        (
            {"student": {"attention_layers": {"count": 1, "choose": "last", "recall": {"documents": 9}}}},
            "student.attention_layers: settings of `recall` are given, but `choose` is last; remove them",
        ),
        (
            {"data": {"train": {"sources": [{"kind": "files", "paths": [3]}]}}},
            "data.train.sources.0.paths.0: Input should be a valid string (given: 3)",
        ),
        (
            {"data": {"train": {"sources": [{"kind": "files", "paths": ["a"], "pathz": ["b"]}]}}},
            "data.train.sources.0.pathz: unknown key 'pathz'; did you mean 'paths'?",
        ),
        ({"data": {"train": {"sources": 3}}}, "data.train.sources: Input should be a list (given: 3)"),
        (
            {"data": {"train": {"sources": []}}},
            "data.train.sources: List should have at least 1 item after validation, not 0",
        ),
        (
            {"data": {"train": {"sources": [{"kind": "file", "paths": ["a"]}]}}},
            "data.train.sources.0: Input tag 'file' found using 'kind' does not match any of the expected tags: "
            "'hub', 'files', 'sample', 'recall'",
        ),
    ],
)
def test_a_place_has_the_keys_that_the_user_wrote_and_is_named_once(change: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(minimal(**change), where="mine.yaml")
    assert str(caught.value) == f"mine.yaml: {told}"


def test_unknown_recipe_suggests_a_shipped_one_and_a_missing_file_is_told() -> None:
    with pytest.raises(RecipeError, match="did you mean 'smoke'"):
        load_recipe("smok")
    with pytest.raises(RecipeError, match="no recipe file"):
        load_recipe("nowhere.yaml")


def test_overrides_are_typed_reach_into_sections_and_remove_optional_ones(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(minimal(align={"tokens": 64, "context": 4, "batch": 2})))
    recipe = load_recipe(str(path), {"align.tokens": 128, "student.attention_layers": [1], "resources.zero_stage": 2})
    assert recipe.align is not None
    assert (recipe.align.tokens, recipe.align.num_steps) == (128, 16)
    assert recipe.student.attention_layers == (1,)
    assert recipe.resources.zero_stage == 2
    assert load_recipe(str(path), {"align": None}).align is None
    with pytest.raises(RecipeError, match=r"align\.tokens"):
        load_recipe(str(path), {"align.tokens": "many"})
    with pytest.raises(RecipeError, match="not a section"):
        load_recipe(str(path), {"align.tokens.more": 1})


def train_spec(**section: Any) -> TrainSpec:
    recipe = parse_recipe(minimal(align={"tokens": 64, "context": 4, "batch": 4} | section))
    assert recipe.align is not None
    return TrainSpec(objective="align", section=recipe.align, teacher=TeacherRef(path="a", fingerprint="f"))


def test_a_digest_names_what_is_made_and_not_how_or_where() -> None:
    inputs = {"student": InputRef(uri="a", digest="1")}
    plain = spec_digest("align", train_spec(), inputs)
    operational = {"micro_batch": 2, "checkpoint_every": 7, "keep_checkpoints": 5, "gradient_checkpointing": True}
    assert spec_digest("align", train_spec(**operational), inputs) == plain
    moved = train_spec().model_copy(update={"teacher": TeacherRef(path="elsewhere", fingerprint="f")})
    assert spec_digest("align", moved, {"student": InputRef(uri="moved", digest="1")}) == plain
    other = train_spec().model_copy(update={"teacher": TeacherRef(path="a", fingerprint="g")})
    assert spec_digest("align", other, inputs) != plain
    assert spec_digest("align", train_spec(), {"student": InputRef(uri="a", digest="2")}) != plain


@pytest.mark.parametrize(
    "section", [{"tokens": 65}, {"context": 8}, {"batch": 2}, {"seed": 1}, {"loss": "mse"}, {"freeze": ["mlp"]}]
)
def test_a_digest_is_sensitive_to_every_setting_of_the_product(section: dict[str, Any]) -> None:
    assert spec_digest("align", train_spec(**section), {}) != spec_digest("align", train_spec(), {})


def test_a_dataset_is_named_by_what_its_files_hold() -> None:
    recipe = parse_recipe(minimal())

    def digest(tokenizer: str, path: str, content: str) -> str:
        pin = Pin(kind="files", place=(path,), content=content)
        spec = TokenizeSpec(
            name="train",
            dataset=recipe.data["train"],
            pins={"dataset.sources.0.paths": pin},
            tokenizer=tokenizer,
            tokenizer_fingerprint="t",
            teacher=None,
        )
        return spec_digest("tokenize", spec, {})

    assert digest("here", "a.txt", "1") == digest("there", "/moved/a.txt", "1")
    assert digest("here", "a.txt", "1") != digest("here", "a.txt", "2")
    unpinned = TokenizeSpec(
        name="train", dataset=recipe.data["train"], tokenizer="here", tokenizer_fingerprint="t", teacher=None
    )
    with pytest.raises(ValueError, match=r"dataset\.sources\.0\.paths .* not pinned"):
        spec_digest("tokenize", unpinned, {})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=5), JSON, max_size=5))
def test_canonical_json_does_not_see_the_order_of_keys(value: dict[str, Any]) -> None:
    assert canonical_json(dict(reversed(list(value.items())))) == canonical_json(value)
