"""Checkpoints under OpenMOSE's names: told apart, loaded, written back bit for bit, refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from radlads.model.weights.openmose import inspect_openmose
from radlads.model.weights.openmose_weights import export_openmose, load_openmose, openmose_tensors
from radlads.tasks.contracts.errors import UserError

FAITHFUL = {"key_scaling": "log_log_decay"}
# Variant, options that the names do not tell, architecture as its author would say it where he must.
CASES = [
    ("hxa079", FAITHFUL, None),
    ("hxa079", {}, "hxa07d"),
    ("cxa073", {}, "cxa074"),
    ("cxa075", {}, "cxa075"),
    ("hxa07a", FAITHFUL, None),
    ("hxa07b", FAITHFUL, "hxa07b"),
    ("hxa07c", {}, "hxa07c"),
    ("rwkv7", {"gate": False}, None),
    ("rwkv7", {"group_norm": False}, None),
]


def blocks_layout(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of RWKV-Infer's .pth files, vectors without their leading ones."""
    changes = {
        "model.embed_tokens.weight": "emb.weight",
        "model.norm.weight": "ln_out.weight",
        "lm_head.weight": "head.weight",
        "model.layers.": "blocks.",
        ".self_attn.r_norm": ".att.ln_r",
        ".self_attn.k_norm": ".att.ln_k",
        ".self_attn.": ".att.",
        ".input_layernorm.": ".ln1.",
        ".post_attention_layernorm.": ".ln2.",
        ".mlp.": ".ffn.",
        "_proj.": ".",
    }
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in changes.items():
            name = name.replace(old, new)
        renamed[name] = tensor.flatten() if tensor.dim() == 3 else tensor
    return renamed


def save(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("variant", "options", "architecture"), CASES, ids=str)
def test_round_trip(make_teacher, make_student, tokens, tmp_path: Path, variant, options, architecture) -> None:
    teacher = make_teacher("qwen3" if variant.startswith("hxa") else "llama")
    student = make_student(teacher, variant=variant, options=options)
    export_openmose(student, tmp_path / "theirs", max_shard_bytes=60_000)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    loaded = load_openmose(tmp_path / "theirs", teacher.config, architecture=architecture)
    assert (loaded.config.variant, loaded.dtype, loaded.training) == (variant, torch.float32, False)
    assert loaded.config.options["decay_rank"] == student.config.options["decay_rank"]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, student(tokens).logits)
    again = dict(openmose_tensors(loaded))
    for path in (tmp_path / "theirs").glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert torch.equal(again.pop(name), tensor), name
    assert not again


def test_names_are_theirs(make_teacher, make_student) -> None:
    student = make_student(make_teacher("qwen3"), variant="hxa079", attention_layers=(1,))
    held = dict(openmose_tensors(student, marker=True))
    recurrent = {name.removeprefix("model.layers.2.self_attn.") for name in held if ".2.self_attn." in name}
    assert recurrent == set(
        "receptance.weight key.weight value.weight output.weight r_norm.weight k_norm.weight w0 w1 w2 a0 a1 a2 "
        "v0 v1 v2 k0 k1 k2 g1 g2 r_k layer_architecture".split()
    )
    assert held["model.layers.2.self_attn.layer_architecture"] == 78
    assert "model.layers.1.self_attn.q_proj.weight" in held
    assert "model.layers.1.self_attn.layer_architecture" not in held
    assert held["model.layers.2.self_attn.k2"].shape == (32, 32)
    assert held["model.layers.2.self_attn.r_k"].shape == (4, 16)


def test_hybrid_with_what_a_real_file_has_too_much(make_teacher, make_student, tokens, tmp_path: Path) -> None:
    """A residual of the first layer to itself, never trained, and markers."""
    teacher = make_teacher("llama", tie_word_embeddings=True)
    student = make_student(teacher, variant="hxa079", options=FAITHFUL, attention_layers=(1,))
    held = dict(openmose_tensors(student, marker=True))
    held |= {f"model.layers.0.self_attn.{name}": torch.full((1, 1, 32), torch.nan) for name in ("v0", "k0")}
    folder = save(held, tmp_path / "theirs")
    loaded = load_openmose(folder, teacher.config)
    assert loaded.config.attention_layers == [1]
    assert not loaded.config.attention_rope
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, student(tokens).logits)
    held["lm_head.weight"] = held["model.embed_tokens.weight"] + 1
    untied = load_openmose(save(held, tmp_path / "untied"), teacher.config, dtype=torch.bfloat16, rope=False)
    assert not untied.config.tie_word_embeddings
    assert not untied.config.options["rope"]
    assert torch.equal(untied.lm_head.weight, held["lm_head.weight"].bfloat16())


def test_first_values_of_a_kept_first_layer_have_no_names_there(make_teacher, make_student, tmp_path: Path) -> None:
    teacher = make_teacher("llama")
    student = make_student(teacher, variant="hxa079", options=FAITHFUL, attention_layers=(0,))
    with pytest.raises(UserError, match="this student from layer 0, which is softmax attention"):
        list(openmose_tensors(student))
    student.config.first_values = "first_mixer"
    folder = save(dict(openmose_tensors(student)), tmp_path / "theirs")
    assert load_openmose(folder, teacher.config).config.first_values == "first_mixer"


