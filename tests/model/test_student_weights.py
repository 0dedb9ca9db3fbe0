"""Students' weights, read and written: whole, of one set, in full precision and finite, or one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from radlads.model.student.export import export_student
from radlads.model.student.load import load_student
from radlads.model.training.calibration import calibrate
from radlads.model.training.lora import add_lora, merge_lora
from radlads.model.training.quantized import quantize_frozen
from radlads.tasks.contracts.errors import UserError

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"
Damage = Callable[[Path], Any]


def change(folder: Path, **tensors: Any) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()} | tensors
    save_file(
        {name: tensor for name, tensor in weights.items() if tensor is not None}, folder / WEIGHTS, {"format": "pt"}
    )


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])


def second_set(folder: Path) -> None:
    names = load_file(folder / WEIGHTS)
    save_file(names, folder / "model-00001-of-00001.safetensors")
    placed = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "is no whole safetensors file: .* does not fit in it"),
        (second_set, "holds two sets of weights"),
        (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "pickled weights are never read"),
        (lambda f: (f / WEIGHTS).unlink(), "lacks model.safetensors"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "a PEFT adapter"),
        (lambda f: change(f, **{UP: None}), "does not fit its config: missing keys: .*up_proj"),
        (lambda f: change(f, **{UP: torch.ones(2)}), "does not fit its config: mismatched keys: .*up_proj"),
        (lambda f: change(f, more=torch.ones(2)), "does not fit its config: unexpected keys: .'more'"),
        (lambda f: change(f, **{UP: torch.ones(48, 32).char()}), f"its tensor {UP} is kept as I8: .*quantised"),
        (lambda f: change(f, **{UP: torch.full((48, 32), torch.nan)}), f"its tensor {UP} has 1536 values that are not"),
        (lambda f: change_config(f, tie_word_embeddings=True), "tie_word_embeddings is true, but it has a head of its"),
        (lambda f: change_config(f, transformers_weights="x.safetensors"), "transformers_weights: .x.safetensors"),
        (lambda f: (f / "config.json").write_text("{"), "cannot read .*config.json: JSONDecodeError"),
        (lambda f: (f / "config.json").write_text("[]"), "holds a 'None' model, not an exported student"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "cannot read .*config.json: UnicodeDecodeError"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: change_config(f, teacher={"model_type": "qwen3"}), "cannot read .*config.json: KeyError"),
    ],
)
def test_damaged_students_are_refused(
    make_teacher: Any, make_student: Any, tmp_path: Path, damage: Damage, words: str
) -> None:
    export_student(make_student(make_teacher("qwen3")), None, tmp_path)
    load_student(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        load_student(tmp_path)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_a_student_with_bad_values_is_not_written(make_teacher: Any, make_student: Any, tmp_path: Path) -> None:
    student = make_student(make_teacher("llama"))
    student.get_parameter(UP)[0, :3] = torch.inf
    with pytest.raises(UserError, match=f"^the student's tensor {UP} has 3 values that are not finite; no model was"):
        export_student(student, None, tmp_path)
    assert not (tmp_path / WEIGHTS).exists()


@torch.no_grad()
def test_a_merge_that_overflows_is_named(make_teacher: Any, make_student: Any) -> None:
    student = make_student(make_teacher("llama"))
    add_lora(student, SimpleNamespace(targets=("up_proj",), rank=2, scale=1e3))
    student.get_submodule("model.layers.1.mlp.up_proj").lora_b.fill_(1e38)
    with pytest.raises(UserError, match=r"^model.layers.1.mlp.up_proj.weight, merged with its low-rank update, has \d"):
        merge_lora(student, student.state_dict().__getitem__)("model.layers.1.mlp.up_proj.weight")


@torch.no_grad()
def test_what_is_held_in_8_bit_is_finite(make_teacher: Any) -> None:
    teacher = make_teacher("llama")
    teacher.get_parameter(UP)[1, 1] = -torch.inf
    with pytest.raises(UserError, match=f"^{UP}, which is to be held in 8 bit, has 1 value that"):
        quantize_frozen(teacher, 8, lambda name: ".mlp." in name)


@torch.no_grad()
def test_a_calibration_that_is_not_finite_is_named(make_teacher: Any, make_student: Any, tokens: Any) -> None:
    teacher = make_teacher("qwen3")
    student = make_student(teacher)
    calibrate(student, teacher, [tokens], parts=("gate",))
    teacher.model.layers[1].input_layernorm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match=r"of layer 1, calibrated by its gate, has \d+ values that are not finite"):
        calibrate(student, teacher, [tokens], parts=("gate",))
