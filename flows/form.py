"""What a person sees of a flow in Prefect's pages: the types of its form's fields, and the title of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from prefect.runtime import flow_run
from pydantic import Field, WithJsonSchema

from radlads.flows.common import run_identity
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.credentials import hide
from radlads.tasks.contracts.parsing.document import one_line
from radlads.tasks.contracts.recipe.recipe import Recipe, list_recipes, load_recipe

_FIRST = ("qwen3-8b-hybrid", "qwen2.5-7b-hybrid", "smollm2-135m-hybrid", "smoke")
"""What most people look for, before the others."""
_LONGEST_TITLE = 200


def _choice(names: list[str]) -> Any:
    """A field with two forms: one of the shipped recipes, or any text."""
    shipped = {"title": "shipped recipe", "type": "string", "enum": names}
    own = {"title": "path of a YAML file", "type": "string", "examples": ["/data/my-hybrid.yaml"]}
    return WithJsonSchema({"anyOf": [shipped, own], "examples": [names[0], "/data/my-hybrid.yaml"]})


def _in_order() -> tuple[list[str], list[str]]:
    names = list_recipes()
    teachers = [name for name in names if name.startswith("demo-teacher")]
    others = [name for name in names if name not in teachers]
    first = [name for name in _FIRST if name in others]
    return first + sorted(set(others) - set(first), key=lambda name: (name.startswith("tiny-"), name)), teachers


_CONVERSIONS, _TEACHERS = _in_order()
RecipeChoice = Annotated[str, _choice(_CONVERSIONS)]
TeacherRecipeChoice = Annotated[str, _choice(_TEACHERS)]


def _optional(title: str, form: dict[str, Any]) -> Any:
    """A field that may be left at its default, which the page calls so."""
    return WithJsonSchema({"anyOf": [{"title": title, **form}, {"title": "default", "type": "null"}]})


RunName = Annotated[str | None, _optional("name", {"type": "string", "examples": ["first"]})]
Overrides = Annotated[
    dict[str, Any] | None,
    _optional("keys", {"type": "object", "additionalProperties": True, "examples": [{"distill.tokens": 200000000}]}),
]
Dollars = Annotated[
    float | None, Field(ge=0), _optional("dollars", {"type": "number", "minimum": 0, "examples": [100]})
]
# Prefect's server rejects an address that contains a password before it stores the parameters in its database.
Address = Annotated[
    str | None, _optional("address, without a password", {"type": "string", "not": {"pattern": "://[^/?#]*@"}})
]
Folder = Annotated[str | None, _optional("folder", {"type": "string"})]


def title_of_conversion() -> str:
    """The title of a run of the flow `radlads`: "mine: Qwen3-8B to hrwkv7 (hybrid)"."""
    return _title(_parameters(), run_identity())


def title_of_pretraining() -> str:
    """Of `radlads-pretrain`: "mine: a teacher by demo-teacher"."""
    return _title(_parameters(), run_identity())


def title_of_evaluation() -> str:
    """Of `radlads-evaluate`: "again: evaluates mine"."""
    given = _parameters()
    run, judged = given.get("run"), given.get("judged_run")
    return _clean(f"{run}: evaluates {judged}" if run else f"evaluates {judged}")


def _title(given: Mapping[str, Any], identity: str) -> str:
    """By the parameters of a run. A recipe that cannot be read has its name alone: the run will say what is wrong."""
    asked, run = str(given.get("recipe")), given.get("run")
    try:
        recipe = load_recipe(asked, given.get("overrides"))
    except (UserError, OSError):
        return _clean(f"{run}: {Path(asked).stem}" if run else Path(asked).stem)
    return _clean(f"{run or f'{recipe.name}-{identity[:8]}'}: {_what(recipe)}")


def _what(recipe: Recipe) -> str:
    if recipe.teacher is None:
        return f"a teacher by {recipe.name}"
    teacher = recipe.teacher.path.rstrip("/").rpartition("/")[2]
    kind = "hybrid" if recipe.student.attention_layers else "pure"
    return f"{teacher} to {recipe.student.variant} ({kind})"


def _parameters() -> Mapping[str, Any]:
    return dict(flow_run.parameters or {})


def _clean(title: str) -> str:
    return one_line(hide(title), _LONGEST_TITLE)
