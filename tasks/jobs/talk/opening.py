"""Loads what `radlads chat` and `radlads serve` talk with: models, their tokenizer, its chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from radlads.model.student.load import load_student
from radlads.model.teacher.load import load_teacher
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.requests.talk import ModelsRequest, Talker
from radlads.tasks.jobs.data.text.chat import ChatTemplate, open_chat_template
from radlads.tasks.jobs.data.text.token_encoder import TokenEncoder
from radlads.tasks.jobs.sources import load_tokenizer


@dataclass(frozen=True)
class OpenedModels:
    """Models by name, in the order of the request. template: None for a tokenizer without one."""

    models: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None


def open_models(request: ModelsRequest) -> OpenedModels:
    """Load them, on a GPU in bf16 where there is one. Raises UserError."""
    if request.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here; leave it out, or choose cpu")
    device = "cuda" if request.device != "cpu" and torch.cuda.is_available() else "cpu"
    named = {"auto": torch.bfloat16 if device == "cuda" else None, "bfloat16": torch.bfloat16, "float32": torch.float32}
    tokenizer = load_tokenizer(
        request.tokenizer, revision=request.revision, trust_remote_code=request.trust_remote_code
    )
    template = None
    if tokenizer.chat_template or request.chat_template:
        template = open_chat_template(TokenEncoder(tokenizer), request.chat_template)
    models = {one.name: _load(one, device, named[request.dtype]) for one in request.talkers}
    return OpenedModels(models, tokenizer, template)


def _load(talker: Talker, device: str, dtype: torch.dtype | None) -> Any:
    if talker.is_student:
        return load_student(talker.path, dtype=dtype, device=device)
    return load_teacher(talker.path, dtype=dtype, device=device, revision=talker.revision)
