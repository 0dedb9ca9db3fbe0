"""Rows of judging passes: budgets of tokens, logits in pieces, and generation by recorded steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from radlads.model.convert.transplant import transplant
from radlads.model.student.load import build_student
from radlads.tasks.contracts.recipe.sections import Evaluate, Needle
from radlads.tasks.jobs.judge.batching import recorded_decoding, row_scores
from radlads.tasks.jobs.judge.batching.budget import RowBudget, fit_rows, read_sizes
from radlads.tasks.jobs.judge.batching.recorded_decoding import can_record, continue_recorded
from radlads.tasks.jobs.judge.batching.row_scores import ScoredRow, batches_of, run_halving, score_rows
from radlads.tasks.jobs.judge.judged_models import as_judged, continue_ids
from radlads.tasks.jobs.train.engines.pass_graphs import WaitsForGpuError

GIB = 1024**3
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512, "initializer_range": 0.3,
}  # fmt: skip


def pair(kept: tuple[int, ...] = ()) -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES, dtype="float32")
    teacher: Any = AutoModelForCausalLM.from_config(config)
    student: Any = build_student(config, variant="rad_rwkv7", options={}, attention_layers=kept, attention_rope=True)
    transplant(teacher, student)
    return as_judged(teacher), as_judged(student)


def test_a_budget_follows_the_devices_memory_and_the_recipe_goes_first() -> None:
    sizes = read_sizes(AutoConfig.for_model("qwen3", **SIZES))

    def fitted(memory: int, weights: int = 0, **given: Any) -> RowBudget:
        return fit_rows(Evaluate(**given), sizes, word=2, device="cuda", memory=memory, weights=weights)

    assert fitted(80 * GIB, batch=3).reads(10_000) == 3
    large = fitted(80 * GIB)
    assert large.reads(16) == 4096
    assert large.reads(512) == 128
    assert large.reads(10**6) == large.writes(10**6) == 1
    tight = fitted(int(3.6 * GIB))
    assert 1 < tight.reads(16) < large.reads(16)
    assert fitted(int(3.6 * GIB) + GIB, GIB) == tight
    assert fitted(GIB).reads(16) == 1
    long = fit_rows(Needle(lengths=(65536,)), sizes, word=2, device="cuda", memory=80 * GIB, weights=0)
    assert long.writing <= large.writing


def test_rows_are_read_longest_first_and_each_pass_is_within_the_budget() -> None:
    lengths = [3, 50, 7, 7, 90, 20, 1]
    batches = batches_of(lengths, RowBudget(None, 60).reads)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert [lengths[batch[0]] for batch in batches] == sorted((lengths[b[0]] for b in batches), reverse=True)
    assert all(len(batch) * lengths[batch[0]] <= 60 or len(batch) == 1 for batch in batches)
    assert batches == [[4], [1], [5, 2, 3], [0, 6]]


@pytest.mark.parametrize("largest", [1, 96 * 5, 2**23])
def test_scores_are_those_of_whole_logits_however_few_are_made_at_once(
    largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = pair()
    monkeypatch.setitem(row_scores.LOGITS, "cpu", largest)
    rows = [
        ScoredRow((5, 6, 7, 8), ((9,), (10,), (7, 8, 3))),
        ScoredRow((11, 12), ((1, 2),)),
        ScoredRow(tuple(range(20, 40)), ((4,) * 9,)),
    ]
    for model in (teacher, student):
        made: list[int] = []
        handle = model.get_output_embeddings().register_forward_hook(lambda *a, seen=made: seen.append(a[2].numel()))
        found = score_rows(model, rows)
        handle.remove()
        assert max(made) <= max(96, largest)
        for row, scores in zip(rows, found, strict=True):
            logs = model(torch.tensor([row.ids]), use_cache=False).logits[0].log_softmax(-1)
            for target, (own, hit) in zip(row.targets, scores, strict=True):
                wanted = logs[-len(target) :].gather(1, torch.tensor(target)[:, None])[:, 0]
                torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)
                assert hit == (logs[-len(target) :].argmax(-1).tolist() == list(target))


def test_rows_that_do_not_fit_are_read_by_halves() -> None:
    seen: list[int] = []

    def run(items: Any) -> list[int]:
        seen.append(len(items))
        if len(items) > 2:
            raise torch.OutOfMemoryError
        return [2 * item for item in items]

    model, _ = pair()
    assert run_halving(model, range(5), run) == [0, 2, 4, 6, 8]
    assert seen == [5, 2, 3, 1, 2]
    with pytest.raises(torch.OutOfMemoryError):
        run_halving(model, range(3), lambda _: run(range(9)))


class Replays:
    """A stand-in for CUDA graphs: what is recorded is run again, and must read and write the same tensors."""

    def __init__(self, *, waits: bool = False) -> None:
        self.waits, self.replays, self.eager = waits, 0, 0

    def rehearse(self, run: Callable[[], Any], *, strict: bool) -> Any:
        self.eager += 1
        if strict and self.waits:
            raise WaitsForGpuError("a read")
        return run()

    def record(self, run: Any) -> Any:
        held = {name: value for name, value in vars(run).items() if isinstance(value, torch.Tensor)}
        addresses = {name: value.data_ptr() for name, value in held.items()}

        def replay() -> None:
            run()
            self.replays += 1
            assert {name: getattr(run, name).data_ptr() for name in held} == addresses

        return {}, replay


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_recorded_steps_write_what_generate_writes(which: str) -> None:
    model = pair()[which == "student"]
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(3, 96, (3, 11), generator=generator)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :4] = mask_BT[2, :7] = 0
    plain = continue_ids(model, ids_BT, mask_BT, do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0)
    recorder = Replays()
    found = continue_recorded(model, ids_BT, mask_BT, 20, None, lambda: recorder)
    assert found is not None
    assert found.tolist() == plain[:, 11:].tolist()
    assert (recorder.eager, recorder.replays) == (2, 17)
    # Rows that all write the same token have ended where it is EOS.
    eos = int(plain[0, 11])
    same = continue_recorded(model, ids_BT[:1], mask_BT[:1], 20, eos, Replays)
    assert same is not None
    assert same.shape == (1, 9)
    assert continue_recorded(model, ids_BT, mask_BT, 20, None, lambda: Replays(waits=True)) is None
    assert continue_recorded(model, ids_BT, mask_BT, 4, None, Replays) is None


def test_a_students_kept_attention_is_not_recorded() -> None:
    teacher, student = pair(kept=(1,))
    assert can_record(teacher)
    assert not can_record(student)
    assert recorded_decoding.continue_recorded(student, torch.ones(1, 2), torch.ones(1, 2), 20, None, Replays) is None
