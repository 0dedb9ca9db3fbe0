"""Students as GGUF files: read back, and run by llama.cpp's graphs as their sources have them."""

from __future__ import annotations

import re
import runpy
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from radlads.model.llama_cpp import pieces, write
from radlads.model.llama_cpp.graphs import open_for_llama_cpp
from radlads.model.llama_cpp.vocabulary import read_vocabulary
from radlads.model.llama_cpp.write import Card, write_gguf
from radlads.model.mixers.shared.registry import list_variants
from radlads.model.student.export import export_student
from radlads.model.student.load import load_student
from radlads.model.weights.gguf_header import read_gguf_header
from radlads.tasks.contracts.errors import UserError

gguf = pytest.importorskip("gguf")
GRAPHS = runpy.run_path(str(Path(__file__).with_name("llama_cpp_graphs.py")))
run_file = GRAPHS["run_file"]

SIZES = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "num_hidden_layers": 3}


@pytest.fixture(scope="session")
def words() -> Any:
    """A tokenizer that GGUF has a name for: bytes, and GPT-2's words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [*string.ascii_lowercase, *string.ascii_uppercase[:24]]
    vocabulary = {text: i for i, text in enumerate(["<pad>", "<bos>", "<eos>", *letters, "ab", "abc"])}
    core = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("ab", "c")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


@pytest.fixture
def make_folder(make_teacher: Any, make_student: Any, words: Any, tmp_path: Path) -> Callable[..., Path]:
    """A student's folder; every parameter is random."""

    def make(variant: str, options: dict[str, Any] | None = None, family: str = "llama", **changes: Any) -> Path:
        kept = changes.pop("attention_layers", ())
        teacher = make_teacher(family, **(SIZES | changes))
        student = make_student(teacher, variant=variant, options=options or {}, attention_layers=kept)
        return export_student(student, words, tmp_path / "student")

    return make


def to_file(folder: Path, words: Any, target: Path, **settings: Any) -> Path:
    student = open_for_llama_cpp(folder)
    write_gguf(student, read_vocabulary(words, student.num_words), Card("A student"), target, **settings)
    return target


@torch.no_grad()
def logits_of(folder: Path, tokens: Tensor) -> Tensor:
    return load_student(folder, dtype=torch.float64)(tokens).logits


EQUAL = {
    "plain": ("rwkv7", {}, "llama", {}),
    "tied, one kv head each": ("rwkv7", {}, "llama", {"tie_word_embeddings": True, "num_key_value_heads": 2}),
    "no shift": ("rwkv7", {"token_shift": False}, "mistral", {}),
    "no gate": ("rwkv7", {"gate": False}, "smollm3", {}),
    "bare": ("rwkv7", {"gate": False, "group_norm": False, "token_shift": False, "value_rank": 48}, "llama", {}),
    "one layer": ("rwkv7", {}, "llama", {"num_hidden_layers": 1}),
    "fused projections": ("rwkv7", {}, "phi3", {}),
    "rad_rwkv7": ("rad_rwkv7", {"form": "groupnorm", "rope": False}, "llama", {}),
    "cxa075": ("cxa075", {"gate_rank": 5}, "llama", {}),
    "rad_rwkv6": ("rad_rwkv6", {"decay_shift": -4.0}, "qwen2", {}),
    "rad_rwkv6, bare": ("rad_rwkv6", {"decay_shift": -4.0, "token_shift": False, "gate": "none"}, "llama", {}),
}


@pytest.mark.parametrize("case", EQUAL)
def test_the_graph_gives_the_students_logits(case: str, make_folder: Any, words: Any, tmp_path: Path) -> None:
    variant, options, family, changes = EQUAL[case]
    folder = make_folder(variant, options, family, **changes)
    tokens = torch.randint(3, 55, (1, 19), generator=torch.Generator().manual_seed(3))
    path = to_file(folder, words, tmp_path / "model.gguf")
    expected = logits_of(folder, tokens)[0]
    assert expected.std() > 0.01

    # The student has its state, norms and decays in fp32, and llama.cpp e^(-1/2) to six digits.
    assert ((run_file(path, tokens[0]) - expected).norm() / expected.norm()).item() < 3e-6


