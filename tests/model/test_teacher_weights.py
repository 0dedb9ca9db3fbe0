"""A checkpoint beside its config: complete, in shape, in full precision and finite, whoever reads it, or one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from radlads.model.convert.transplant import stream_transplant, trace_origins, transplant
from radlads.model.student.load import build_student
from radlads.model.teacher.load import list_families, load_teacher, load_teacher_config
from radlads.model.teacher.weights import open_teacher_weights
from radlads.model.weights.finite import check_finite, is_finite
from radlads.tasks.contracts.errors import UserError

Change = Callable[[dict[str, Tensor]], Any]
Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.2.mlp.up_proj.weight"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def change_weights(folder: Path, change: Change) -> None:
    """Write a checkpoint of one file anew, changed."""
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def read_in_every_way(folder: Path, tmp_path: Path) -> None:
    """Streamed into a student, then loaded as the teacher."""
    stream(folder, tmp_path / "student")
    load_teacher(str(folder))


def stream(folder: Path, student_folder: Path, **settings: Any) -> None:
    config = load_teacher_config(str(folder))
    weights = open_teacher_weights(str(folder), config)
    given = {"variant": "rad_rwkv7", "options": {}, "attention_layers": (1,), "attention_rope": False, **settings}
    with torch.device("meta"):
        student = build_student(config, **given, dtype=weights.dtype)
    stream_transplant(weights, student, student_folder, dtype=weights.dtype, seed=1)


def refused(folder: Path, tmp_path: Path, words: str, *, by_headers: bool) -> None:
    """By whoever reads it; by_headers: before a number is read, so that the plan says it."""
    config = load_teacher_config(str(folder))
    ways: list[Callable[[], Any]] = [lambda: load_teacher(str(folder)), lambda: stream(folder, tmp_path / "student")]
    if by_headers:
        ways.append(lambda: open_teacher_weights(str(folder), config, download=False))
    else:
        open_teacher_weights(str(folder), config, download=False)
    for way in ways:
        with pytest.raises(UserError, match=words) as caught:
            way()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
    if by_headers:
        assert not (tmp_path / "student").exists()


@pytest.fixture
def saved(make_teacher, tmp_path: Path) -> Callable[..., Path]:
    """saved(model type, ...) → the folder of a teacher in one file."""

    def save(model_type: str = "qwen3", **changes: Any) -> Path:
        folder = tmp_path / f"teacher-{len(list(tmp_path.iterdir()))}"
        make_teacher(model_type, **changes).save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", list_families())
def test_a_teacher_is_what_transformers_loads(saved, model_type: str, tied: bool) -> None:
    folder = saved(model_type, tie_word_embeddings=tied)
    GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=[2, 5]).save_pretrained(folder)
    for dtype in (None, torch.bfloat16):
        ours = load_teacher(str(folder), dtype=dtype)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
        assert type(ours) is type(theirs)
        assert ours.dtype == theirs.dtype
        wanted = theirs.state_dict()
        assert ours.state_dict().keys() == wanted.keys()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in ours.state_dict().items())
        buffers = dict(theirs.named_buffers())
        assert all(torch.equal(tensor, buffers[name]) for name, tensor in ours.named_buffers())
        assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
        assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
        assert ours.config._attn_implementation == theirs.config._attn_implementation


@pytest.mark.parametrize("model_type", list_families())
def test_no_tensor_of_a_family_may_be_missing(saved, tmp_path: Path, model_type: str) -> None:
    """Each name once: what is the same in every layer is tried in one."""
    folder = saved(model_type, attention_bias=True)
    weights = load_file(folder / "model.safetensors")
    tried = [name for name in weights if ".layers." not in name or ".layers.1." in name]
    assert any(name.endswith("o_proj.weight") for name in tried)
    config = load_teacher_config(str(folder))
    for name in tried:
        save_file({n: t for n, t in weights.items() if n != name}, folder / "model.safetensors")
        for read in (
            lambda: load_teacher(str(folder)),
            lambda: open_teacher_weights(str(folder), config, download=False),
        ):
            with pytest.raises(UserError, match=r"lacks|experts .* are incomplete|experts.* is \(3, ") as caught:
                read()
            shown = name.partition(".experts.")[0]
            assert shown in str(caught.value), name


def test_a_missing_projection_is_never_made_up(saved, tmp_path: Path) -> None:
    folder = saved()
    change_weights(folder, lambda w: w.pop(Q))
    refused(folder, tmp_path, f"lacks {Q}, which its config asks for", by_headers=True)
    change_weights(folder, lambda w: w.pop(UP))
    refused(folder, tmp_path, f"lacks 2 tensors, first {Q}, which", by_headers=True)


@pytest.mark.parametrize("name", ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "q_norm.weight"])
def test_fresh_is_only_what_the_variant_adds(make_teacher, name: str) -> None:
    teacher = make_teacher("qwen3")
    student = build_student(
        teacher.config, variant="rad_rwkv7", options={}, attention_layers=(1,), attention_rope=False
    )
    shapes = {key: tensor.shape for key, tensor in teacher.state_dict().items()}
    full = f"model.layers.2.self_attn.{name}"
    del shapes[full]
    with pytest.raises(UserError, match=rf"without a source: \['{full}'\]"):
        trace_origins(student, shapes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop(HEAD), f"lacks {HEAD}.*set tie_word_embeddings: true"),
        (lambda w: w.update({EMBEDDINGS: torch.ones(70, 32)}), r"is \(70, 32\) in .* and \(64, 32\) .*\(vocab_size\)"),
        (lambda w: w.update({HEAD: torch.ones(63, 32)}), rf"{HEAD} is \(63, 32\) in .*\(vocab_size\); config.json and"),
        (
            lambda w: w.update({Q: torch.ones(32, 64)}),
            r"q_proj.weight is \(32, 64\) in .* and \(64, 32\) by its config",
        ),
        (lambda w: w.update({Q: torch.ones(64 * 32)}), r"q_proj.weight is \(2048,\) in"),
        (lambda w: w.update({Q: torch.tensor(1.0)}), r"q_proj.weight is \(\) in"),
        (
            lambda w: w.update({"model.layers.3.mlp.up_proj.weight": torch.ones(2)}),
            "has model.layers.3.*without a place",
        ),
        (lambda w: w.update({UP: torch.ones(48, 32, dtype=torch.int8)}), "up_proj.weight is kept as I8: .* quantised"),
        (lambda w: w.update({UP: w[UP].to(torch.float8_e4m3fn)}), "kept as F8_E4M3: .* quantised; give the full"),
        (lambda w: w.update({UP + "_scale": torch.ones(1)}), "has .*weight_scale, without a place"),
        (
            lambda w: w.update({UP: torch.ones(48, 16, dtype=torch.uint8)}),
            "kept as U8: the weights are quant",
        ),
        (
            lambda w: w.update({name.removeprefix("model."): w.pop(name) for name in list(w) if name != HEAD}),
            "the names lack the prefix 'model.'",
        ),
        (
            lambda w: w.update({name.replace("model.", "model.language_model."): w.pop(name) for name in list(w)}),
            "lacks 3. tensors, first model.embed_tokens.weight",
        ),
    ],
)
def test_headers_that_do_not_fit_the_config_are_refused(saved, tmp_path: Path, change: Change, words: str) -> None:
    folder = saved()
    change_weights(folder, change)
    refused(folder, tmp_path, words, by_headers=True)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"vocab_size": 60}, r"model.embed_tokens.weight is \(64, 32\) .* and \(60, 32\) by its config \(vocab_size\)"),
        ({"num_hidden_layers": 2, "layer_types": None}, "has 11 tensors, first model.layers.2.*without a place"),
        ({"num_hidden_layers": 4, "layer_types": None}, "lacks 11 tensors, first model.layers.3"),
        ({"num_key_value_heads": 4}, r"k_proj.weight is \(32, 32\) in .* and \(64, 32\) by its config"),
        ({"attention_bias": True}, "lacks 12 tensors, first model.layers.0.self_attn.q_proj.bias"),
        ({"dtype": "float8_e4m3fn"}, "asks for the dtype torch.float8_e4m3fn"),
        ({"dtype": "int8"}, "asks for the dtype torch.int8"),
    ],
)
def test_configs_of_another_model_are_refused(saved, tmp_path: Path, values: dict[str, Any], words: str) -> None:
    folder = saved()
    change_config(folder, **values)
    refused(folder, tmp_path, words, by_headers=True)


def test_layers_without_end_are_not_built(saved, tmp_path: Path) -> None:
    folder = saved("llama")
    change_config(folder, num_hidden_layers=1000)
    refused(folder, tmp_path, "the teacher's config has 1000 layers, its checkpoint 30 tensors", by_headers=True)


def test_weights_that_the_config_places_elsewhere_are_refused(saved) -> None:
    """transformers would read that file, and nobody else."""
    folder = saved()
    change_config(folder, transformers_weights="other.safetensors")
    with pytest.raises(UserError, match=r"names its weights \(transformers_weights: 'other.safetensors'\)"):
        load_teacher(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [UP, Q, "model.norm.weight", EMBEDDINGS])
def test_values_that_are_not_finite_are_named(saved, tmp_path: Path, name: str, value: float) -> None:
    folder = saved()
    change_weights(folder, lambda w: w[name].view(-1)[3:5].fill_(value))
    refused(folder, tmp_path, f"teacher tensor {name} has 2 values that are not finite; .*", by_headers=False)


def test_values_within_fused_and_stacked_tensors_are_named(saved, tmp_path: Path) -> None:
    fused = saved("phi3")
    name = "model.layers.0.self_attn.qkv_proj.weight"
    change_weights(fused, lambda w: w[name][-1].fill_(torch.inf))
    refused(fused, tmp_path, f"teacher tensor {name} has 32 values that are not finite", by_headers=False)
    experts = saved("qwen3_moe")
    change_weights(experts, lambda w: w["model.layers.1.mlp.experts.3.up_proj.weight"][0, :2].fill_(torch.nan))
    refused(experts, tmp_path, "model.layers.1.mlp.experts.gate_up_proj has 2 values that are not", by_headers=False)


def test_a_tied_head_with_bad_values_is_not_called_untied(saved, tmp_path: Path) -> None:
    folder = saved(tie_word_embeddings=True)
    change_weights(folder, lambda w: w[EMBEDDINGS][5, 5:6].fill_(torch.nan))
    change_weights(folder, lambda w: w.update({HEAD: w[EMBEDDINGS].clone()}))
    refused(folder, tmp_path, f"teacher tensor {EMBEDDINGS} has 1 value that is not finite", by_headers=False)


def test_a_tied_config_with_a_head_of_its_own_is_refused(saved, tmp_path: Path) -> None:
    folder = saved()
    change_config(folder, tie_word_embeddings=True)
    refused(folder, tmp_path, f"the config ties {HEAD}, but the teacher's own tensors differ there", by_headers=False)


def test_values_that_the_config_s_precision_cannot_hold_are_named(saved, tmp_path: Path) -> None:
    folder = saved()
    change_weights(folder, lambda w: w[UP].view(-1)[:3].fill_(1e6))
    change_config(folder, dtype="float16")
    assert open_teacher_weights(str(folder), load_teacher_config(str(folder))).rounded() == {"F32": 36}
    words = r"up_proj.weight has 3 values that float16 cannot hold \(up to 1e\+06\)"
    refused(folder, tmp_path, words, by_headers=False)
    assert load_teacher(str(folder), dtype=torch.float32).dtype == torch.float32


def test_a_loaded_teacher_with_bad_values_is_not_copied(make_teacher) -> None:
    teacher = make_teacher("llama")
    student = build_student(
        teacher.config, variant="rad_rwkv7", options={}, attention_layers=(1,), attention_rope=False
    )
    teacher.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"teacher tensor model.layers.1.mlp.up_proj.weight has 1 value"):
        transplant(teacher, student)


def test_precisions_may_be_mixed(saved, tmp_path: Path) -> None:
    folder = saved()
    change_weights(folder, lambda w: w.update({UP: w[UP].bfloat16(), Q: w[Q].half()}))
    weights = open_teacher_weights(str(folder), load_teacher_config(str(folder)))
    assert weights.rounded() == {}
    read_in_every_way(folder, tmp_path)
    change_config(folder, dtype="bfloat16")
    weights = open_teacher_weights(str(folder), load_teacher_config(str(folder)))
    assert weights.rounded() == {"F32": 34, "F16": 1}


def own_kib() -> int:
    """Memory of this process that is no file's."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


