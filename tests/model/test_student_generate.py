"""Generation: cached = uncached, parallel = step by step, padded = unpadded, for pure and hybrid students."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from radlads.model.student.cache import RadladsCache, RecurrentLayer

GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}


@pytest.fixture(params=[((), "qwen3"), ((1,), "qwen3"), ((0, 2), "llama")], ids=str)
def student(request: pytest.FixtureRequest, make_teacher, make_student):
    kept, model_type = request.param
    return make_student(make_teacher(model_type, tie_word_embeddings=True), attention_layers=kept)


def test_cached_greedy_is_uncached_greedy(student, tokens) -> None:
    cached = student.generate(tokens, **GREEDY)
    assert cached.shape == (2, 29)
    assert torch.equal(cached, student.generate(tokens, **GREEDY, use_cache=False))


def test_generation_is_argmax_of_the_parallel_pass(student, tokens) -> None:
    made = student.generate(tokens, **GREEDY)
    with torch.no_grad():
        predicted = student(made, use_cache=False).logits.argmax(-1)
    assert torch.equal(made[:, 21:], predicted[:, 20:-1])


@torch.no_grad()
def test_step_by_step_is_parallel(student, tokens) -> None:
    whole = student(tokens).logits
    cache, steps = RadladsCache(student.config), []
    for t in range(tokens.shape[1]):
        steps.append(student(tokens[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=2e-4, rtol=1e-4)
    assert cache.get_seq_length() == 21


@torch.no_grad()
def test_prefill_may_come_in_pieces(student, tokens) -> None:
    whole = student(tokens).logits
    first = student(tokens[:, :9], use_cache=True)
    second = student(tokens[:, 9:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, whole[:, 9:], atol=2e-4, rtol=1e-4)
    made = student.generate(tokens, **GREEDY, prefill_chunk_size=6)
    assert torch.equal(made, student.generate(tokens, **GREEDY))


def test_left_padding_changes_nothing(student, tokens) -> None:
    short = tokens[1:, :13]
    padded = torch.cat([torch.zeros(1, 8, dtype=torch.long), short], 1)
    rows = torch.cat([tokens[:1], padded])
    mask = torch.ones_like(rows)
    mask[1, :8] = 0
    made = student.generate(rows, attention_mask=mask, **GREEDY)
    assert torch.equal(made[:1], student.generate(tokens[:1], **GREEDY))
    assert torch.equal(made[1:, 21:], student.generate(short, **GREEDY)[:, 13:])
    assert torch.equal(made, student.generate(rows, attention_mask=mask, **GREEDY, use_cache=False))
    with torch.no_grad():
        torch.testing.assert_close(
            student(rows, attention_mask=mask).logits[1, 8:], student(short).logits[0], atol=2e-4, rtol=1e-4
        )


def test_sampling_is_seeded_and_the_same_with_a_cache(student, tokens) -> None:
    made = []
    for use_cache in (True, True, False):
        torch.manual_seed(3)
        made.append(student.generate(tokens, do_sample=True, max_new_tokens=8, eos_token_id=None, use_cache=use_cache))
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


def test_beams_are_the_same_with_a_cache(student, tokens) -> None:
    settings = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    made = student.generate(tokens, **settings)
    assert torch.equal(made, student.generate(tokens, **settings, use_cache=False))


@torch.no_grad()
def test_memory_is_a_state_where_attention_was_replaced(student, tokens) -> None:
    cache = student(tokens, use_cache=True).past_key_values
    recurrent = {i for i, layer in enumerate(cache.layers) if isinstance(layer, RecurrentLayer)}
    assert recurrent == set(student.mixers())
    for i in recurrent:
        assert cache.layers[i].state.recurrent.shape == (2, 4, 16, 16)
        assert cache.layers[i].state.recurrent.dtype == torch.float32
    kept = 3 - len(recurrent)
    assert cache.num_bytes() == 4 * (len(recurrent) * 2 * 4 * 16 * 16 + kept * 2 * 2 * 2 * 21 * 16)
    with pytest.raises(ValueError, match=r"cannot forget 1 tokens: call cache\.activate_past_recording"):
        cache.layers[min(recurrent)].crop(-1)
    cache.reset()
    torch.testing.assert_close(
        student(tokens, past_key_values=cache).logits, student(tokens).logits, atol=1e-6, rtol=1e-6
    )


@torch.no_grad()
def test_rows_of_a_cache_can_be_chosen_and_repeated(student, tokens) -> None:
    cache = student(tokens, use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    following = torch.tensor([[5], [6]])
    got = student(following, past_key_values=cache).logits[1]
    wanted = student(torch.cat([tokens[1:], following[1:]], 1)).logits[0, -1:]
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-4)


def test_generate_takes_a_tokenizer(student, tokens) -> None:
    """As for stop_strings: it hands it on to every pass."""
    assert torch.equal(student.generate(tokens, **GREEDY, tokenizer=object()), student.generate(tokens, **GREEDY))


def test_what_cannot_work_is_refused(student, tokens) -> None:
    with pytest.raises(ValueError, match="RadladsCache"):
        student(tokens, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="'quantized' does not fit a recurrent state; dynamic and static do"):
        student.generate(tokens, **GREEDY, cache_implementation="quantized")
    with pytest.raises(ValueError, match=r"\[batch, tokens\]"):
        student(tokens, attention_mask=torch.ones(2, 1, 21, 21))
    with pytest.raises(ValueError, match="exactly one of"):
        student()


@torch.no_grad()
def test_forward_follows_the_conventions(student, tokens) -> None:
    out = student(tokens, labels=tokens, output_hidden_states=True, logits_to_keep=0)
    shifted = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(out.loss, shifted)
    assert len(out.hidden_states) == 4
    assert torch.equal(student(tokens, logits_to_keep=2).logits, out.logits[:, -2:])
    torch.testing.assert_close(student.lm_head(student.hidden(tokens)), out.logits)
    embedded = student.get_input_embeddings()(tokens)
    assert torch.equal(student(inputs_embeds=embedded).logits, out.logits)
