"""A rank of test_sequence_parallel.py: `python row_ranks.py`, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.

Every case computes loss and gradients of whole rows alone, then of the same rows shared by all ranks.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import AutoConfig, AutoModelForCausalLM

from radlads.model.convert.transplant import transplant
from radlads.model.student.load import build_student
from radlads.model.training.objectives import OBJECTIVES, Objective
from radlads.tasks.contracts.recipe.loss_terms import RopeFade
from radlads.tasks.contracts.recipe.recipe import Distill, Pretrain
from radlads.tasks.jobs.data.batch_plan import part_of
from radlads.tasks.jobs.process_group import join_group, row_group

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 64,
    "tie_word_embeddings": False,
}
T = 24
# Parts have 12 or 6 tokens. Documents begin where parts do, cross several parts, and have one token.
DOCUMENTS = [[0, 5, 19], [0, 12, 13]]
HYBRID: dict[str, Any] = {"variant": "hxa079", "attention_layers": (1,)}
CASES: dict[str, dict[str, Any]] = {
    "token shift and first values": {"variant": "rwkv7", "checkpointing": True},
    "token shift, documents": {"variant": "rwkv7", "documents": True},
    "kept layer without positions": HYBRID | {"checkpointing": True},
    "kept layer with positions, documents": HYBRID | {"attention_rope": True, "documents": True},
    "kept layer with scaled scores, documents": HYBRID | {"attention_log_scale": 3, "documents": True},
    "kept layer with fading positions, documents": HYBRID | {"fade": True, "documents": True, "checkpointing": True},
    "rad_rwkv6, documents": {"variant": "rad_rwkv6", "documents": True},
    "window": {"variant": "sliding_window", "options": {"window": 5, "sinks": 2}, "checkpointing": True},
    "window, documents": {"variant": "sliding_window", "options": {"window": 3, "sinks": 2}, "documents": True},
    "short convolution, documents": {"variant": "gated_deltanet", "options": {"short_conv": 4}, "documents": True},
    "a plain model, documents": {"documents": True, "checkpointing": True},
}
OF_FOUR = (
    "window, documents",
    "kept layer with positions, documents",
    "kept layer with scaled scores, documents",
    "short convolution, documents",
)


def batch_of(*, documents: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    batch = {"input_ids": torch.randint(0, 64, (2, T + 1), generator=generator)}
    if documents:
        begins = torch.zeros(2, T + 1, dtype=torch.int64)
        for row, places in zip(begins, DOCUMENTS, strict=True):
            row[places] = 1
        batch["document_ids"] = begins.cumsum(1)
    return batch


def objective_of(case: dict[str, Any]) -> Objective:
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", **SIZES)
    teacher = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    given = {"tokens": 2 * T, "context": T, "batch": 2, "reset_at_documents": case.get("documents", False)}
    if "variant" not in case:
        student, name, section = teacher, "pretrain", Pretrain(config={}, tokenizer="none", **given)
    else:
        options = {"options": {}, "attention_layers": (), "attention_rope": False, "attention_log_scale": None}
        options["variant"] = case["variant"]
        student = build_student(config, **{name: case.get(name, value) for name, value in options.items()})
        transplant(teacher, student)
        with torch.no_grad():
            for mixer in student.mixers().values():
                for parameter in mixer.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        fade = RopeFade(tokens=4 * T) if case.get("fade") else None
        given |= {"tokens": 4 * T}
        name, section = "distill", Distill(ce_weight=0.3, hidden_weight=0.5, rope_fade=fade, **given)
        teacher = copy.deepcopy(teacher).requires_grad_(False)
    if case.get("checkpointing"):
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    made = OBJECTIVES[name](section, student.double(), None if student is teacher else teacher.double()).train()
    made.begin_step(1 if case.get("fade") else 0)
    return made


def step(objective: Objective, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    objective.zero_grad()
    loss, metrics = objective(batch)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in objective.named_parameters() if parameter.grad is not None}
    return {"loss": loss.detach().double(), **metrics, **gradients}


def check(name: str, group: distributed.ProcessGroup) -> None:
    case, ranks = CASES[name], group.size()
    objective, batch = objective_of(case), batch_of(documents=case.get("documents", False))
    whole = {key: value.clone() for key, value in step(objective, batch).items()}
    objective.share_rows(group, T)
    shared = step(objective, part_of(batch, group.rank(), ranks))
    assert shared.keys() == whole.keys(), name
    for key, wanted in whole.items():
        found = shared[key].double().contiguous()
        distributed.all_reduce(found, group=group)
        error = (found / ranks - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9)
        assert error < 2e-6, (name, key, error)
    if case.get("fade"):  # judged without positions
        return
    objective.eval()
    with torch.no_grad():
        found = objective(part_of(batch, group.rank(), ranks))[0].double()
    distributed.all_reduce(found, group=group)
    assert abs(found / ranks - whole["loss"]) < 1e-6, name


def main() -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    join_group(torch.device("cpu"), rank, ranks)
    group = row_group(ranks)
    for name in CASES if ranks == 2 else OF_FOUR:
        check(name, group)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
