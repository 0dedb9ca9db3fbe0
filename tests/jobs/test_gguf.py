"""GGUF teachers: a tiny file from its header to a student, and what would become another model than the file's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from radlads.model.student.load import load_student
from radlads.model.teacher import gguf as gguf_teacher
from radlads.model.teacher.load import load_teacher
from radlads.model.weights.gguf_header import read_gguf_header
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import InputRef, JobResources
from radlads.tasks.contracts.recipe.recipe import parse_recipe
from radlads.tasks.contracts.recipe.sections import Dataset, Student
from radlads.tasks.contracts.specs import DequantizeSpec, PlanReport, TokenizeSpec, TransplantSpec
from radlads.tasks.jobs import transplant
from radlads.tasks.jobs.common import Job, execute
from radlads.tasks.jobs.data import tokens
from radlads.tasks.jobs.plan import plan
from radlads.tasks.jobs.report.card import teacher_name
from radlads.tasks.jobs.sources import load_tokenizer, pin_teacher
from radlads.tasks.jobs.teacher import dequantize

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
CPU = JobResources(device="cpu", processes=1, threads=1)
KINDS = gguf.GGMLQuantizationType
WIDTH, HEADS, KV_HEADS, HEAD, LAYERS, MLP = 32, 4, 2, 8, 2, 64
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tokenizer_folder: Path) -> dict[str, np.ndarray]:
    """A tiny random Llama's tensors, under its own names."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(tokenizer_folder)), hidden_size=WIDTH, intermediate_size=MLP,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD,
    )  # fmt: skip
    return {name: tensor.numpy().copy() for name, tensor in LlamaForCausalLM(config).state_dict().items()}


def as_stored(name: str, values: np.ndarray, kind: Any) -> tuple[str, np.ndarray, Any]:
    """llama.cpp's name, layout (rotary pairs side by side in q and k) and bytes of a tensor; norms stay F32."""
    if name == "model.embed_tokens.weight":
        name = "token_embd.weight"
    elif name == "model.norm.weight":
        name = "output_norm.weight"
    elif name == "lm_head.weight":
        name = "output.weight"
    else:
        _, _, layer, inner = name.split(".", 3)
        heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(inner.removesuffix(".weight"))
        if heads:
            values = values.reshape(heads, 2, -1, WIDTH).swapaxes(1, 2).reshape(values.shape)
        name = f"blk.{layer}.{NAMES[inner.removesuffix('.weight')]}.weight"
    kind = KINDS.F32 if values.ndim == 1 else kind
    return name, gguf.quants.quantize(np.ascontiguousarray(values), kind), kind


@pytest.fixture
def write(tmp_path: Path, tokenizer_folder: Path, weights: dict[str, np.ndarray]) -> Callable[..., Path]:
    """write(kind, settings=, tensors=) → a file. settings: key → value that replaces one; tensors: name → values."""

    def make(kind: Any = KINDS.Q8_0, **changes: Any) -> Path:
        writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", changes.get("architecture", "llama"))
        sizes = {"block_count": LAYERS, "context_length": 256, "embedding_length": WIDTH, "feed_forward_length": MLP,
                 "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "rope.dimension_count": HEAD,
                 "vocab_size": len(weights["lm_head.weight"])}  # fmt: skip
        for key, value in (sizes | changes.get("sizes", {})).items():
            writer.add_uint32(f"{writer.arch}.{key}", value)
        writer.add_float32(f"{writer.arch}.attention.layer_norm_rms_epsilon", 1e-6)
        for key, value in changes.get("texts", {}).items():
            writer.add_string(f"{writer.arch}.{key}", value)
        if "parts" in changes:
            writer.add_uint16("split.count", changes["parts"])
        add_tokenizer(writer, tokenizer_folder)
        for key in changes.get("without_settings", ()):
            del writer.kv_data[0][f"tokenizer.{key}"]
        for name, values in weights.items():
            if name != changes.get("without"):
                add_tensor(writer, *as_stored(name, values, kind))
        for name in changes.get("more", ()):
            add_tensor(writer, name, np.ones(4, np.float32), KINDS.F32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "tiny.gguf"

    return make


def add_tensor(writer: Any, name: str, stored: np.ndarray, kind: Any) -> None:
    writer.add_tensor(name, stored, raw_dtype=kind)


def add_tokenizer(writer: Any, folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocabulary = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token.startswith("<") and len(token) > 2 else 1 for token in vocabulary])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    for name in ("bos", "eos", "pad"):
        getattr(writer, f"add_{name}_token_id")(vocabulary.index(f"<{name}>"))
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}")


