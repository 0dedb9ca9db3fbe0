"""Students as GGUF files: read back, and run by llama.cpp's graphs as their sources have them."""

from __future__ import annotations

import runpy
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from radlads.model.llama_cpp.graphs import open_for_llama_cpp
from radlads.model.llama_cpp.vocabulary import read_vocabulary
from radlads.model.llama_cpp.write import Card, write_gguf
from radlads.model.student.export import export_student
from radlads.model.student.load import load_student
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
def test_the_graph_of_the_file_gives_the_students_logits(case: str, make_folder: Any, words: Any, tmp_path: Path) -> None:
    variant, options, family, changes = EQUAL[case]
    folder = make_folder(variant, options, family, **changes)
    tokens = torch.randint(3, 55, (1, 19), generator=torch.Generator().manual_seed(3))
    logits = run_file(to_file(folder, words, tmp_path / "model.gguf"), tokens[0])
    expected = logits_of(folder, tokens)[0]
    # The graph has e^(-1/2) to six digits, which is the whole difference.
    assert ((logits - expected).norm() / expected.norm()).item() < 1e-5
    assert expected.std() > 0.01
