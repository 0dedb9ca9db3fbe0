"""From a checkpoint's files into the student's: the same as between loaded models, in little memory, total, seeded."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from radlads.model.convert.transplant import TransplantReport, stream_transplant, transplant
from radlads.model.student.export import export_papers
from radlads.model.student.load import RadladsForCausalLM, build_student, load_student
from radlads.model.teacher.load import list_families, load_teacher, load_teacher_config
from radlads.model.teacher.weights import open_teacher_weights
from radlads.tasks.contracts.errors import UserError

SETTINGS: dict[str, Any] = {
    "variant": "rad_rwkv7",
    "options": {},
    "attention_layers": (1,),
    "attention_rope": False,
}
SEED = 7
Streamed = tuple[Path, TransplantReport, RadladsForCausalLM]


@pytest.fixture
def stream(tmp_path: Path) -> Callable[..., Streamed]:
    """stream(teacher folder) → the student's folder, the report, the student on the meta device."""

    def run(teacher: Path, *, name: str = "student", dtype: torch.dtype = torch.float32, **more: Any) -> Streamed:
        config = load_teacher_config(str(teacher))
        given = {**SETTINGS, **{key: more.pop(key) for key in list(more) if key in (*SETTINGS, "untie_embeddings")}}
        with torch.device("meta"):
            student = build_student(config, **given, dtype=dtype)
        folder = tmp_path / name
        weights = open_teacher_weights(str(teacher), config)
        report = stream_transplant(weights, student, folder, dtype=dtype, seed=SEED, **more)
        export_papers(student, None, folder)
        return folder, report, student

    return run


def save(teacher: PreTrainedModel, folder: Path, shard: int | str = 20_000) -> Path:
    teacher.save_pretrained(folder, max_shard_size=shard)
    return folder