def planned(path: Path, stories: list[str], tmp_path: Path, **teacher: Any) -> PlanReport:
    (tmp_path / "stories.txt").write_text("\n---\n".join(stories), encoding="utf-8")
    source = {"kind": "files", "paths": [str(tmp_path / "stories.txt")], "separator": "\n---\n"}
    recipe = {"name": "tiny", "teacher": {"path": str(path), **teacher}, "student": {"attention_layers": [1]},
              "data": {"train": {"sources": [source]}},
              "align": {"tokens": 4096, "context": 64, "batch": 4, "micro_batch": 2}}  # fmt: skip
    return plan.make_plan(parse_recipe(recipe), CPU)


@pytest.mark.parametrize(
    ("kind", "dtype"), [(KINDS.Q4_1, torch.bfloat16), (KINDS.F16, torch.float16), (KINDS.F32, torch.float32)]
)
def test_the_folder_has_the_files_numbers(write, weights, kind, dtype, make_job, run_main) -> None:
    file = write(kind)
    reference = pin_teacher(str(file))
    assert reference.fingerprint == sha256(file.read_bytes()).hexdigest()
    job = make_job("dequantize", DequantizeSpec(teacher=reference))
    manifest = run_main(dequantize.main, job)
    folder = Path(job.spec.output_uri)
    made = load_teacher(str(folder / "model"))
    assert made.dtype == dtype
    for name, values in weights.items():
        if values.ndim == 1:
            expected = values
        else:  # blocks lie along rows, so that their order does not matter
            expected = gguf.dequantize(gguf.quants.quantize(values, kind), kind)
        assert torch.equal(made.state_dict()[name], torch.from_numpy(np.array(expected, np.float32)).to(dtype)), name
    assert manifest.metrics["parameters"] == sum(values.size for values in weights.values())
    sheet = json.loads((folder / "dequantize.json").read_text(encoding="utf-8"))
    assert sheet["sha256"] == reference.fingerprint
    assert next(iter(sheet["kinds"])) == kind.name


