"""The commands around OpenMOSE's weight files, from the words that are typed to the folder that is made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from radlads.model.student.load import load_student
from radlads.model.weights.openmose_weights import openmose_tensors


def typed(*words: str | Path, home: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "radlads.flows.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=home)


@pytest.fixture
def weights(make_teacher, make_student, tmp_path: Path):
    """A student of the teacher in `exported`, and its tensors under OpenMOSE's names in a folder."""
    student = make_student(make_teacher("qwen3", tie_word_embeddings=True), variant="hxa07c", attention_layers=(1,))
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file({name: t.contiguous() for name, t in openmose_tensors(student)}, folder / "model.safetensors")
    return student, folder


@torch.no_grad()
def test_there_and_back(weights, exported, tokens, tmp_path: Path) -> None:
    student, folder = weights
    words = ["import-openmose", folder, "--teacher", exported["teacher"], "--out", "made", "--variant", "hxa07c"]
    done = typed(*words, home=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    loaded = load_student(tmp_path / "made")
    assert torch.equal(loaded(tokens).logits, student(tokens).logits)
    config = json.loads((tmp_path / "made/config.json").read_text(encoding="utf-8"))
    assert config["converted_from"]["teacher"] != config["converted_from"]["tokenizer"]
    assert (tmp_path / "made/tokenizer.json").is_file()
    done = typed("export-openmose", "made", "--out", "again", home=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, again = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_mistakes_end_in_one_line(weights, exported, tmp_path: Path) -> None:
    _, folder = weights
    teacher = ["--teacher", exported["teacher"]]
    for words, said in (
        (["import-openmose", "nowhere", *teacher, "--out", "made"], "error: nowhere is not a folder"),
        (["import-openmose", folder, *teacher, "--out", folder], "exists already"),
        (["export-openmose", exported["hybrid"], "--out", "made"], "OpenMOSE has no names for it"),
    ):
        done = typed(*words, home=tmp_path)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "made").exists()
        assert not list(tmp_path.glob(".made*"))
