"""Decoding of students: recorded steps, taking tokens back, caches as objects, prompts in pieces, room for keys."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextStreamer

from radlads.model.student.cache import RadladsCache
from radlads.model.student.decoding import generation_loop, kept_layer, recorded_steps
from radlads.model.student.decoding.generation_loop import prompt_piece
from radlads.model.student.decoding.recorder import NotRecordedError, WaitsForGpuError

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None}
VARIANTS = [("rad_rwkv7", ()), ("rad_rwkv6", (0, 2)), ("hxa079", (0,))]


class Replays:
    """Records nothing: a replay runs the step again, at the addresses that it had while it was recorded."""

    made: ClassVar[list[Replays]] = []
    fails_at = ""

    def __init__(self, device: Any) -> None:
        self.calls: list[str] = []
        self.made.append(self)

    def rehearse(self, run: Any, *, strict: bool) -> Any:
        self.calls.append("strict" if strict else "free")
        run()
        if strict and self.fails_at == "strict":
            raise WaitsForGpuError("somewhere")

    def record(self, run: Any) -> Any:
        self.calls.append("record")
        if self.fails_at == "record":
            raise NotRecordedError("no graph")

        def replay() -> None:
            self.calls.append("replay")
            run()

        return None, replay


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Replays]:
    monkeypatch.setattr(generation_loop, "_on_one_gpu", lambda model: True)
    monkeypatch.setattr(recorded_steps, "CudaRecorder", Replays)
    monkeypatch.setattr(Replays, "made", [])
    monkeypatch.setattr(Replays, "fails_at", "")
    return Replays.made


@pytest.fixture(params=VARIANTS, ids=str)
def student(request: pytest.FixtureRequest, make_teacher, make_student):
    variant, kept = request.param
    return make_student(make_teacher("qwen3"), variant=variant, attention_layers=kept)


@pytest.fixture
def hybrid(make_teacher, make_student):
    return make_student(make_teacher("qwen3"), attention_layers=(1,))


def plain(student, *args: Any, **kwargs: Any) -> Any:
    """What transformers' own loop generates."""
    return student.generate(*args, **kwargs, disable_compile=True)


def test_recorded_steps_generate_the_same(student, tokens, recorded) -> None:
    wanted = plain(student, tokens, **GREEDY)
    assert not recorded
    assert torch.equal(student.generate(tokens, **GREEDY), wanted)
    assert recorded[0].calls == ["free", "strict", "record", *["replay"] * 17]
    other = tokens.flip(0)[:, :13]  # as many rows: nothing is recorded again, and nothing is left of the first call
    assert torch.equal(student.generate(other, **GREEDY), plain(student, other, **GREEDY))
    assert len(recorded) == 1
    assert torch.equal(student.generate(tokens[:1], **GREEDY), plain(student, tokens[:1], **GREEDY))
    assert len(recorded) == 2
    student.forget_recordings()
    student.generate(tokens[:1], **GREEDY)
    assert len(recorded) == 3


def test_recorded_steps_after_padded_prompts(student, tokens, recorded) -> None:
    rows = torch.cat([tokens[:1], torch.cat([torch.zeros(1, 8, dtype=torch.long), tokens[1:, :13]], 1)])
    mask = torch.ones_like(rows)
    mask[1, :8] = 0
    made = student.generate(rows, attention_mask=mask, **GREEDY)
    assert recorded
    assert torch.equal(made, plain(student, rows, attention_mask=mask, **GREEDY))
    assert torch.equal(made[1:, 21:], plain(student, tokens[1:, :13], **GREEDY)[:, 13:])


@pytest.mark.parametrize("how", [{"temperature": 0.7}, {"top_k": 5, "top_p": 0.8}, {"min_p": 0.1}])
def test_recorded_steps_sample_from_the_same_distribution(hybrid, tokens, recorded, how) -> None:
    """Equal draws for one seed: the choice is a race of exponential clocks, as in torch.multinomial on a GPU."""
    torch.manual_seed(5)
    made = hybrid.generate(tokens, do_sample=True, max_new_tokens=20, eos_token_id=None, **how)
    torch.manual_seed(5)
    again = hybrid.generate(tokens, do_sample=True, max_new_tokens=20, eos_token_id=None, **how)
    assert torch.equal(made, again)
    assert "replay" in recorded[0].calls
    seen = torch.zeros(64)
    scores = torch.randn(1, 64, generator=torch.Generator().manual_seed(1)) * 2
    for _ in range(4000):
        seen[generation_loop.choose(scores, lambda ids, x: x, None, do_sample=True)] += 1
    torch.testing.assert_close(seen / 4000, scores.softmax(-1)[0], atol=0.03, rtol=0)


