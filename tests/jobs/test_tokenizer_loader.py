"""A tokenizer is of the class that it names, or is refused; every stage loads it in the one way."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.sections import Dataset, Student
from radlads.tasks.contracts.specs import TokenizeSpec, TransplantSpec
from radlads.tasks.jobs import transplant
from radlads.tasks.jobs.data import tokens
from radlads.tasks.jobs.report.publish import copy_model
from radlads.tasks.jobs.sources import load_tokenizer, pin_teacher

# Splits letters one by one, as its tokenizer.json alone would not.
OWN_CODE = """
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        letters = pre_tokenizers.Split(Regex("."), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([letters, level])
"""
TEXT = "Once upon a time"


@pytest.fixture
def own(tmp_path: Path, teacher_folder: Path) -> Callable[..., Path]:
    """own(key=value of tokenizer_config.json) → a teacher's folder whose tokenizer brings its own code."""

    def make(name: str = "own", **changes: Any) -> Path:
        folder = shutil.copytree(teacher_folder, tmp_path / name)
        path = folder / "tokenizer_config.json"
        mapped = {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]},
        }
        config = json.loads(path.read_text()) | mapped | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
        (folder / "own_tokenizer.py").write_text(OWN_CODE)
        return folder

    return make


def test_a_class_of_its_own_is_never_replaced_without_a_word(own: Any) -> None:
    folder = str(own())
    with pytest.raises(UserError, match=r"a class of its own \(OwnTokenizer\).*trust_remote_code") as raised:
        load_tokenizer(folder)
    assert len(str(raised.value).splitlines()) == 1
    tokenizer = load_tokenizer(folder, trust_remote_code=True)
    assert type(tokenizer).__name__ == "OwnTokenizer"
    assert len(tokenizer(TEXT)["input_ids"]) == len(TEXT)


@pytest.mark.parametrize(
    ("changes", "trusted", "words"),
    [
        ({"auto_map": None}, False, r"names a class that transformers does not have \(OwnTokenizer\)"),
        ({"auto_map": None}, True, r"names a class that transformers does not have \(OwnTokenizer\)"),
        ({"tokenizer_class": None}, False, "a class of its own"),
        ({"auto_map": ["other/repo--code.OwnTokenizer", None]}, True, r"another repository \(other/repo\)"),
    ],
)
def test_what_cannot_be_had_is_refused(own: Any, changes: dict[str, Any], trusted: bool, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_tokenizer(str(own(**changes)), trust_remote_code=trusted)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", ""),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"added_tokens": [], "model": {"type": "BPE"}}'),  # a bare Exception of the library
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
        ("special_tokens_map.json", "3"),
    ],
)
def test_damaged_files_end_in_one_line(tmp_path: Path, teacher_folder: Path, name: str, text: str) -> None:
    folder = shutil.copytree(teacher_folder, tmp_path / "damaged")
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=r"^no usable tokenizer in .*/damaged: .*$"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path, family: str) -> None:
    """For Qwen's, transformers makes one that knows no word and turns every text into nothing."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(UserError, match=r"has no vocabulary|no usable tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2TokenizerFast", None])
def test_classes_that_transformers_has_are_as_ever(own: Any, named: str | None, teacher_folder: Path) -> None:
    ours = load_tokenizer(str(own(tokenizer_class=named, auto_map=None)))
    assert ours(TEXT)["input_ids"] == load_tokenizer(str(teacher_folder))(TEXT)["input_ids"]


def test_the_code_is_part_of_the_content(own: Any) -> None:
    folder = own()
    before = pin_teacher(str(folder), trust_remote_code=True)
    (folder / "own_tokenizer.py").write_text(OWN_CODE + "\n")
    after = pin_teacher(str(folder), trust_remote_code=True)
    assert before.tokenizer_fingerprint != after.tokenizer_fingerprint
    assert before.fingerprint != after.fingerprint


def test_every_stage_takes_the_same_tokenizer(
    own: Any, make_job: Any, run_main: Any, stories: list[str], tmp_path: Path
) -> None:
    teacher = pin_teacher(str(own()), trust_remote_code=True)
    (tmp_path / "a.txt").write_text("\n---\n".join(stories[:40]))
    source = {"kind": "files", "paths": [str(tmp_path / "a.txt")], "separator": "\n---\n"}
    spec = TokenizeSpec(
        name="train",
        dataset=Dataset.model_validate({"sources": [source], "heldout_fraction": 0.2}),
        tokenizer=teacher.path,
        tokenizer_fingerprint=teacher.tokenizer_fingerprint,
        trust_remote_code=True,
        teacher=None,
    )
    found = run_main(tokens.main, make_job("tokenize", spec)).metrics
    assert found["train_tokens"] + found["heldout_tokens"] == sum(len(s.encode()) + 1 for s in stories[:40])
    job = make_job("transplant", TransplantSpec(teacher=teacher, student=Student()))
    run_main(transplant.main, job)
    student = Path(job.spec.output_uri) / "model"
    with pytest.raises(UserError, match="trust_remote_code"):
        load_tokenizer(str(student))
    assert len(load_tokenizer(str(student), trust_remote_code=True)(TEXT)["input_ids"]) == len(TEXT)

    class Products:
        final = type("Final", (), {"manifest": type("Manifest", (), {"stage": "transplant"})})

        def fetch_model(self, into: Path) -> Path:
            return student

    copy_model(Products(), tmp_path / "scratch", tmp_path / "published", 10_000, trust_remote_code=True)  # type: ignore[arg-type]
    published = load_tokenizer(str(tmp_path / "published"), trust_remote_code=True)
    assert len(published(TEXT)["input_ids"]) == len(TEXT)


def test_there_is_one_way_to_load_a_tokenizer(project_root: Path) -> None:
    calls = []
    for path in (p for folder in ("model", "tasks", "flows") for p in (project_root / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "from_pretrained" and isinstance(node.value, ast.Name):
                calls += [path.name] if "Tokenizer" in node.value.id else []
    assert calls == ["sources.py"]