def test_what_the_folder_says_of_itself_counts(make_teacher, make_student, tmp_path: Path) -> None:
    teacher = make_teacher("llama")
    student = make_student(teacher, variant="hxa07c", attention_layers=(1,))
    folder = save(dict(openmose_tensors(student)), tmp_path / "theirs")
    with pytest.raises(UserError, match="say which"):
        load_openmose(folder, teacher.config)
    config = {"rwkv_architecture": "hxa07c", "nope_in_rwkv": True, "nope_in_transformer": False}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    loaded = load_openmose(folder, teacher.config)
    assert (loaded.config.variant, loaded.config.options["rope"], loaded.config.attention_rope) == (
        "hxa07c",
        False,
        True,
    )
    said = load_openmose(folder, teacher.config, architecture="hxa07b", rope=True, attention_rope=False)
    assert (said.config.variant, said.config.options["rope"], said.config.attention_rope) == ("hxa07b", True, False)
    assert said.config.options["key_scaling"] == "log_log_decay"
    (folder / "config.json").write_text("[", encoding="utf-8")
    with pytest.raises(UserError, match="no JSON object"):
        load_openmose(folder, teacher.config)


def test_the_layout_of_pth_files(make_teacher, make_student, tokens, tmp_path: Path) -> None:
    teacher = make_teacher("qwen3")
    student = make_student(teacher, variant="hxa079", options=FAITHFUL)
    held = blocks_layout(dict(openmose_tensors(student)))
    assert {"blocks.1.att.receptance.weight", "blocks.1.att.ln_r.weight", "blocks.1.ffn.gate.weight"} <= held.keys()
    loaded = load_openmose(save(held, tmp_path / "theirs"), teacher.config)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, student(tokens).logits)


def layer(*parts: str, number: int = 0) -> dict[str, tuple[int, ...]]:
    names = ["receptance.weight", *parts]
    return {f"model.layers.{number}.self_attn.{name}": (64, 32) for name in names}


LOW_RANK = ("w0", "w1", "w2", "a0", "a1", "a2")


@pytest.mark.parametrize(
    ("shapes", "architecture", "message"),
    [
        ({"model.layers.0.self_attn.q_proj.weight": (4, 4)}, None, "nothing of it is converted"),
        ({"wte.weight": (4, 4)}, None, "not a checkpoint of OpenMOSE's"),
        (layer(*LOW_RANK, number=1), None, "a shard is missing"),
        ({"model.layers.0.self_attn.w0": (4,)}, None, "neither q_proj nor receptance"),
        (layer(*LOW_RANK, "v1", "v2"), None, "hxa07b or hxa07c"),
        (layer(*LOW_RANK, "k_k", "k_a", "r_k", "g1"), None, "cxa075 or cxa070"),
        (layer(*LOW_RANK, "k_k", "k_a", "r_k", "g1", "ln_x.weight"), None, "both gate and GroupNorm"),
        (layer(*LOW_RANK, "v0", "v1", "r_k", "g1"), None, "cxa076, cxa077, cxa078 or hxa07e"),
        (layer(*LOW_RANK, "k0", "r_k", "g1"), "hxa07a", "but the tensors are those of hxa079"),
        (layer(*LOW_RANK, "k0", "r_k", "g1"), "hxa07i", "no mixer here for the architecture 'hxa07i'"),
    ],
    ids=str,
)
def test_what_cannot_be_told_is_refused(shapes, architecture, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        inspect_openmose(shapes, architecture=architecture)
    assert "\n" not in str(caught.value)


def test_tensors_that_do_not_fit_are_refused(make_teacher, make_student, tmp_path: Path) -> None:
    teacher = make_teacher("llama")
    held = dict(openmose_tensors(make_student(teacher, variant="cxa073")))
    key = "model.layers.1.self_attn.key.weight"
    for name, change, message in [
        ("missing", {key: None}, "lacks 1 tensors of cxa073, first model.layers.1.self_attn.k_proj.weight"),
        ("extra", {"model.layers.1.self_attn.z9": torch.ones(2)}, "z9' has no place in a cxa073 student"),
        ("shape", {key: torch.ones(3, 32)}, r"is \(3, 32\) in the checkpoint and \(32, 32\) in the student"),
        ("short", {n: None for n in held if ".layers.2." in n}, "has 2 layers, its teacher 3"),
    ]:
        changed = {n: t for n, t in {**held, **change}.items() if t is not None}
        with pytest.raises(UserError, match=message):
            load_openmose(save(changed, tmp_path / name), teacher.config)
    with pytest.raises(UserError, match="has no norms of r and k"):
        load_openmose(save(held, tmp_path / "norms"), make_teacher("qwen3").config)


def test_what_has_no_such_names_is_not_written(make_teacher, make_student) -> None:
    teacher = make_teacher("llama")
    with pytest.raises(UserError, match="RADLADS's own mixer"):
        list(openmose_tensors(make_student(teacher, variant="rad_rwkv6")))
    with pytest.raises(UserError, match="marker of hxa07c is not known"):
        list(openmose_tensors(make_student(teacher, variant="hxa07c"), marker=True))
