"""Tiny random teachers and students."""

from __future__ import annotations

import string
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from radlads.model.convert.transplant import transplant
from radlads.model.student.export import export_student
from radlads.model.student.load import RadladsForCausalLM, build_student

MakeTeacher = Callable[..., PreTrainedModel]
MakeStudent = Callable[..., RadladsForCausalLM]


@torch.no_grad()
def scramble(module: torch.nn.Module, scale: float = 0.2, seed: int = 1) -> None:
    """Move every parameter away from its start, so that no term is silently zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=scale)


@pytest.fixture(scope="session")
def make_teacher(family_config: Callable[..., Any]) -> MakeTeacher:
    def make(model_type: str = "qwen3", **changes: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        teacher = AutoModelForCausalLM.from_config(family_config(model_type, **changes), dtype=torch.float32)
        scramble(teacher)
        return teacher.eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def make_student() -> MakeStudent:
    """A student with its teacher's weights; `scrambled`: with random values in what the mixers add."""

    def make(teacher: PreTrainedModel, *, scrambled: bool = True, **changes: Any) -> RadladsForCausalLM:
        torch.manual_seed(0)
        settings: dict[str, Any] = {
            "variant": "rad_rwkv7",
            "options": {},
            "attention_layers": (),
            "attention_rope": False,
            **changes,
        }
        student = build_student(teacher.config, **settings)
        if scrambled:
            for mixer in student.mixers().values():
                scramble(mixer)
        transplant(teacher, student)
        return student.eval()

    return make


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every tensor storage that is alive and that was made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known:
                    self._add(storage._cdata, storage.nbytes(), storage)
        return made

    def _add(self, key: int, size: int, storage: Any) -> None:
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@pytest.fixture(scope="session")
def live_bytes() -> type[LiveBytes]:
    return LiveBytes


@pytest.fixture(scope="session")
def exported(make_teacher: MakeTeacher, make_student: MakeStudent, tmp_path_factory: Any) -> dict[str, Path]:
    """Folders of a hybrid and a pure student, and of the hybrid's teacher; a token is a character."""
    root = tmp_path_factory.mktemp("exported")
    characters = ["<pad>", "<bos>", "<eos>", *string.ascii_letters, *" .,'!?-"]
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(characters)}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    teacher = make_teacher("qwen3", tie_word_embeddings=True)
    teacher.save_pretrained(root / "teacher")
    tokenizer.save_pretrained(root / "teacher")
    hybrid, pure = make_student(teacher, attention_layers=(1,)), make_student(make_teacher("llama"), variant="hxa079")
    export_student(hybrid, tokenizer, root / "export-hybrid")
    export_student(pure, tokenizer, root / "export-pure")
    return {"hybrid": root / "export-hybrid", "pure": root / "export-pure", "teacher": root / "teacher"}


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """[2, 21] int64, without special tokens."""
    return torch.randint(3, 64, (2, 21), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def make_vision_language() -> Callable[..., Any]:
    def make(model_type: str, tied: bool) -> Any:
        torch.manual_seed(0)
        vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
        vision |= {"deepstack_visual_indexes": [0], "fullatt_block_indexes": [0], "num_position_embeddings": 16}
        text = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "vocab_size": 64,
            "max_position_embeddings": 256,
            "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [2, 1, 1]},
        }
        if model_type == "qwen3_vl_moe":
            # Heads wider than width / heads; experts that the checkpoint keeps transposed.
            text |= {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
            text["rope_parameters"]["mrope_section"] = [4, 2, 2]
        ids = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
        config = CONFIG_MAPPING[model_type](text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        return model.eval()

    return make