def test_a_loaded_teacher_is_the_pages_of_its_files(saved) -> None:
    """Ranks of one machine share them until each moves its teacher to its device."""
    folder = saved("llama", hidden_size=256, intermediate_size=8192, num_hidden_layers=4)
    size = (folder / "model.safetensors").stat().st_size // 1024
    assert size > 90_000
    load_teacher(str(folder))
    before = own_kib()
    teacher = load_teacher(str(folder))
    assert own_kib() - before < size / 4
    with torch.no_grad():
        teacher.model.norm.weight.zero_()
    assert load_teacher(str(folder)).model.norm.weight.abs().sum() > 0


def test_text_parts_under_two_prefixes_are_refused(make_vision_language, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    make_vision_language("qwen3_vl", False).save_pretrained(folder)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    plain = name.replace("language_model.", "")
    change_weights(folder, lambda w: w.update({plain: w[name] * 2}))
    refused(folder, tmp_path, f"holds .*{plain}.*, which stand for one tensor", by_headers=True)


def test_text_parts_that_lack_a_tensor_are_refused(make_vision_language, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    make_vision_language("qwen3_vl", True).save_pretrained(folder)
    change_weights(folder, lambda w: w.pop("model.language_model.layers.0.self_attn.k_proj.weight"))
    refused(folder, tmp_path, "lacks model.layers.0.self_attn.k_proj.weight", by_headers=True)


def test_experts_that_stand_twice_or_without_end_are_refused(saved, tmp_path: Path) -> None:
    folder = saved("qwen3_moe")
    down = "model.layers.0.mlp.experts.{}.down_proj.weight"
    change_weights(folder, lambda w: w.update({"model.layers.0.mlp.experts.down_proj": torch.ones(4, 32, 20)}))
    refused(folder, tmp_path, "holds model.layers.0.mlp.experts.down_proj and .*, which stand for one", by_headers=True)
    folder = saved("qwen3_moe")
    change_weights(folder, lambda w: w.update({down.format(999_999): torch.ones(32, 20)}))
    refused(folder, tmp_path, "experts model.layers.0.mlp.experts.down_proj are incomplete", by_headers=True)
    folder = saved("qwen3_moe")
    change_weights(folder, lambda w: w.update({down.format("00"): torch.ones(32, 20)}))
    refused(folder, tmp_path, "which stand for one tensor", by_headers=True)
    folder = saved("qwen3_moe")
    change_weights(folder, lambda w: w.update({down.format(2): torch.ones(32, 20).half()}))
    refused(folder, tmp_path, "incomplete or of different sizes", by_headers=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_finite_is_every_value(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    tensor = torch.full((3, 1000), largest, dtype=dtype)
    tensor[1] = -largest
    assert is_finite(tensor)
    assert is_finite(tensor[:0])
    for value in (torch.inf, -torch.inf, torch.nan):
        for place in (0, 1234, 2999):
            bad = tensor.clone()
            bad.view(-1)[place] = value
            assert not is_finite(bad)
            with pytest.raises(UserError, match=r"^this has 1 value that"):
                check_finite("this", bad)
    assert is_finite(torch.tensor([2**40, -1]))
