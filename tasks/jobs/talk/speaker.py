"""A model that answers in a conversation: what it has read stays in its cache, so that a turn costs its own tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from radlads.model.student.cache import RadladsCache
from radlads.model.student.releases import cache_keyword
from radlads.tasks.contracts.requests.talk import Drawing


@dataclass(frozen=True)
class Reply:
    """What a model said, and what it took."""

    text: str
    tokens: int
    first_seconds: float
    """From the question to the first token."""
    rate: float | None
    """Tokens a second after the first; None for fewer than two."""
    length: int
    """Tokens of the conversation so far."""
    memory: int
    """Bytes that the model remembers of it."""
    stopped: bool
    """Whether it was interrupted."""


class Speaker:
    """A model and its memory of one conversation."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._own = model.generation_config
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self.heard: list[int] = []
        """All tokens so far, its own last one included."""
        self._read = 0
        student = hasattr(self.model, "mixers")
        self._cache: Any = RadladsCache(self.model.config) if student else DynamicCache(config=self.model.config)

    def answer(
        self, ids: Sequence[int], sampling: Drawing, on_text: Callable[[str], None], stopped: Callable[[], bool]
    ) -> Reply:
        """Continue the conversation `ids`. on_text: gets the answer's text as it comes. stopped: asked after each
        token. After an error all is forgotten: what was read of it is not known."""
        try:
            return self._answer(ids, sampling, on_text, stopped)
        except BaseException:
            self.reset()
            raise

    def _answer(
        self, ids: Sequence[int], sampling: Drawing, on_text: Callable[[str], None], stopped: Callable[[], bool]
    ) -> Reply:
        known = self.heard[: self._read]
        if list(ids[: len(known)]) != known or len(ids) == len(known):
            self.reset()  # a template may rewrite earlier turns: a state cannot forget them
        began, streamer = time.perf_counter(), _Stream(self.tokenizer, on_text)
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        prompt = torch.tensor([list(ids)], device=self.model.device)
        generate: Any = self.model.generate
        with torch.no_grad():
            whole: Tensor = generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=self._settings(sampling),
                **{cache_keyword(self.model): self._cache},
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_Asks(stopped)]),
            )
        made = whole[0, len(ids) :].tolist()
        self.heard, self._read = whole[0].tolist(), self._cache.get_seq_length()
        spent = streamer.last - streamer.first
        return Reply(
            text=str(self.tokenizer.decode(made, skip_special_tokens=True)),
            tokens=len(made),
            first_seconds=streamer.first - began,
            rate=(len(made) - 1) / spent if len(made) > 1 and spent > 0 else None,
            length=whole.shape[1],
            memory=_held(self._cache),
            stopped=stopped(),
        )

    def _settings(self, sampling: Drawing) -> GenerationConfig:
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.temperature > 0,
            repetition_penalty=sampling.repetition_penalty,
            eos_token_id=self._own.eos_token_id,
            pad_token_id=self._own.pad_token_id,
            bos_token_id=self._own.bos_token_id,
        )
        if sampling.temperature > 0:
            config.update(temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
        if config.pad_token_id is None and config.eos_token_id is not None:
            ends = config.eos_token_id
            config.pad_token_id = ends[0] if isinstance(ends, list) else ends
        return config


class _Stream(TextStreamer):
    """Hands on text as soon as no later token can change it, and notes when tokens came."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text, self._began = on_text, False
        self.first = self.last = time.perf_counter()

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.last = time.perf_counter()
            if not self._began:
                self._began, self.first = True, self.last
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)


class _Asks(StoppingCriteria):
    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self._stopped(), device=input_ids.device, dtype=torch.bool)


def _held(cache: Any) -> int:
    """Bytes of a cache."""
    if isinstance(cache, RadladsCache):
        return cache.num_bytes()
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)