def test_a_file_says_what_it_is(make_folder: Any, words: Any, tmp_path: Path) -> None:
    folder = make_folder("rwkv7", {"decay_rank": 24, "value_rank": 40})
    student = open_for_llama_cpp(folder)
    card = Card("A student", "apache-2.0", ("some/teacher",))
    path = tmp_path / "new" / "model.gguf"
    write_gguf(student, read_vocabulary(words, student.num_words), card, path, dtype=torch.float16)
    said = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert {
        "general.architecture": "arwkv7",
        "general.name": "A student",
        "general.license": "apache-2.0",
        "general.base_model.0.name": "teacher",
        "general.base_model.0.organization": "some",
        "general.base_model.0.repo_url": "https://huggingface.co/some/teacher",
        "general.file_type": gguf.LlamaFileType.MOSTLY_F16,
        "arwkv7.context_length": 256,
        "arwkv7.embedding_length": 128,
        "arwkv7.feed_forward_length": 48,
        "arwkv7.attention.decay_lora_rank": 24,
        "arwkv7.attention.value_residual_mix_lora_rank": 40,
        "arwkv7.attention.head_count": 0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": words.chat_template,
    }.items() <= said.items()
    tokens, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 64
    assert (tokens[0], kinds[0], tokens[3], kinds[3]) == ("<pad>", 3, "a", 1)
    assert (tokens[60], kinds[60]) == ("[PAD60]", 5)
    assert read_gguf_header(path).settings["general.name"] == "A student"


@pytest.mark.parametrize("variant", ["rwkv7", "rad_rwkv6"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None])
def test_matrices_have_the_type_that_is_asked_for(
    variant: str, dtype: torch.dtype | None, make_folder: Any, words: Any, tmp_path: Path
) -> None:
    folder = make_folder(variant, {"decay_shift": -4.0})
    reader = gguf.GGUFReader(to_file(folder, words, tmp_path / "model.gguf", dtype=dtype))
    names = {gguf.TENSOR_NAMES[one] for one in gguf.MODEL_TENSORS[MODELS[variant]]}
    kinds = {torch.float16: "F16", torch.bfloat16: "BF16"}
    for tensor in reader.tensors:
        bare = re.sub(r"blk\.\d+", "blk.{bid}", tensor.name.removesuffix(".weight").removesuffix(".bias"))
        assert bare in names
        low = re.search(r"time_mix_(decay_)?[wav][12]\.|lerp", tensor.name) is not None
        wide = low or len(tensor.shape) == 1
        assert tensor.tensor_type.name == ("F32" if wide else kinds.get(dtype, "F32"))
    rounded = load_student(folder)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if parameter.ndim == 2 and re.search(r"(_proj|gate|embed_tokens|lm_head)\.weight|g[12]$", name):
                parameter.copy_(parameter.to(dtype))
        tokens = torch.randint(3, 55, (1, 9), generator=torch.Generator().manual_seed(3))
        expected = rounded.double()(tokens).logits[0]
    error = (run_file(tmp_path / "model.gguf", tokens[0]) - expected).norm() / expected.norm()
    assert error < 3e-6


MODELS = {"rwkv7": gguf.MODEL_ARCH.ARWKV7, "rad_rwkv6": gguf.MODEL_ARCH.RWKV6QWEN2}
REFUSED: tuple[tuple[str, dict[str, Any], str, dict[str, Any], str], ...] = (
    ("rwkv7", {}, "llama", {"attention_layers": (1,)}, "softmax attention, which this hybrid keeps in layers 1$"),
    ("rwkv7", {"rope": True}, "llama", {}, "rotary positions in mixers"),
    ("rwkv7", {}, "qwen2", {}, "biases of queries, keys and values"),
    ("rwkv7", {}, "qwen3", {}, "norms on queries and keys"),
    ("rwkv7", {}, "granite", {}, "the family granite computes: its scales"),
    ("rwkv7", {}, "gemma3_text", {}, "the family gemma3_text computes"),
    ("rwkv7", {}, "llama", {"head_dim": 32}, "kernels for heads of 32 channels"),
    ("rwkv7", {}, "llama", {"hidden_size": 64, "num_attention_heads": 2}, r"another width \(128\) than the model's"),
    ("rwkv7", {}, "llama", {"hidden_act": "gelu"}, "the activation gelu"),
    ("rwkv7", {}, "llama", {"mlp_bias": True}, "a place for this student's tensor model.layers.0.mlp.down_proj.bias"),
    ("rwkv7", {}, "llama", {"attention_bias": True}, "a bias of attention's output"),
    ("rad_rwkv7", {"rope": False}, "llama", {}, r"keys scaled by its decay \(key_scaling\)"),
    ("cxa073", {}, "llama", {}, "a decay offset of 0.6"),
    ("hxa079", {"rope": False}, "llama", {}, "keys scaled by its decay"),
    ("hxa07a", {"rope": False}, "llama", {}, "keys scaled by its"),
    ("gated_deltanet", {}, "llama", {}, "no graph with the recurrence of gated_deltanet"),
    ("sliding_window", {}, "llama", {}, "no graph with the recurrence of sliding_window"),
    ("rad_rwkv6", {}, "qwen2", {}, r"the floor of the decay \(exp\(-5\)\), which \d+ of 128 channels of layer 0"),
    ("rad_rwkv6", {"form": "groupnorm"}, "llama", {}, "the GroupNorm of the option form"),
    ("rad_rwkv6", {"gate": "low_rank"}, "llama", {}, "a gate of low rank"),
    ("rad_rwkv6", {"rope": True}, "llama", {}, "rotary positions in mixers"),
)