# Architecture → config class, sizes of its own, and what llama.cpp stores otherwise.
ARCHITECTURES: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "qwen3moe": (Qwen3MoeConfig, {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                                  "moe_intermediate_size": 16, "norm_topk_prob": True}),
    "phi3": (Phi3Config, {"pad_token_id": 0}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}),
}  # fmt: skip
SETTINGS = {
    "context_length": "max_position_embeddings", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.sliding_window": "sliding_window", "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok", "expert_feed_forward_length": "moe_intermediate_size",
}  # fmt: skip


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_each_architecture_computes_what_it_did(architecture, tmp_path, tokenizer_folder) -> None:
    torch.manual_seed(0)
    kind, more = ARCHITECTURES[architecture]
    config = kind(**{"vocab_size": 400, "hidden_size": WIDTH, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
                     "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 128,
                     "tie_word_embeddings": architecture == "gemma3"} | more)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", architecture)
    for key, name in SETTINGS.items():
        if (value := getattr(config, name, None)) is not None:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    base = config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"]
    writer.add_float32(f"{architecture}.rope.freq_base", base)
    add_tokenizer(writer, tokenizer_folder)
    kinds = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], LAYERS)
    for name, tensor in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        values = tensor.numpy() + (1 if architecture == "gemma3" and "norm" in name else 0)
        if stem == "lm_head" and config.tie_word_embeddings:
            continue
        if name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
                writer.add_tensor(f"blk.{name.split('.')[2]}.ffn_{part}_exps.weight", np.ascontiguousarray(half))
        elif suffix in ("weight", "bias"):
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", values)
        else:
            writer.add_tensor(f"{names.get_name(name)}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    teacher = gguf_teacher.open_gguf(tmp_path / "one.gguf")
    read = gguf_teacher.load_gguf_config(teacher)
    assert gguf_teacher.check_gguf_tensors(teacher, read) == []
    gguf_teacher.dequantise(teacher, read, tmp_path / "model")
    made, ids = load_teacher(str(tmp_path / "model")), torch.arange(40)[None] * 7 % 400
    with torch.no_grad():
        assert torch.allclose(made(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)


def test_the_config_is_read_without_going_through_the_vocabulary(write, tmp_path, monkeypatch) -> None:
    """transformers takes ten seconds over the lists of a real tokenizer, in every plan."""
    file, seen = write(), []
    whole, _ = PreTrainedConfig.get_config_dict(str(tmp_path), gguf_file=file.name)
    given = PreTrainedConfig.get_config_dict

    def watched(folder: str, *, gguf_file: str) -> Any:
        seen.append(read_gguf_header(Path(folder) / gguf_file).settings)
        return given(folder, gguf_file=gguf_file)

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", watched)
    teacher = gguf_teacher.open_gguf(file)
    config = gguf_teacher.load_gguf_config(teacher)
    assert not [key for key in seen[0] if key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")]
    assert seen[0].items() <= teacher.header.settings.items()
    assert config.vocab_size == whole["vocab_size"] == teacher.header.settings["tokenizer.ggml.tokens"]
    told = {key: value for key, value in whole.items() if key not in ("rope_theta", "_model_name_or_path")}
    assert {key: getattr(config, key) for key in told} == told


def test_from_the_plan_to_a_student(write, stories, tmp_path, tokenizer_folder, make_job, run_main, reference) -> None:
    file = write()
    report = planned(tmp_path, stories, tmp_path, gguf_file="tiny.gguf")
    assert report.teacher is not None
    assert report.gguf is not None
    assert report.gguf.kinds == {"Q8_0": 16, "F32": 5}
    assert report.gguf.sha256 == report.teacher.fingerprint == sha256(file.read_bytes()).hexdigest()
    assert report.teacher.path == str(file)
    assert "tensors of Q8_0 (16), F32 (5); dequantised once by transformers, to bfloat16" in str(report.gguf)
    made = make_job("dequantize", DequantizeSpec(teacher=report.teacher))
    run_main(dequantize.main, made)
    inputs: dict[str, InputRef] = {"teacher": reference(made)}
    job = make_job("transplant", TransplantSpec(teacher=report.teacher, student=Student(attention_layers=(1,))), inputs)
    run_main(transplant.main, job)
    student = load_student(Path(job.spec.output_uri) / "model")
    assert student.config.converted_from["teacher"] == report.teacher.fingerprint
    teacher = load_teacher(str(Path(made.spec.output_uri) / "model"))
    assert torch.equal(student.state_dict()["model.norm.weight"], teacher.state_dict()["model.norm.weight"])
    source = {"kind": "files", "paths": [str(tmp_path / "stories.txt")], "separator": "\n---\n"}
    spec = TokenizeSpec(
        name="train", dataset=Dataset.model_validate({"sources": [source]}), tokenizer=report.tokenizer,
        tokenizer_fingerprint=report.tokenizer_fingerprint, teacher=None,
    )  # fmt: skip
    found = run_main(tokens.main, make_job("tokenize", spec, inputs)).metrics
    ours, theirs = (load_tokenizer(str(place)) for place in (file, tokenizer_folder))
    assert [ours(text)["input_ids"] for text in stories[:20]] == [theirs(text)["input_ids"] for text in stories[:20]]
    assert found["train_tokens"] + found["heldout_tokens"] == sum(len(theirs(s)["input_ids"]) + 1 for s in stories)
    assert ours.chat_template
    assert AutoTokenizer.from_pretrained(Path(job.spec.output_uri) / "model").eos_token == "<eos>"


def test_a_job_without_the_folder_is_refused(write, make_job) -> None:
    job: Job = make_job("transplant", TransplantSpec(teacher=pin_teacher(str(write())), student=Student()))
    assert execute(transplant.main, job) == "config"
    assert "needs the input 'teacher'" in (job.scratch / "exit.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "gpt2"}, "no teacher family for model_type 'gpt2'"),
        ({"architecture": "mpt"}, "transformers cannot read .*'mpt'.*not supported yet"),
        ({"more": ["rope_freqs.weight"]}, "has the tensor rope_freqs.weight, for which a llama of transformers has no"),
        ({"without": "model.layers.1.mlp.up_proj.weight"}, "has nothing for model.layers.1.mlp.up_proj.weight"),
        (
            {"sizes": {"attention.key_length": 16, "rope.dimension_count": 16}},
            "numbers for model.layers.0.self_attn.q_proj.weight, which takes",
        ),
        ({"texts": {"rope.scaling.type": "yarn"}}, r"rotary positions of .* are scaled \(yarn\)"),
        ({"sizes": {"rope.dimension_count": 4, "attention.key_length": 8}}, "rotates 4 of a head's 8 channels"),
        ({"parts": 3}, "is one of 3 parts; join them"),
    ],
)
def test_what_would_be_another_model_is_refused_by_the_plan(write, stories, tmp_path, changes, words) -> None:
    file = write(**changes)
    with pytest.raises(UserError, match=f"^teacher: .*{words}") as raised:
        planned(file, stories, tmp_path)
    assert "\n" not in str(raised.value)


def test_settings_that_transformers_does_not_read_are_told(write, stories, tmp_path) -> None:
    report = planned(write(texts={"pooling_type": "mean"}), stories, tmp_path)
    assert any("does not read these settings of the GGUF file: llama.pooling_type" in line for line in report.warnings)


def test_a_damaged_file_is_refused_in_one_line(write, tmp_path) -> None:
    whole = write().read_bytes()
    torn = tmp_path / "torn.gguf"
    header = gguf_teacher.read_gguf_header(tmp_path / "tiny.gguf").data_start
    lengths = [*range(0, header - 64, 997), len(whole) - 64]
    for data in [
        b"PK" + whole,
        whole[:4] + b"\x01" + whole[5:],
        whole[:8] + b"\xff" * 16,
        *(whole[:n] for n in lengths),
    ]:
        torn.write_bytes(data)
        with pytest.raises(UserError, match=r"no whole GGUF file: .*; download it again$") as raised:
            gguf_teacher.open_gguf(torn)
        assert "\n" not in str(raised.value)


def test_places_and_packages_are_named_where_they_lack(write, stories, tmp_path, teacher_folder, monkeypatch) -> None:
    file = write()
    with pytest.raises(UserError, match=r"is a folder of GGUF files; name one of them, with gguf_file: tiny\.gguf"):
        planned(tmp_path, stories, tmp_path)
    with_config = Path(shutil.copytree(teacher_folder, tmp_path / "with", ignore=lambda *_: ["model.safetensors"]))
    shutil.copy(file, with_config)
    with pytest.raises(UserError, match=r"has no \.safetensors weights .*; name its GGUF file with gguf_file$"):
        planned(with_config, stories, tmp_path)
    with pytest.raises(UserError, match=r"there is no GGUF file at some/thing\.gguf; one of the hub is downloaded"):
        planned(Path("some"), stories, tmp_path, gguf_file="thing.gguf")
    with pytest.raises(UserError, match=r"gguf_file names a file ending in \.gguf in the folder"):
        planned(tmp_path, stories, tmp_path, gguf_file="model.bin")
    quantised = Path(shutil.copytree(teacher_folder, tmp_path / "awq"))
    config = json.loads((quantised / "config.json").read_text(encoding="utf-8"))
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(UserError, match=r"weights are quantised; .*, or a GGUF file \(teacher: {path: model\.gguf}\)"):
        planned(quantised, stories, tmp_path)
    monkeypatch.setattr(gguf_teacher, "is_gguf_available", lambda: False)
    with pytest.raises(UserError, match=r"needs the package gguf: pip install 'radlads\[gguf\]'"):
        planned(file, stories, tmp_path)


@pytest.mark.parametrize(
    ("key", "words"),
    [("ggml.model", "no usable tokenizer in .*tiny.gguf: .*"), ("ggml.eos_token_id", "has no EOS token")],
)
def test_a_file_whose_tokenizer_lacks_something_is_mended_by_another(key, words, write) -> None:
    with pytest.raises(UserError, match=f"{words}; give another GGUF file of the model, or its Hugging Face folder$"):
        load_tokenizer(str(write(without_settings=[key])))


def test_the_card_names_the_file_alone(tmp_path) -> None:
    recipe = {"name": "tiny", "teacher": {"path": str(tmp_path), "gguf_file": "tiny.gguf"},
              "data": {"train": {"sources": [{"kind": "files", "paths": ["x.txt"]}]}}}  # fmt: skip
    assert teacher_name(parse_recipe(recipe)) == "tiny.gguf"


def test_a_sentencepiece_tokenizer_is_read_as_transformers_reads_it(write, tmp_path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "pieces.gguf", "llama")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh", "▁a", "bc", "▁abc"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(number) for number in range(len(pieces))])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    sizes = {"block_count": 1, "context_length": 8, "embedding_length": 8, "feed_forward_length": 8, "vocab_size": 271,
             "attention.head_count": 1, "attention.head_count_kv": 1, "rope.dimension_count": 8}  # fmt: skip
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((271, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = (
        load_tokenizer(str(tmp_path / "pieces.gguf")),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file="pieces.gguf"),
    )
    for text in ("abc abc", " a  bc\n\nx", "héh"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])
    ours.save_pretrained(tmp_path / "saved")
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert again("abc abc")["input_ids"] == ours("abc abc")["input_ids"]
    assert ours("abc")["input_ids"][0] == 1, "a sentencepiece file begins with BOS unless it says otherwise"