@pytest.mark.parametrize("eos", [[5, 9], list(range(0, 64, 3)), list(range(64))])
def test_rows_end_where_they_end(hybrid, tokens, recorded, eos) -> None:
    settings = {**GREEDY, "eos_token_id": eos, "pad_token_id": 1, "max_new_tokens": 40}
    wanted = plain(hybrid, tokens, **settings)
    assert torch.equal(hybrid.generate(tokens, **settings), wanted)
    whole = hybrid.generate(tokens, **settings, return_dict_in_generate=True)
    assert torch.equal(whole.sequences, wanted)
    theirs = plain(hybrid, tokens, **settings, return_dict_in_generate=True).past_key_values
    assert whole.past_key_values.get_seq_length() == theirs.get_seq_length() == wanted.shape[1] - 1


def test_the_cache_of_a_caller_goes_on(hybrid, tokens, recorded) -> None:
    """What was read is in the cache, and nothing more: the next turn continues from it."""
    made, caches = [], [RadladsCache(hybrid.config) for _ in range(2)]
    for cache, generate in zip(caches, (hybrid.generate, lambda *a, **k: plain(hybrid, *a, **k)), strict=True):
        first = generate(tokens, **GREEDY, past_key_values=cache)
        turn = torch.cat([first, tokens[:, :5]], 1)
        made.append(generate(turn, **GREEDY, past_key_values=cache))
    assert torch.equal(*made)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()
    for ours, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        pairs = zip(ours.state, theirs.state, strict=True) if hasattr(ours, "state") else [(ours.keys, theirs.keys)]
        for a, b in pairs:
            if a is not None:
                torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


class AtLength(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 30)


def test_what_looks_at_the_text_works_too(hybrid, tokens, recorded) -> None:
    """Processors and criteria that a step cannot hold are asked after it."""
    settings = {**GREEDY, "repetition_penalty": 1.5, "min_new_tokens": 4, "eos_token_id": 7, "pad_token_id": 1}
    assert torch.equal(hybrid.generate(tokens, **settings), plain(hybrid, tokens, **settings))
    criteria = StoppingCriteriaList([AtLength()])
    made = hybrid.generate(tokens, **GREEDY, stopping_criteria=criteria)
    assert made.shape == (2, 30)
    assert torch.equal(made, plain(hybrid, tokens, **GREEDY)[:, :30])
    assert len(recorded) == 2


def test_a_streamer_gets_every_token(hybrid, tokens, recorded) -> None:
    class Streamer(TextStreamer):
        def __init__(self) -> None:
            self.got: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.got += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    made = hybrid.generate(tokens[:1], **GREEDY, streamer=streamer)
    assert streamer.ended
    assert streamer.got == made[0].tolist()


@pytest.mark.parametrize("fails_at", ["strict", "record"])
def test_where_recording_fails_steps_run_as_they_are(hybrid, tokens, recorded, monkeypatch, caplog, fails_at) -> None:
    monkeypatch.setattr(Replays, "fails_at", fails_at)
    assert torch.equal(hybrid.generate(tokens, **GREEDY), plain(hybrid, tokens, **GREEDY))
    assert "not recorded as a CUDA graph" in caplog.text


def test_calls_that_are_not_recorded(hybrid, make_teacher, make_student, tokens, recorded) -> None:
    hybrid.generate(tokens, **{**GREEDY, "max_new_tokens": 4})
    hybrid.generate(tokens, **GREEDY, num_beams=2)
    hybrid.generate(tokens, **GREEDY, use_cache=False)
    hybrid.generate(tokens, **GREEDY, return_dict_in_generate=True, output_scores=True)
    window = make_student(make_teacher("qwen3"), variant="sliding_window", attention_layers=(1,))
    window.generate(tokens, **GREEDY)
    windowed = make_teacher("mistral", sliding_window=8)
    make_student(windowed, attention_layers=(1,)).generate(tokens, **GREEDY)
    assert not recorded


