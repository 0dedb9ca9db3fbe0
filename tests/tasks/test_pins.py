"""Digests name what is read by its content: a change of it changes them, another place does not; what changed after it
was pinned is noticed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi, constants

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.identity import readings
from radlads.tasks.contracts.pins import content
from radlads.tasks.contracts.pins.content import ContentHashes
from radlads.tasks.contracts.pins.hub import hub_commit
from radlads.tasks.contracts.pins.pins import at_pinned_commits, check_pins, follow_moves, pin_place, pin_teacher
from radlads.tasks.contracts.recipe.choice import AttentionChoice
from radlads.tasks.contracts.recipe.recipe import Recipe, parse_recipe
from radlads.tasks.contracts.recipe.sections import Dataset, Evaluate, Needle, Pretrain
from radlads.tasks.contracts.specs import (
    ChooseSpec,
    EvaluateSpec,
    NeedleSpec,
    Pin,
    PlanReport,
    StageSpec,
    TeacherRef,
    TokenizeSpec,
    TrainSpec,
    spec_digest,
)
from radlads.tasks.stage_specs import choose_spec, evaluate_spec, needle_spec, tokenize_spec

TEACHER = TeacherRef(path="t", fingerprint="hub:t@" + "0" * 40, tokenizer_fingerprint="hub:t@" + "0" * 40)
COMMIT, LATER = "c" * 40, "d" * 40


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def safetensors(data: bytes) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


def tokenize_of(source: dict[str, Any]) -> TokenizeSpec:
    dataset = Dataset.model_validate({"sources": [source]})
    fingerprint = TEACHER.tokenizer_fingerprint
    return TokenizeSpec(name="x", dataset=dataset, tokenizer="t", tokenizer_fingerprint=fingerprint, teacher=None)


def choose_of(haystack: str) -> ChooseSpec:
    section = AttentionChoice.model_validate({"count": 1, "choose": "recall", "recall": {"haystack": [haystack]}})
    return ChooseSpec(section=section, teacher=TEACHER, attention_rope=False, run_tokens=1)


def evaluate_of(folder: Path) -> EvaluateSpec:
    section = Evaluate.model_validate({"tasks": [{"name": "mine", "path": str(folder)}]})
    return EvaluateSpec(section=section, teacher=TEACHER)


def pretrain_of(folder: Path) -> TrainSpec:
    values = {"tokens": 64, "context": 8, "batch": 2, "config": {}, "tokenizer": str(folder)}
    return TrainSpec(objective="pretrain", section=Pretrain.model_validate(values), teacher=None)


def needle_of(haystack: str) -> NeedleSpec:
    return NeedleSpec(section=Needle(haystack=(haystack,)), teacher=TEACHER, training_length=8)


TEXTS: dict[str, str | bytes] = {"a.txt": "one. two.", "b.txt": "three."}
TASK: dict[str, str | bytes] = {
    "mine.yaml": "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: data/x.jsonl}}\n"
    "doc_to_text: !function utils.text\n",
    "data/x.jsonl": '{"a": 1}\n',
    "utils.py": "def text(doc): return doc\n",
}
TOKENIZER: dict[str, str | bytes] = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool.jinja": "{{ tools }}",
    "config.json": '{"model_type": "llama"}',
}
# kind → (files of a folder, spec that reads the folder, files whose content it reads)
KINDS: dict[str, tuple[dict[str, str | bytes], Callable[[Path], StageSpec], tuple[str, ...]]] = {
    "files": (TEXTS, lambda f: tokenize_of({"kind": "files", "paths": [str(f / "*.txt")]}), ("a.txt", "b.txt")),
    "recall": (
        TEXTS,
        lambda f: tokenize_of({"kind": "recall", "documents": 2, "haystack": [str(f / "a.txt")]}),
        ("a.txt",),
    ),
    "folder of a dataset": (
        {"train.jsonl": '{"text": "a"}', "README.md": "---\nconfigs: []\n---"},
        lambda f: tokenize_of({"kind": "hub", "path": str(f)}),
        ("train.jsonl", "README.md"),
    ),
    "needle": (TEXTS, lambda f: needle_of(str(f / "a.txt")), ("a.txt",)),
    "choose": (TEXTS, lambda f: choose_of(str(f / "b.txt")), ("b.txt",)),
    "task": (TASK, evaluate_of, tuple(TASK)),
    "tokenizer": (TOKENIZER, pretrain_of, tuple(TOKENIZER)),
}
EVERY_FILE = [(kind, name) for kind, (_, _, names) in KINDS.items() for name in names]


def pinned(spec: StageSpec) -> StageSpec:
    pins = {reading.location: pin_place(reading, ContentHashes()) for reading in readings(spec)}
    return spec.model_copy(update={"pins": pins})


def digest(spec: StageSpec) -> str:
    return spec_digest("plan", pinned(spec), {})


def change(path: Path) -> None:
    """Another content of the same size and age."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    if path.name == "config.json":
        data = bytearray(data.replace(b"llama", b"qwen2"))
    else:
        data[-2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(("kind", "name"), EVERY_FILE)
def test_another_content_is_another_digest_and_another_place_is_not(tmp_path: Path, kind: str, name: str) -> None:
    files, spec_of, _ = KINDS[kind]
    here = write(tmp_path / "here", files)
    there = write(tmp_path / "else where" / "é", files)
    before = digest(spec_of(here))
    assert digest(spec_of(there)) == before
    if name == "mine.yaml":
        (there / name).write_text((there / name).read_text().replace("x.jsonl", "y.jsonl"))
    else:
        change(there / name)
    assert digest(spec_of(there)) != before


@pytest.mark.parametrize(("kind", "name"), EVERY_FILE)
def test_a_change_after_the_plan_is_said_in_one_line(tmp_path: Path, kind: str, name: str) -> None:
    files, spec_of, _ = KINDS[kind]
    spec = pinned(spec_of(write(tmp_path, files)))
    check_pins(spec, ContentHashes())
    if name == "mine.yaml":
        (tmp_path / name).write_text("task: mine\n")
    else:
        change(tmp_path / name)
    with pytest.raises(UserError, match="changed since the run was planned") as raised:
        check_pins(spec, ContentHashes())
    assert len(str(raised.value).splitlines()) == 1
    assert name in str(raised.value) or name == "config.json"


def test_what_a_task_names_outside_its_folder_is_content_too(tmp_path: Path) -> None:
    shared = write(
        tmp_path / "shared",
        {"base": "include: root\n", "root": "dataset_path: json", "x.jsonl": "{}", "more/y.jsonl": "{}"},
    )
    options = {"data_files": {"test": "../shared/x.jsonl", "train": "../shared/more/*.jsonl"}}
    config = yaml.safe_dump({"task": "mine", "include": "../shared/base", "dataset_kwargs": options})
    task = write(tmp_path / "task", {"mine.yaml": config})
    seen = {digest(evaluate_of(task))}
    for name in ("x.jsonl", "more/y.jsonl", "root", "base"):
        (shared / name).write_text("{'a': 1}")
        seen.add(digest(evaluate_of(task)))
    assert len(seen) == 5
    write(task, {"mine.yaml": "task: mine\ndataset_kwargs: {data_files: 'https://example.org/x.json'}\n"})
    with pytest.raises(UserError, match="whose content can change; use a local copy"):
        digest(evaluate_of(task))


def test_what_python_leaves_in_a_task_folder_is_no_change(tmp_path: Path) -> None:
    spec = pinned(evaluate_of(write(tmp_path, TASK)))
    write(tmp_path, {"__pycache__/utils.cpython-311.pyc": b"x", ".ipynb_checkpoints/mine.yaml": "task: mine"})
    check_pins(spec, ContentHashes())


def test_files_are_named_in_the_order_and_the_format_that_they_are_read_in(tmp_path: Path) -> None:
    write(tmp_path, TEXTS | {"c.jsonl": TEXTS["a.txt"], "d.txt": TEXTS["a.txt"]})

    def of(*paths: str) -> str:
        return digest(tokenize_of({"kind": "files", "paths": [str(tmp_path / path) for path in paths]}))

    assert of("a.txt", "b.txt") != of("b.txt", "a.txt")
    assert of("a.txt") == of("d.txt") != of("c.jsonl")
    assert of("[ab].txt") == of("a.txt", "b.txt") == of("a.txt", "*b.txt", "a.txt")
    sources = [{"kind": "files", "paths": [str(tmp_path / name)]} for name in ("a.txt", "b.txt")]
    two = TokenizeSpec.model_validate(
        tokenize_of(sources[0]).model_dump() | {"dataset": {"sources": sources}, "pins": {}}
    )
    assert digest(two) != of("a.txt", "b.txt")


def teacher_files() -> dict[str, str | bytes]:
    return TOKENIZER | {"generation_config.json": "{}", "model.safetensors": safetensors(bytes(9 << 20))}


@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json", "chat_template.jinja", "config.json"])
def test_every_byte_of_a_teacher_counts(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a", teacher_files() | {"README.md": "x"})
    before = pin_teacher(str(tmp_path / "a"))
    moved = shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "README.md").unlink()
    assert pin_teacher(str(moved)).fingerprint == before.fingerprint
    if name == "model.safetensors":
        with (moved / name).open("r+b") as file:  # between the blocks that were once looked at
            file.seek(8 + 200 + (9 << 20) // 64 // 2 + (1 << 16))
            file.write(b"\1")
    else:
        change(moved / name)
    after = pin_teacher(str(moved))
    assert after.fingerprint != before.fingerprint
    assert (after.tokenizer_fingerprint == before.tokenizer_fingerprint) == (
        name in ("model.safetensors", "generation_config.json")
    )
    spec = needle_of("unused").model_copy(
        update={"section": Needle(), "teacher": before.model_copy(update={"path": str(moved)})}
    )
    with pytest.raises(UserError, match=r"the teacher at .* changed since the run was planned"):
        check_pins(spec, ContentHashes())


def recipe_of(haystack: Path, **teacher: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "r",
            "teacher": {"path": "org/model", **teacher},
            "data": {"train": {"sources": [{"kind": "hub", "path": "org/data", "revision": "main"}]}},
            "evaluate": {"tasks": [{"name": "arc_easy"}]},
            "needle": {"haystack": [str(haystack)]},
        }
    )


def report_of(recipe: Recipe) -> PlanReport:
    pins = {
        reading.location: pin_place(reading, ContentHashes())
        if reading.kind == "files"
        else Pin(
            kind=reading.kind,
            place=reading.place,
            revision=reading.revision,
            content=f"hub:{reading.kind}@{COMMIT}" if reading.place else "harness",
        )
        for reading in readings(recipe)
    }
    return PlanReport(
        teacher=TEACHER, tokenizer="org/model", tokenizer_fingerprint="t", pins=pins, teacher_parameters=1,
        student_parameters=1, mixer_parameters=1, num_layers=1, attention_layers=(), stages={},
    )  # fmt: skip


def test_a_run_goes_on_where_its_files_moved_and_not_with_others(tmp_path: Path, caplog: Any) -> None:
    a, b = (write(tmp_path / name, TEXTS) / "a.txt" for name in "ab")
    report = report_of(recipe_of(a))
    before = spec_digest("needle", needle_spec(recipe_of(a), report), {})
    moved = follow_moves(recipe_of(b), report, ContentHashes())
    assert moved.pins["needle.haystack"].place == (str(b),)
    after = needle_spec(recipe_of(b), moved)
    assert spec_digest("needle", after, {}) == before
    check_pins(after, ContentHashes())
    b.write_text("other")
    with pytest.raises(UserError, match=r"needle\.haystack is .*b/a\.txt, whose content differs"):
        follow_moves(recipe_of(b), report, ContentHashes())
    gone = follow_moves(recipe_of(tmp_path / "gone" / "a.txt"), report, ContentHashes())
    assert gone.pins == report.pins
    assert "keeps the pin of the plan" in caplog.text
    with pytest.raises(UserError, match=r"needle\.haystack: no file matches"):
        follow_moves(recipe_of(tmp_path / "gone" / "b.txt"), report, ContentHashes())


@pytest.mark.usefixtures("cache")
def test_another_teacher_of_the_hub_is_no_move(tmp_path: Path) -> None:
    text = write(tmp_path, TEXTS) / "a.txt"
    report = report_of(recipe_of(text))
    for change in ({"path": "other/model"}, {"revision": LATER}):
        with pytest.raises(UserError, match=r"teacher\.path"):
            follow_moves(recipe_of(text, **change), report, ContentHashes())


def test_hub_data_is_read_at_the_commit_that_was_pinned(tmp_path: Path) -> None:
    recipe = recipe_of(write(tmp_path, TEXTS) / "a.txt")
    report = report_of(recipe)
    spec = tokenize_spec(recipe, report, "train")
    assert spec.dataset.sources[0].revision == COMMIT  # type: ignore[union-attr]
    other = report.pins["data.train.sources.0.path"].model_copy(update={"content": f"hub:dataset@{LATER}"})
    later = report.model_copy(update={"pins": report.pins | {"data.train.sources.0.path": other}})
    assert spec_digest("tokenize", tokenize_spec(recipe, later, "train"), {}) != spec_digest("tokenize", spec, {})
    again = at_pinned_commits(recipe, report.pins)
    assert again.teacher is not None
    assert (again.teacher.revision, again.data["train"].sources[0].revision) == (COMMIT, COMMIT)  # type: ignore[union-attr]


def test_the_commits_that_a_task_reads_are_named(tmp_path: Path) -> None:
    recipe = recipe_of(write(tmp_path, TEXTS) / "a.txt")
    report = report_of(recipe)
    digests = set()
    for commit in (COMMIT, LATER):
        pin = report.pins["evaluate.tasks.0.path"].model_copy(update={"commits": {"org/arc": commit}})
        changed = report.model_copy(update={"pins": report.pins | {"evaluate.tasks.0.path": pin}})
        digests.add(spec_digest("evaluate", evaluate_spec(recipe, changed), {}))
    assert len(digests) == 2


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's local cache, and no connection."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_without_a_connection_the_cache_says_which_commit_it_is(cache: Path, kind: Any, caplog: Any) -> None:
    write(cache / f"{kind}s--org--name", {"refs/main": COMMIT, "refs/v2": LATER})
    assert hub_commit("org/name", None, kind) == COMMIT
    assert hub_commit("org/name", "v2", kind) == LATER
    assert COMMIT in caplog.text
    assert hub_commit("org/unknown", LATER, kind) == LATER, "a commit is a commit"
    (cache / f"{kind}s--org--fetched" / "snapshots" / LATER).mkdir(parents=True)
    assert hub_commit("org/fetched", None, kind) == LATER
    (cache / f"{kind}s--org--fetched" / "snapshots" / COMMIT).mkdir()
    with pytest.raises(UserError, match="has no commit for"):
        hub_commit("org/fetched", None, kind)
    for repo, revision in (("org/unknown", None), ("org/name", "v3")):
        with pytest.raises(UserError, match="pin one with `revision: <commit>`") as raised:
            hub_commit(repo, revision, kind)
        assert len(str(raised.value).splitlines()) == 1


def test_with_a_connection_the_hub_says_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(cache / "datasets--org--name", {"refs/main": COMMIT})

    class Info:
        sha = LATER

    monkeypatch.setattr(HfApi, "dataset_info", lambda self, repo, revision: Info)
    assert hub_commit("org/name", None, "dataset") == LATER
    reading = next(readings(tokenize_of({"kind": "hub", "path": "org/name"})))
    assert pin_place(reading, ContentHashes()).content == f"hub:org/name@{LATER}"


def test_code_of_the_hub_runs_only_at_a_commit_that_was_named(cache: Path) -> None:
    write(cache / "models--org--name", {"refs/main": COMMIT})
    with pytest.raises(UserError, match=f"revision: {COMMIT}"):
        pin_teacher("org/name", trust_remote_code=True)
    assert pin_teacher("org/name", revision=COMMIT, trust_remote_code=True).revision == COMMIT
    assert pin_teacher("org/name").fingerprint == f"hub:org/name@{COMMIT}"


def test_large_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    digest_of = hashlib.file_digest

    def counted(stream: Any, name: str) -> Any:
        read.append(Path(stream.name).name)
        return digest_of(stream, name)

    monkeypatch.setattr(content.hashlib, "file_digest", counted)
    monkeypatch.setattr(content, "_SETTLED_NS", -(10**12))
    large, small, remembered = tmp_path / "large", tmp_path / "small", tmp_path / "work" / "content.json"
    large.write_bytes(bytes(2 << 20))
    small.write_bytes(b"x")
    first = ContentHashes(remembered).of_all([large, small])
    assert ContentHashes(remembered).of_all([large, small]) == first
    assert sorted(read) == ["large", "small", "small"]
    inode = large.stat().st_ino
    change(large)
    assert large.stat().st_ino == inode
    assert ContentHashes(remembered).of(large) == hashlib.sha256(large.read_bytes()).hexdigest() != first[0]
    remembered.write_text('{"torn')
    assert ContentHashes(remembered).of(small) == first[1]


def test_what_was_written_just_now_is_read_again(tmp_path: Path) -> None:
    path, hashes = tmp_path / "x", ContentHashes(tmp_path / "content.json")
    seen = set()
    for number in range(20):
        path.write_bytes(b"%02d" % number)
        seen.add(hashes.of(path))
    assert len(seen) == 20


def test_the_probe_of_a_choice_follows_an_advice_without_a_new_plan(tmp_path: Path) -> None:
    values = {
        "name": "r", "teacher": {"path": "t"}, "align": {"tokens": 64, "context": 8, "batch": 2},
        "data": {"train": {"sources": [{"kind": "sample", "tokens": 9}]}},
    }  # fmt: skip
    haystack = [str(write(tmp_path, TEXTS) / "a.txt")]

    def asked(**probe: Any) -> dict[str, Any]:
        choice = {"count": 1, "choose": "recall", "recall": {"haystack": haystack, **probe}}
        return values | {"student": {"attention_layers": choice}}

    recipe = parse_recipe(asked())
    report = report_of(recipe).model_copy(update={"choice": recipe.student.attention_layers})
    smaller = choose_spec(parse_recipe(asked(micro_batch=2)), report)
    assert smaller is not None
    assert smaller.section.recall.micro_batch == 2
    before = choose_spec(recipe, report)
    assert before is not None
    assert spec_digest("choose", smaller, {}) == spec_digest("choose", before, {})