def contents(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", list_families())
def test_streaming_is_copying_between_loaded_models(
    make_teacher, stream, tmp_path: Path, model_type: str, tied: bool
) -> None:
    teacher = make_teacher(model_type, tie_word_embeddings=tied)
    source = save(teacher, tmp_path / "teacher")
    assert len(list(source.glob("*.safetensors"))) > 2
    folder, report, meta = stream(source, max_shard_bytes=15_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    student = build_student(teacher.config, **SETTINGS)
    assert transplant(load_teacher(str(source)), student) == report
    state = load_student(folder).state_dict()
    assert state.keys() == student.state_dict().keys() == meta.state_dict().keys()
    assert set(report.copied) | set(report.fresh) | set(report.tied) == state.keys()
    for name in (*report.copied, *report.tied):
        assert torch.equal(state[name], student.state_dict()[name]), name
    assert report.dropped == ()
    assert report.tied == (("lm_head.weight",) if tied else ())


def test_nothing_depends_on_how_files_are_cut(make_teacher, stream, tmp_path: Path) -> None:
    teacher = make_teacher("qwen3")
    coarse, fine = save(teacher, tmp_path / "coarse", "1GB"), save(teacher, tmp_path / "fine", 9_000)
    one, _, _ = stream(coarse, name="one")
    torch.manual_seed(123)
    torch.randn(5)
    state = torch.get_rng_state()
    many, _, _ = stream(fine, name="many", max_shard_bytes=5_000)
    assert torch.equal(torch.get_rng_state(), state)
    first, second = contents(one), contents(many)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fresh_tensors_are_what_the_mixers_start_with(make_teacher, stream, tmp_path: Path, dtype: torch.dtype) -> None:
    folder, report, meta = stream(save(make_teacher("qwen3"), tmp_path / "teacher"), dtype=dtype)
    state = contents(folder)
    shapes = {layer: mixer.shape for layer, mixer in meta.mixers().items()}
    seen = 0
    for layer in (0, 2):
        torch.manual_seed(SEED + layer)
        torch.set_default_dtype(dtype)
        try:
            mixer = meta.build_mixer(layer, shapes[layer])
        finally:
            torch.set_default_dtype(torch.float32)
        for name, tensor in mixer.state_dict().items():
            full = f"model.layers.{layer}.self_attn.{name}"
            if full in report.fresh:
                seen += 1
                assert torch.equal(state[full], tensor)
    assert seen == len(report.fresh) > 10
    assert not torch.equal(state["model.layers.0.self_attn.w2"], state["model.layers.2.self_attn.w2"])


@pytest.mark.parametrize("model_type", ["qwen2", "phi3"])
def test_multipliers_scale_converted_layers_only(make_teacher, stream, tmp_path: Path, model_type: str) -> None:
    teacher = make_teacher(model_type)
    scale = {"q": 0.5, "k": 0.25, "v": 2.0, "o": 0.125}
    source = save(teacher, tmp_path / "teacher")
    plain, scaled = (contents(stream(source, name=str(i), scale=s)[0]) for i, s in enumerate((None, scale)))
    loaded = build_student(teacher.config, **SETTINGS)
    transplant(teacher, loaded, scale=scale)
    changed = set()
    for name, tensor in plain.items():
        projection = name.split(".")[-2].removesuffix("_proj")
        factor = scale.get(projection, 1.0) if ".layers.1." not in name else 1.0
        assert torch.equal(scaled[name], tensor * factor), name
        if not name.startswith("model.layers") or "_proj" in name:
            assert torch.equal(loaded.state_dict()[name], scaled[name]), name
        changed |= {name} if factor != 1 else set()
    kinds = 4 if model_type == "phi3" else 7  # with biases of q, k and v
    assert len(changed) == 2 * kinds


@pytest.mark.parametrize("loaded", [False, True])
def test_an_untied_student_has_a_head_of_its_own(make_teacher, stream, tmp_path: Path, loaded: bool) -> None:
    teacher = make_teacher("llama", tie_word_embeddings=True)
    source = save(teacher, tmp_path / "teacher")
    if loaded:
        student = build_student(teacher.config, **SETTINGS, untie_embeddings=True)
        report = transplant(teacher, student)
    else:
        folder, report, _ = stream(source, untie_embeddings=True)
        assert "lm_head.weight" in contents(folder)
        student = load_student(folder)
    assert report.tied == ()
    assert "lm_head.weight" in report.copied
    assert not student.config.tie_word_embeddings
    assert student.lm_head.weight is not student.model.embed_tokens.weight
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)
    assert torch.equal(student.model.embed_tokens.weight, teacher.lm_head.weight)


def test_live_bytes_are_counted_once_and_until_the_last_view_goes(live_bytes) -> None:
    with live_bytes() as memory:
        whole = torch.empty(1000)
        part = whole.view(torch.uint8)[:10]
        assert memory.live == 4000
        del whole
        assert memory.live == 4000
        del part
        assert (memory.live, memory.peak) == (0, 4000)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "phi3"])
def test_memory_is_a_tensor_and_a_mixer_whatever_the_depth(
    make_teacher, stream, tmp_path: Path, live_bytes, model_type: str
) -> None:
    peaks = []
    for depth in (4, 12):
        teacher = make_teacher(model_type, num_hidden_layers=depth, hidden_size=64, intermediate_size=160)
        source = save(teacher, tmp_path / f"teacher-{depth}", 100_000)
        del teacher
        gc.collect()
        gc.disable()
        try:
            with live_bytes() as memory:
                folder, report, _ = stream(source, name=f"student-{depth}", attention_layers=(), max_shard_bytes=10**6)
        finally:
            gc.enable()
        state = contents(folder)
        new = sum(state[name].nbytes for name in report.fresh)
        largest_shard = max(path.stat().st_size for path in source.glob("*.safetensors"))
        total = sum(tensor.nbytes for tensor in state.values())
        assert memory.peak <= largest_shard + new
        assert memory.peak < total / 3
        assert memory.live < 1000
        peaks.append(memory.peak)
    assert peaks[0] == peaks[1]