def test_hooks_and_adapters_are_followed(hybrid, tokens, recorded) -> None:
    """A replay calls no Python: a module that somebody watches is not recorded, and switches make a new recording."""
    seen = []
    hook = hybrid.model.layers[1].mlp.register_forward_hook(lambda *given: seen.append(1))
    hybrid.generate(tokens, **GREEDY)
    hook.remove()
    hook = hybrid.model.layers[1].mlp.register_forward_pre_hook(lambda *given: seen.append(1))
    hybrid.generate(tokens, **GREEDY)
    hook.remove()
    assert len(seen) == 40
    assert not recorded
    hybrid.generate(tokens, **GREEDY)
    hybrid.model.layers[1].mlp.active_adapters, hybrid.model.layers[1].mlp.disable_adapters = ["a"], False
    hybrid.generate(tokens, **GREEDY)
    hybrid.model.layers[1].mlp.disable_adapters = True
    hybrid.generate(tokens, **GREEDY)
    assert len(recorded) == 3


def test_models_with_recordings_are_copied_and_pickled(hybrid, tokens, recorded) -> None:
    wanted = hybrid.generate(tokens, **GREEDY)
    for other in (copy.deepcopy(hybrid), pickle.loads(pickle.dumps(hybrid))):
        assert "_recorded_steps" not in other.__dict__
        assert torch.equal(other.generate(tokens, **GREEDY), wanted)


def test_another_padding_is_another_recording(hybrid, tokens, recorded) -> None:
    settings = {**GREEDY, "eos_token_id": list(range(0, 64, 3))}
    for pad in (1, 2):
        made = hybrid.generate(tokens, **settings, pad_token_id=pad)
        assert torch.equal(made, plain(hybrid, tokens, **settings, pad_token_id=pad))


def test_weights_that_moved_are_recorded_anew(hybrid, tokens, recorded) -> None:
    hybrid.generate(tokens, **GREEDY)
    hybrid.double()
    assert torch.equal(hybrid.generate(tokens, **GREEDY), plain(hybrid, tokens, **GREEDY))
    assert len(recorded) == 2


