"""Recipes of any shape survive YAML; digests do not depend on where a run is started."""

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from radlads.tasks.contracts.recipe.recipe import Recipe, dump_recipe, load_recipe, parse_recipe
from radlads.tasks.contracts.recipe.relative_paths import anchor_recipe
from radlads.tasks.contracts.specs import PlanSpec, spec_digest

NAMES = st.text("abcdefghij", min_size=1, max_size=6)
PLACES = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1)
RATE = st.just(0.0) | st.floats(1e-30, 1)
RATES = st.fixed_dictionaries({"start": RATE, "final": RATE})
TRAININGS = st.fixed_dictionaries(
    {"tokens": st.integers(1, 10**12), "context": st.integers(2, 10**6), "batch": st.integers(1, 4096)},
    optional={
        "mixer_rate": RATES,
        "rest_rate": RATES,
        "freeze": st.lists(st.sampled_from(["embeddings", "head", "norms", "mlp"]), max_size=2, unique=True),
        "schedule": st.fixed_dictionaries(
            {"kind": st.sampled_from(["cosine", "constant"]), "begin": st.floats(1e-30, 0.4), "end": st.floats(0.5, 1)}
        ),
        "reset_at_documents": st.booleans(),
    },
)
SOURCES = st.one_of(
    st.fixed_dictionaries({"kind": st.just("files"), "paths": st.lists(PLACES, min_size=1, max_size=3)}),
    st.fixed_dictionaries({"kind": st.just("hub"), "path": NAMES}, optional={"subset": st.none() | st.text()}),
    st.fixed_dictionaries(
        {"kind": st.just("sample"), "tokens": st.integers(1, 2**53)}, optional={"top_p": st.floats(0.1, 1)}
    ),
)
RECIPES = st.fixed_dictionaries(
    {
        "name": NAMES,
        "description": st.text(),
        "teacher": st.fixed_dictionaries({"path": PLACES}),
        "data": st.fixed_dictionaries(
            {"train": st.fixed_dictionaries({"sources": st.lists(SOURCES, min_size=1, max_size=3)})}
        ),
    },
    optional={
        "align": TRAININGS,
        "distill": TRAININGS,
        "student": st.fixed_dictionaries({"attention_layers": st.lists(st.integers(0, 99), max_size=5, unique=True)}),
    },
)


@settings(max_examples=80, deadline=None)
@given(RECIPES)
def test_a_recipe_survives_yaml(raw):
    recipe = parse_recipe(raw)
    again = parse_recipe(yaml.safe_load(dump_recipe(recipe)))
    assert again == recipe
    assert isinstance(again, Recipe)


def write(folder, text):
    folder.mkdir(parents=True)
    (folder / "corpus.txt").write_text("x")
    (folder / "part-1.jsonl").write_text("{}")
    (folder / "teacher").mkdir()
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


TEXT = """
name: mine
teacher: {path: teacher}
data:
  train:
    sources:
      - &files {kind: files, paths: [corpus.txt, "part-*.jsonl", "demo:stories.txt"], separator: "\\n"}
      - {kind: hub, path: teacher}
  again: {sources: [*files]}
needle: {haystack: [nowhere.txt]}
"""


def test_places_are_looked_for_beside_the_recipe_then_here(tmp_path):
    path = write(tmp_path / "a", TEXT)
    (tmp_path / "here").mkdir()
    recipe = anchor_recipe(load_recipe(path), path, tmp_path / "here")
    assert recipe.data["train"].sources[0].paths == (
        f"{tmp_path}/a/corpus.txt", f"{tmp_path}/a/part-*.jsonl", "demo:stories.txt"
    )  # fmt: skip
    assert recipe.teacher.path == f"{tmp_path}/a/teacher"
    assert recipe.data["train"].sources[1].path == "teacher", "a hub dataset is no folder"
    assert recipe.needle.haystack == ("nowhere.txt",)
    (tmp_path / "here" / "nowhere.txt").write_text("x")
    again = anchor_recipe(load_recipe(path), path, tmp_path / "here")
    assert again.needle.haystack == (f"{tmp_path}/here/nowhere.txt",)
    assert anchor_recipe(again, path, tmp_path) == again


def test_chat_templates_are_anchored_where_they_are_files(tmp_path):
    chats = "messages_field: m, chat_template"
    path = write(
        tmp_path / "a",
        f"name: x\nteacher: {{path: t}}\ndata:\n  a:\n    sources:\n"
        f"      - {{kind: hub, path: org/chats, {chats}: mine.jinja}}\n"
        f"      - {{kind: files, paths: [c.jsonl], {chats}: qwen3}}\n",
    )
    (tmp_path / "a" / "mine.jinja").write_text("x")
    (tmp_path / "a" / "qwen3").mkdir()
    sources = anchor_recipe(load_recipe(path), path, tmp_path).data["a"].sources
    assert [source.chat_template for source in sources] == [f"{tmp_path}/a/mine.jinja", "template:qwen3"]
    assert sources[0].path == "org/chats"


def test_the_same_recipe_in_another_folder_is_the_same_plan(tmp_path):
    digests = set()
    for name in ("a", "b"):
        path = write(tmp_path / name, TEXT)
        recipe = anchor_recipe(load_recipe(path), path, tmp_path / name)
        digests.add(spec_digest("plan", PlanSpec(recipe=recipe), {}))
    assert len(digests) == 1


def test_an_override_changes_one_use_of_an_anchor(tmp_path):
    stages = "align: &stage {tokens: 64, context: 4, batch: 2}\ndistill: *stage\n"
    path = write(tmp_path / "a", TEXT + stages)
    recipe = load_recipe(path, {"align.tokens": 128})
    assert (recipe.align.tokens, recipe.distill.tokens) == (128, 64)


def test_question_files_are_anchored(tmp_path):
    data = "data: {a: {sources: [{kind: recall, documents: 1}]}}"
    needle = "needle: {ruler: {squad: q.jsonl, haystack: [e.txt]}}"
    path = write(tmp_path / "a", f"name: x\nteacher: {{path: t}}\n{data}\n{needle}\n")
    for name in ("q.jsonl", "e.txt"):
        (tmp_path / "a" / name).write_text("x")
    found = anchor_recipe(load_recipe(path), path, tmp_path).needle.ruler
    assert (found.squad, found.haystack) == (f"{tmp_path}/a/q.jsonl", (f"{tmp_path}/a/e.txt",))
