"""docs/keys.md is what `radlads recipes --keys` prints, and says something of every key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field
from pydantic.fields import FieldInfo
from typer.testing import CliRunner

from radlads.flows import cli
from radlads.flows.keys.meanings import said_of
from radlads.flows.keys.mixers import variant_options
from radlads.flows.keys.page import key_tables, keys_page, sections_in
from radlads.flows.keys.words import default_words, number_words, type_words, yaml_words
from radlads.tasks.contracts.recipe.base import Section
from radlads.tasks.contracts.recipe.losses import Distill, Finetune
from radlads.tasks.contracts.recipe.sections import Recipe

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_page_is_what_the_command_prints() -> None:
    printed = CliRunner().invoke(cli.app, ["recipes", "--keys"])
    assert printed.exit_code == 0
    written = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
    assert printed.stdout == written, "a key has changed: radlads recipes --keys > docs/keys.md"


def test_every_key_of_every_section_has_a_meaning() -> None:
    waiting, found = [Recipe], set()
    while waiting:
        section = waiting.pop()
        found.add(section)
        waiting += [one for f in section.model_fields.values() for one in sections_in(f.annotation) if one not in found]
    assert found <= {table.section for table in key_tables()}
    nothing = {f"{one.__name__}.{name}" for one in found for name in one.model_fields if not said_of(one, name).meaning}
    assert nothing == set(), (
        "write a text below the field; a last sentence `Source: ...` names where its default is from"
    )


def test_every_option_of_a_mixer_has_a_meaning_and_the_default_of_the_code() -> None:
    from radlads.model.mixers.shared.registry import find_variant, list_variants

    read = variant_options()
    assert sorted(read) == sorted(list_variants())
    for variant, options in read.items():
        fields = find_variant(variant).Options.model_fields
        assert {one.name: one.default for one in options} == {n: default_words(f) for n, f in fields.items()}, variant
        assert [one.name for one in options if not one.meaning] == [], variant


def test_links_within_the_page_have_a_place() -> None:
    page = keys_page()
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}
    assert len(headings) == len(set(headings))
    assert set(re.findall(r"\]\(#([^)]*)\)", page)) <= anchors


def test_a_key_that_a_stage_inherits_is_told_by_the_stage_that_says_so() -> None:
    assert "published" in said_of(Distill, "mixer_rate").meaning
    assert said_of(Finetune, "tokens") == said_of(Distill, "tokens")
    assert said_of(Finetune, "mixer_rate").source == "RADLADS (2505.03005), table 2"


class Inner(Section):
    size: int = 3
    names: tuple[str, ...] = ()


class Sample(Section):
    count: int | None = Field(default=None, gt=0, le=4096)
    rate: Annotated[float, Field(ge=0)] | Literal["auto"] = 1e-5
    inner: Inner = Inner(size=4)
    plain: Inner = Inner()
    needed: bool
    by_name: dict[str, tuple[Literal["a", 8], ...]] = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("name", "words", "default"),
    [
        ("count", "integer > 0, ≤ 4096 or null", "`null`"),
        ("rate", "number ≥ 0 or `auto`", "`1.0e-5`"),
        ("inner", "section", "`{size: 4}`"),
        ("plain", "section", ""),
        ("needed", "`true` or `false`", "**required**"),
        ("by_name", "mapping of names to list of `a` or `8`", "`{}`"),
    ],
)
def test_types_and_defaults_in_words(name: str, words: str, default: str) -> None:
    field: FieldInfo = Sample.model_fields[name]
    assert (type_words(field.annotation, field.metadata), default_words(field)) == (words, default)


def test_values_are_written_as_yaml_reads_them() -> None:
    from radlads.tasks.contracts.parsing.yaml_reader import parse_yaml

    for value in (1e-5, 2.5e-10, 0.001, 4_000_000, 12, True, None, [1, "two"], {"a": [0.5]}):
        assert parse_yaml(f"x: {yaml_words(value)}", where="x") == {"x": value}
    assert number_words(1e-05) == "1.0e-5"
