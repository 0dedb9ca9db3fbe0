"""Judging on a GPU: steps of generation replayed as CUDA graphs beside the same steps as they are, scores beside those
of the harness's own adapter, and memory within the budget that the rows follow from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from radlads.model.convert.transplant import transplant
from radlads.model.student.load import build_student
from radlads.tasks.jobs.judge.batching.budget import LOGITS, read_sizes, token_bytes
from radlads.tasks.jobs.judge.batching.recorded_decoding import continue_recorded
from radlads.tasks.jobs.judge.batching.row_scores import ScoredRow, score_rows
from radlads.tasks.jobs.judge.judged_models import as_judged, continue_ids
from radlads.tasks.jobs.train.engines.pass_graphs import PassRecorder

CUDA = torch.device("cuda", 0)
SHAPE = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 2048, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "initializer_range": 0.1,
}  # fmt: skip


class AsItIs:
    """Runs every step."""

    def rehearse(self, run: Any, *, strict: bool) -> Any:
        return run()

    def record(self, run: Any) -> Any:
        return {}, run


def pair(dtype: torch.dtype) -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SHAPE, dtype=str(dtype).removeprefix("torch."))
    teacher: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    student: Any = build_student(config, variant="rad_rwkv7", options={}, attention_layers=(), attention_rope=True)
    transplant(teacher, student)
    return as_judged(teacher.to(CUDA)), as_judged(student.to(CUDA, dtype))


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Padded on the left."""
    ids_BT = torch.randint(3, 2048, (5, 300), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :40] = mask_BT[4, :211] = 0
    return ids_BT.to(CUDA), mask_BT.to(CUDA)


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["teacher", "student"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_replayed_step_is_the_step_bit_for_bit(which: str, dtype: torch.dtype) -> None:
    model = pair(dtype)[which == "student"]
    ids_BT, mask_BT = prompts()
    eager = continue_recorded(model, ids_BT, mask_BT, 48, None, AsItIs)
    replayed = continue_recorded(model, ids_BT, mask_BT, 48, None, lambda: PassRecorder(CUDA))
    assert eager is not None
    assert replayed is not None
    assert torch.equal(eager, replayed)
    assert len(set(replayed.flatten().tolist())) > 5
    if dtype == torch.float32:
        options = {"do_sample": False, "max_new_tokens": 48, "eos_token_id": None, "pad_token_id": 0}
        plain = continue_ids(model, ids_BT, mask_BT, **options)[:, ids_BT.shape[1] :]
        assert (plain == replayed).float().mean() > 0.95  # another order of sums may turn a near tie


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["teacher", "student"])
def test_scores_of_many_rows_are_those_of_single_ones_within_the_budgets_memory(which: str) -> None:
    teacher, student = pair(torch.bfloat16)
    model = student if which == "student" else teacher
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(20, 200, (256,), generator=generator).tolist()
    rows = [ScoredRow(tuple(torch.randint(3, 2048, (n,), generator=generator).tolist()), ((7, 9),)) for n in lengths]
    score_rows(model, rows[:2])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    together = score_rows(model, rows, torch.float32)
    used = torch.cuda.max_memory_allocated() - before
    tokens = len(rows) * max(lengths)
    assert used < 2 * tokens * token_bytes(read_sizes(teacher.config), 2) + LOGITS["cuda"] * 12
    noise = []
    for row, (found,) in zip(rows[:24], together, strict=False):
        ((alone, _),) = score_rows(model, [row], torch.float32)[0]
        noise.append((alone - found[0]).abs().max().item())
    assert max(noise) < 0.25  # of log-probabilities near -8 in bf16
    assert sum(noise) / len(noise) < 0.05