@torch.no_grad()
@pytest.mark.parametrize("take", [0, 1, 3, 9])
def test_tokens_can_be_taken_back(student, tokens, take) -> None:
    cache = RadladsCache(student.config)
    student(tokens[:, :12], past_key_values=cache, use_cache=True)
    cache.activate_past_recording()
    for begin, end in ((12, 18), (18, 19), (19, 21)):
        student(tokens[:, begin:end], past_key_values=cache, use_cache=True)
    cache.crop(-take)
    assert cache.get_seq_length() == 21 - take
    following = torch.tensor([[3, 4], [5, 6]])
    got = student(following, past_key_values=cache).logits
    wanted = student(torch.cat([tokens[:, : 21 - take], following], 1)).logits[:, -2:]
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_long_passes_keep_their_end_alone(hybrid) -> None:
    ids = torch.randint(0, 64, (1, 150), generator=torch.Generator().manual_seed(0))
    cache = RadladsCache(hybrid.config)
    cache.activate_past_recording()
    whole = hybrid(ids, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(whole, hybrid(ids).logits, atol=2e-4, rtol=1e-4)
    recent = next(layer.recent for layer in cache.layers if hasattr(layer, "recent"))
    assert [one.tokens for one in recent] == [64]
    cache.crop(-64)
    got = hybrid(ids[:, 86:90], past_key_values=cache).logits
    torch.testing.assert_close(got, whole[:, 86:90], atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="cannot forget 5 tokens"):
        cache.crop(-5)
    with pytest.raises(ValueError, match="negative"):
        cache.layers[0].crop(2)


def test_assisted_generation_and_prompt_lookup(student, make_teacher, make_student, tokens) -> None:
    wanted = student.generate(tokens[:1], **GREEDY)
    assert torch.equal(student.generate(tokens[:1], **GREEDY, prompt_lookup_num_tokens=4), wanted)
    other = make_student(make_teacher("qwen3", seed=9), attention_layers=(0,))
    for assistant in (student, other):
        assert torch.equal(student.generate(tokens[:1], **GREEDY, assistant_model=assistant), wanted)
    repeats = torch.tensor([[4, 8, 15, 16, 23, 42] * 4])
    made = student.generate(repeats, **GREEDY, prompt_lookup_num_tokens=5)
    assert torch.equal(made, student.generate(repeats, **GREEDY))


@torch.no_grad()
def test_a_cache_is_saved_and_read(student, tokens, tmp_path: Path) -> None:
    cache = student(tokens, use_cache=True).past_key_values
    file = cache.save(tmp_path / "prefix.safetensors")
    read = RadladsCache.load(file, student.config)
    assert read.get_seq_length() == 21
    following = torch.tensor([[3], [4]])
    wanted = student(following, past_key_values=cache.copy()).logits
    assert torch.equal(student(following, past_key_values=read).logits, wanted)
    assert torch.equal(student(following, past_key_values=cache).logits, wanted)


@torch.no_grad()
def test_files_that_are_no_cache_of_this_model(hybrid, make_teacher, make_student, tokens, tmp_path: Path) -> None:
    file = hybrid(tokens, use_cache=True).past_key_values.save(tmp_path / "a.safetensors")
    other = make_student(make_teacher("qwen3"))
    with pytest.raises(ValueError, match="saved by another model"):
        RadladsCache.load(file, other.config)
    with pytest.raises(ValueError, match="has read no tokens"):
        RadladsCache(other.config).save(tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is no saved cache"):
        RadladsCache.load(tmp_path / "c.safetensors", other.config)
    with pytest.raises(FileNotFoundError):
        RadladsCache.load(tmp_path / "d.safetensors", other.config)


@torch.no_grad()
def test_caches_are_joined_as_rows(student, tokens) -> None:
    """A shorter one counts as padded on the left."""
    long, short = (student(tokens[i : i + 1, :n], use_cache=True).past_key_values for i, n in ((0, 21), (1, 13)))
    joined = RadladsCache.join([long.copy(), short.copy()])
    mask = torch.ones(2, 23, dtype=torch.long)
    mask[1, :8] = 0
    following = torch.tensor([[3, 4], [5, 6]])
    got = student(following, past_key_values=joined, attention_mask=mask).logits
    for i, cache in enumerate((long, short)):
        wanted = student(following[i : i + 1], past_key_values=cache).logits
        torch.testing.assert_close(got[i : i + 1], wanted, atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="no cache to join"):
        RadladsCache.join([])
    with pytest.raises(ValueError, match="has read no tokens"):
        RadladsCache.join([long, RadladsCache(student.config)])


@torch.no_grad()
def test_rows_are_picked_out(student, tokens) -> None:
    """Each goes on as alone, without padding that is no longer needed; the joined cache stays as it was."""
    long, short = (student(tokens[i : i + 1, :n], use_cache=True).past_key_values for i, n in ((0, 21), (1, 13)))
    joined, following = RadladsCache.join([long, short]), torch.tensor([[3]])
    before = joined.copy()
    alone = joined.select([1], padding=8)
    assert alone.get_seq_length() == 13
    twice = joined.select([0, 0])
    wanted = [student(following, past_key_values=cache).logits for cache in (long, short)]
    found = student(following, past_key_values=alone).logits
    torch.testing.assert_close(found, wanted[1], atol=2e-4, rtol=1e-4)
    for row in student(following.expand(2, 1), past_key_values=twice).logits.split(1):
        torch.testing.assert_close(row, wanted[0], atol=2e-4, rtol=1e-4)
    mask = torch.ones(2, 22, dtype=torch.long)
    mask[1, :8] = 0
    as_before = [
        student(following.expand(2, 1), past_key_values=x, attention_mask=mask).logits for x in (before, joined)
    ]
    assert torch.equal(*as_before)
    with pytest.raises(ValueError, match=r"there are 2 rows, which are counted from 0; \[2\] are asked for"):
        joined.select([2])
    with pytest.raises(ValueError, match="cannot take 0 rows"):
        joined.select([])
    with pytest.raises(ValueError, match="without 22 of 22 tokens"):
        long.copy().select([0], padding=22)
    with pytest.raises(ValueError, match="has no rows"):
        RadladsCache(student.config).select([0])


def test_long_prompts_are_read_in_pieces(student, tokens, monkeypatch) -> None:
    wanted, sizes = student.generate(tokens, **GREEDY), []
    monkeypatch.setattr("radlads.model.student.modeling.prompt_piece", lambda config, rows, tokens: 8)
    watch = student.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    made = student.generate(tokens, **GREEDY)
    watch.remove()
    assert sizes[:3] == [8, 8, 5]
    assert torch.equal(made, wanted)
    rows = torch.cat([tokens[:1], torch.cat([torch.zeros(1, 9, dtype=torch.long), tokens[1:, :12]], 1)])
    mask = torch.ones_like(rows)
    mask[1, :9] = 0  # the first piece of this row is padding alone
    made = student.generate(rows, attention_mask=mask, **GREEDY)
    assert torch.equal(made[1:, 21:], student.generate(tokens[1:, :12], **GREEDY)[:, 12:])


def test_pieces_fit_the_model() -> None:
    class Config:
        hidden_size, attention_layers = 2048, ()

    assert prompt_piece(Config, 1, 65536) == 8192
    assert prompt_piece(Config, 32, 8192) == 256
    Config.attention_layers = (3,)
    assert prompt_piece(Config, 1, 65536) == 4096
    Config.hidden_size = 576
    assert prompt_piece(Config, 1, 4096) == 32768


def test_static_caches_are_accepted(hybrid, tokens, monkeypatch) -> None:
    wanted, made = hybrid.generate(tokens, **GREEDY), []
    real = kept_layer._with_room
    monkeypatch.setattr(kept_layer, "_with_room", lambda *a, **k: made.append(a[2]) or real(*a, **k))
    assert torch.equal(hybrid.generate(tokens, **GREEDY, cache_implementation="static"), wanted)
    assert made == [40, 40]  # keys and values of the one kept layer, once


@torch.no_grad()
def test_room_grows_and_rows_may_change(hybrid, tokens) -> None:
    cache = RadladsCache(hybrid.config)
    for t in range(12):
        hybrid(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
    cache.reorder_cache(torch.tensor([1, 0]))
    got = hybrid(tokens.flip(0)[:, 12:], past_key_values=cache).logits
    torch.testing.assert_close(got, hybrid(tokens).logits.flip(0)[:, 12:], atol=2e-4, rtol=1e-4)


def test_caches_keep_gradients(hybrid, tokens) -> None:
    embeddings = hybrid.get_input_embeddings()(tokens).detach().requires_grad_()
    cache = RadladsCache(hybrid.config)
    hybrid(inputs_embeds=embeddings[:, :9], past_key_values=cache, use_cache=True)
    hybrid(inputs_embeds=embeddings[:, 9:], past_key_values=cache, use_cache=True).logits.sum().backward()
    parts = embeddings.grad.clone()
    embeddings.grad = None
    hybrid(inputs_embeds=embeddings, use_cache=False).logits[:, 9:].sum().backward()
    torch.testing.assert_close(parts, embeddings.grad, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_torch_compile_has_no_graph_break(make_teacher, make_student, tokens) -> None:
    """With its first layer kept, so that attention, first values and mixers are traced."""
    student = make_student(make_teacher("qwen3"), variant="hxa079", attention_layers=(0,))
    torch._dynamo.reset()
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, use_cache=False).logits, student(tokens).logits, atol=1e-5, rtol=1e-5)
    with torch.enable_grad():  # leaves the graph at the recurrence, and has the same gradients
        student.zero_grad()
        student(tokens, use_cache=False).logits.sin().sum().backward()
        wanted = {name: x.grad.clone() for name, x in student.named_parameters() if x.grad is not None}
        student.zero_grad()
        torch.compile(student, backend="eager")(tokens, use_cache=False).logits.sin().sum().backward()
    for name, x in student.named_parameters():
        if name in wanted:
            torch.testing.assert_close(x.grad, wanted[name], atol=1e-4, rtol=1e-4)


def test_generation_configs_are_not_changed(hybrid, tokens, monkeypatch) -> None:
    monkeypatch.setattr("radlads.model.student.modeling.prompt_piece", lambda config, rows, tokens: 8)
    config = GenerationConfig(**GREEDY)
    hybrid.generate(tokens, generation_config=config)
    assert config.prefill_chunk_size is None


def test_room_for_what_was_read_before(hybrid, recorded) -> None:
    """Neither embeddings nor tokens in a given cache count in generate()'s own greatest length."""
    ids = torch.randint(3, 64, (1, 1020), generator=torch.Generator().manual_seed(0))
    embeddings = hybrid.get_input_embeddings()(ids)
    made = hybrid.generate(inputs_embeds=embeddings, **GREEDY)
    assert torch.equal(made, plain(hybrid, inputs_embeds=embeddings, **GREEDY))
    with torch.no_grad():
        cache = hybrid(ids, use_cache=True).past_key_values
    new, mask = torch.tensor([[3, 4, 5]]), torch.ones(1, 1023, dtype=torch.long)
    made = hybrid.generate(new, attention_mask=mask, past_key_values=cache.copy(), **GREEDY)
    assert torch.equal(made, plain(hybrid, new, attention_mask=mask, past_key_values=cache.copy(), **GREEDY))
    assert len(recorded) == 1


def test_in_and_out_of_inference_mode(student, tokens, recorded) -> None:
    """Its tensors cannot be written outside it: neither a recording's nor a cache's."""
    wanted = plain(student, tokens, **GREEDY)
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            assert torch.equal(student.generate(tokens, **GREEDY), wanted)
    with torch.inference_mode():
        cache = student(tokens[:, :9], use_cache=True).past_key_values
        student(tokens[:, 9:10], past_key_values=cache, use_cache=True)
    with torch.no_grad():
        for t in range(10, 15):
            got = student(tokens[:, t : t + 1], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(got, student(tokens[:, :15]).logits[:, -1:], atol=2e-4, rtol=1e-4)


def test_recordings_stay_with_their_model(hybrid, tokens, recorded) -> None:
    """A copy, or a pickled model, makes its own; and they do not keep a model alive."""
    wanted = hybrid.generate(tokens, **GREEDY)
    for other in (copy.deepcopy(hybrid), pickle.loads(pickle.dumps(hybrid))):
        assert not generation_loop._recordings(other)
        assert torch.equal(other.generate(tokens, **GREEDY), wanted)
    watched = weakref.ref(other)
    gc.collect()
    gc.disable()
    try:
        other.generate(tokens, **GREEDY)
        del other
        recorded.clear()
        assert watched() is None
    finally:
        gc.enable()


def test_two_calls_at_once(hybrid, tokens, recorded) -> None:
    """From inside a criterion, as from another thread: each has its own recording."""
    inner: list[torch.Tensor] = []

    class Nested(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] == 30:
                inner.append(hybrid.generate(tokens.flip(0), **GREEDY))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    made = hybrid.generate(tokens, **GREEDY, stopping_criteria=StoppingCriteriaList([Nested()]))
    assert torch.equal(made, plain(hybrid, tokens, **GREEDY))
    assert torch.equal(inner[0], plain(hybrid, tokens.flip(0), **GREEDY))
    assert len(generation_loop._recordings(hybrid)) == 1


class Adapter(torch.nn.Module):
    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base, self.disabled, self.active = base, False, ["a"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) if self.disabled or not self.active else -self.base(x)


def test_what_changes_a_model_is_recorded_anew(hybrid, tokens, recorded) -> None:
    """Adapters, replaced functions; new values in the same place are followed by the recording itself."""
    hybrid.lm_head = Adapter(hybrid.lm_head)
    changes = (
        lambda: None,
        lambda: setattr(hybrid.lm_head, "disabled", True),
        lambda: hybrid.lm_head.__dict__.update(disabled=False, active=[]),
        lambda: setattr(hybrid.lm_head, "forward", lambda x: 2 * hybrid.lm_head.base(x)),
    )
    for number, change in enumerate(changes, start=1):
        change()
        for _ in range(2):
            hybrid.generate(tokens, **GREEDY)
            assert len(recorded) == number
    with torch.no_grad():
        for parameter in hybrid.parameters():
            parameter.mul_(1.3)
    assert torch.equal(hybrid.generate(tokens, **GREEDY), plain(hybrid, tokens, **GREEDY))
    assert len(recorded) == len(changes)


@torch.no_grad()
def test_a_crop_that_cannot_be_done_changes_nothing(hybrid, tokens) -> None:
    cache = RadladsCache(hybrid.config)
    cache.activate_past_recording()
    hybrid(tokens[:, :18], past_key_values=cache, use_cache=True)
    for reads, too_many in ((slice(18, 18), 19), (slice(18, 20), 3)):
        if reads.stop > reads.start:
            cache.crop(0)
            hybrid(tokens[:, reads], past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match=f"cannot forget {too_many} tokens"):
            cache.crop(-too_many)
        assert {layer.get_seq_length() for layer in cache.layers} == {reads.stop}
    cache.crop(-1)
    got = hybrid(tokens[:, 19:], past_key_values=cache).logits
    torch.testing.assert_close(got, hybrid(tokens).logits[:, 19:], atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_what_lies_before_the_end_of_a_long_pass_cannot_be_taken_back(hybrid) -> None:
    ids = torch.randint(0, 64, (1, 160), generator=torch.Generator().manual_seed(0))
    cache = RadladsCache(hybrid.config)
    cache.activate_past_recording()
    hybrid(ids[:, :10], past_key_values=cache, use_cache=True)
    hybrid(ids[:, 10:], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="cannot forget 70 tokens"):
        cache.crop(-70)
