"""Tasks of the evaluation harness: which hub datasets they read, and at which commit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from lm_eval.tasks import TaskManager

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.pins.content import ContentHashes
from radlads.tasks.contracts.recipe.recipe import parse_recipe
from radlads.tasks.contracts.recipe.sections import EvalTask
from radlads.tasks.jobs.judge import lmeval
from radlads.tasks.jobs.judge.task_datasets import check_commits, named_datasets
from radlads.tasks.jobs.plan import plan_pins
from radlads.tasks.jobs.plan.checks import Findings
from radlads.tasks.jobs.plan.plan_pins import pin_contents, pin_hub

COMMIT, LATER = "c" * 40, "d" * 40
REST = """
dataset_path: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
FILES = {
    "one.yaml": "task: one\ntag: [some]" + REST.format(path="org/one"),
    "two.yaml": "task: two\ntag: [some]\ninclude: base\n" + REST.replace("dataset_path: {path}", "").format(),
    "base": "dataset_path: org/two\ndataset_kwargs: {revision: v2}\n",
    "local.yaml": "task: local\n" + REST.format(path="json") + "dataset_kwargs: {data_files: {test: x.jsonl}}\n",
    "group.yaml": "group: all\ntask: [one, {task: local}, {group: inner, task: [two]}]\n",
    "x.jsonl": '{"question": "Is it?"}\n',
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("one", {"org/one": None}),
        ("two", {"org/two": "v2"}),
        ("local", {}),
        ("some", {"org/one": None, "org/two": "v2"}),
        ("all", {"org/one": None, "org/two": "v2"}),
    ],
)
def test_what_a_task_reads_of_the_hub_is_known(folder: Path, name: str, expected: dict[str, str | None]) -> None:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    assert named_datasets(manager, name, folder) == expected


def recipe_of(folder: Path, name: str) -> Any:
    return parse_recipe(
        {
            "name": "r",
            "teacher": {"path": "t"},
            "data": {"train": {"sources": [{"kind": "sample", "tokens": 9}]}},
            "evaluate": {"tasks": [{"name": name, "path": str(folder)}]},
        }
    )


def test_the_plan_pins_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        plan_pins, "hub_commit", lambda repo, revision, kind, key: LATER if revision == "v2" else COMMIT
    )
    findings = Findings()
    recipe = recipe_of(folder, "all")
    pins = pin_contents(recipe, None, pin_hub(recipe, findings), findings, ContentHashes())
    assert len(pins["evaluate.tasks.0.path"].files) == len(FILES)
    assert pins["evaluate.tasks.0.path"].commits == {"org/one": COMMIT, "org/two": LATER}
    assert findings.faults == []

    def unknown(repo: str, revision: str | None, kind: str, key: str) -> str:
        raise UserError(f"'{repo}' cannot be reached; pin one with {key}")

    monkeypatch.setattr(plan_pins, "hub_commit", unknown)
    pin_hub(recipe_of(folder, "all"), findings)
    assert findings.faults == [
        "evaluate.tasks: 'org/one' cannot be reached; pin one with `dataset_kwargs: {revision: <commit>}` in a YAML "
        "file of your own, given as the task's `path`"
    ]


def test_it_is_read_at_that_commit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        asked.append({"path": path, **options})
        return datasets.DatasetDict({"test": datasets.Dataset.from_list([{"question": "Is it?"}])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    commits = {"org/one": COMMIT, "org/two": LATER}
    lmeval._load_offline(EvalTask(name="all", path=str(folder)), commits)
    assert {row["path"]: row.get("revision") for row in asked} == {"org/one": COMMIT, "org/two": LATER, "json": None}


def test_a_cache_of_another_commit_is_not_taken() -> None:
    def built(commit: str) -> Any:
        split = SimpleNamespace(cache_files=[{"filename": f"/cache/org___one/default/0.0.0/{commit}/one-test.arrow"}])
        return SimpleNamespace(DATASET_PATH="org/one", dataset={"test": split})

    check_commits("one", built(COMMIT), {"org/one": COMMIT})
    check_commits("one", built(LATER), {})
    with pytest.raises(UserError, match=f"another commit of org/one than {COMMIT}"):
        check_commits("one", built(LATER), {"org/one": COMMIT})