def test_a_transplant_that_was_cut_short_leaves_no_model_and_can_be_repeated(
    make_teacher, stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(make_teacher("llama"), tmp_path / "teacher")
    wanted = contents(stream(source, name="whole", max_shard_bytes=15_000)[0])

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(source, max_shard_bytes=15_000, on_progress=stop)
    assert not list((tmp_path / "student").glob("*.partial"))
    assert not (tmp_path / "student" / "model.safetensors.index.json").exists()
    again = contents(stream(source, max_shard_bytes=25_000)[0])
    assert again.keys() == wanted.keys()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A checkpoint of one file, with other tensors in it."""
    weights = {name: tensor.clone() for name, tensor in contents(folder).items()}
    change(weights)
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w.pop("model.layers.2.mlp.up_proj.weight"), "lacks model.layers.2.mlp.up_proj.weight, which"),
        (
            lambda w: w.update({"model.layers.0.self_attn.sinks": torch.ones(4)}),
            "has .*self_attn.sinks, without a place",
        ),
        (
            lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
            "has .*q_proj.bias, without a place",
        ),
        (lambda w: w.update({"model.norm.weight": torch.ones(33)}), r"model.norm.weight is \(33,\) in the checkpoint"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(
    make_teacher, stream, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], reason: str
) -> None:
    source = rewrite(save(make_teacher("qwen3"), tmp_path / "teacher"), change)
    with pytest.raises(UserError, match=reason):
        stream(source)
    assert not (tmp_path / "student").exists()


def test_stored_frequencies_are_dropped_and_ties_are_checked(make_teacher, stream, tmp_path: Path) -> None:
    source = save(make_teacher("llama", tie_word_embeddings=True), tmp_path / "teacher")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(source, lambda w: w.update({name: torch.ones(8)}))
    rewrite(source, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    _, report, _ = stream(source)
    assert report.dropped == (name,)
    assert report.tied == ("lm_head.weight",)
    rewrite(source, lambda w: w["lm_head.weight"][63].add_(1))
    with pytest.raises(UserError, match=r"ties lm_head.weight, but the teacher's own tensors differ"):
        stream(source)
    # The config says another network than the weights, whatever the student's head is.
    with pytest.raises(UserError, match=r"ties lm_head.weight, but the teacher's own tensors differ"):
        stream(source, untie_embeddings=True)
    with pytest.raises(UserError, match=r"ties lm_head.weight, but the teacher's own tensors differ"):
        load_teacher(str(source))


def test_incomplete_experts_are_refused(make_teacher, stream, tmp_path: Path) -> None:
    source = save(make_teacher("qwen3_moe"), tmp_path / "teacher")
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in contents(source)
    rewrite(source, lambda w: w.pop("model.layers.0.mlp.experts.3.up_proj.weight"))
    with pytest.raises(UserError, match=r"experts model.layers.0.mlp.experts.gate_up_proj are incomplete"):
        stream(source)


def test_experts_may_be_stacked_on_disk_already(make_teacher, stream, tmp_path: Path) -> None:
    teacher = make_teacher("qwen3_moe")
    source = save(teacher, tmp_path / "teacher")
    wanted = contents(stream(source, name="one")[0])
    for path in (*source.glob("*.safetensors"), *source.glob("*.index.json")):
        path.unlink()
    save_file({name: t.clone() for name, t in teacher.state_dict().items()}, source / "model.safetensors")
    found = contents(stream(source, name="other")[0])
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "qwen3_vl", "qwen2_5_vl"])
def test_text_parts_stream_without_their_pictures(
    make_vision_language, stream, tokens: Tensor, tmp_path: Path, model_type: str, tied: bool
) -> None:
    whole = make_vision_language(model_type, tied)
    source = save(whole, tmp_path / "teacher")
    folder, report, _ = stream(source, attention_layers=(0, 1), attention_rope=True)
    assert report.dropped
    assert all("visual" in name for name in report.dropped)
    student = load_student(folder)
    with torch.no_grad():
        assert torch.equal(student(tokens).logits, load_teacher(str(source))(tokens).logits)
    assert json.loads((folder / "config.json").read_text())["teacher"]["text_part_of"] == model_type