@pytest.mark.parametrize(("variant", "options", "family", "changes", "said"), REFUSED)
def test_what_a_graph_lacks_is_one_line(
    variant: str, options: dict[str, Any], family: str, changes: dict[str, Any], said: str, make_folder: Any
) -> None:
    folder = make_folder(variant, options, family, **changes)
    with pytest.raises(UserError, match=said) as caught:
        open_for_llama_cpp(folder)
    assert str(caught.value).startswith("no GGUF file of this student: llama.cpp")
    assert "\n" not in str(caught.value)


def test_every_variant_is_known_to_the_export(make_folder: Any) -> None:
    """A new mixer is refused with a reason, or its file is compared with the graph above."""
    compared = {case[0] for case in EQUAL.values()} | {case[0] for case in REFUSED}
    assert compared == set(list_variants()) - {"hxa07b", "hxa07c"}
    for variant in ("hxa07b", "hxa07c"):  # as hxa07a
        with pytest.raises(UserError, match="lacks"):
            open_for_llama_cpp(make_folder(variant, {}))


def test_an_unfinished_file_leaves_nothing(
    make_folder: Any, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, target = make_folder("rwkv7"), tmp_path / "out" / "model.gguf"
    real, calls = write._write_piece, []

    def interrupted(*given: Any) -> None:
        calls.append(given)
        real(*given)
        if len(calls) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(write, "_write_piece", interrupted)
    with pytest.raises(KeyboardInterrupt):
        to_file(folder, words, target)
    assert list(target.parent.iterdir()) == []
    monkeypatch.setattr(write, "_write_piece", real)
    content = to_file(folder, words, target).read_bytes()
    with pytest.raises(UserError, match="exists already"):
        to_file(folder, words, target)
    assert target.read_bytes() == content
    assert [path.name for path in target.parent.iterdir()] == ["model.gguf"]


def test_without_the_package_there_is_one_line(
    make_folder: Any, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder("rwkv7")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"needs the package gguf: pip install 'radlads\[gguf\]'$"):
        to_file(folder, words, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_values_that_half_precision_cannot_hold_are_refused(make_folder: Any, words: Any, tmp_path: Path) -> None:
    folder = make_folder("rwkv7")
    student = load_student(folder)
    with torch.no_grad():
        student.model.layers[1].mlp.up_proj.weight[3, 4] = 1e6
    export_student(student, words, folder)
    with pytest.raises(UserError, match=r"layers.1.mlp.up_proj.weight has 1 value that float16 cannot hold"):
        to_file(folder, words, tmp_path / "model.gguf", dtype=torch.float16)
    assert not list(tmp_path.glob("*.gguf*"))
    to_file(folder, words, tmp_path / "model.gguf", dtype=torch.bfloat16)


def test_tensors_are_streamed(
    make_folder: Any, words: Any, tmp_path: Path, live_bytes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of embeddings larger than a block no more than a block is held."""
    folder = make_folder("rwkv7", vocab_size=4096, num_hidden_layers=1)
    to_file(folder, words, tmp_path / "whole.gguf")
    monkeypatch.setattr(pieces, "_BLOCK_VALUES", 1 << 13)
    with live_bytes() as counter:
        to_file(folder, words, tmp_path / "blocks.gguf")
    assert (tmp_path / "blocks.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert counter.peak < 4096 * 128 * 4 / 2
