"""What clients may ask: the parameters of OpenAI's API that this server has, and a clear line for those it has not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from radlads.tasks.contracts.errors import did_you_mean
from radlads.tasks.contracts.parsing.document import one_line, shown
from radlads.tasks.contracts.requests.serve import ServingLimits
from radlads.tasks.contracts.requests.talk import Drawing
from radlads.tasks.jobs.serve.refusal import ApiError

_MOST_STOPS = 4
_LONGEST_STOP = 256
_COMPLETION_TOKENS = 16  # of /v1/completions without max_tokens, as OpenAI's API has it
_LABELS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})
"""They say who asks, and change no answer."""
# Parameters that this server does not have → the values that change nothing; None is always one.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
}


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Common(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    model: str
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None

    @field_validator("stop")
    @classmethod
    def _are_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        texts = [value] if isinstance(value, str) else value or []
        if len(texts) > _MOST_STOPS:
            raise ValueError(f"at most {_MOST_STOPS} texts")
        if not all(0 < len(text) <= _LONGEST_STOP for text in texts):
            raise ValueError(f"texts of 1 to {_LONGEST_STOP} characters")
        return value


class _Chat(_Common):
    messages: list[Any] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)


class _Completion(_Common):
    prompt: str | list[Any]


@dataclass(frozen=True)
class AnswerRequest:
    """A request that can be answered."""

    model: str
    prompt: str | list[Any]
    """Messages of a chat; else a text, or ids of tokens."""
    is_chat: bool
    drawing: Drawing
    stops: tuple[str, ...]
    streams: bool
    tells_usage: bool
    """Whether a stream ends with the numbers of tokens."""


def read_json(body: bytes) -> Any:
    """A request's body. Raises ApiError."""
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "the request has half of a surrogate pair, which is no character") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the request is no JSON: {one_line(str(error), 120)}") from None
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def read_request(value: Any, limits: ServingLimits, *, is_chat: bool) -> AnswerRequest:
    """What a body asks for. Raises ApiError, of which parameter and how to mend it."""
    kind = _Chat if is_chat else _Completion
    if not isinstance(value, dict):
        raise ApiError(400, "the request must be a JSON object")
    _refuse_unsupported(value, kind)
    given = {k: v for k, v in value.items() if k in kind.model_fields}
    try:
        asked: Any = kind.model_validate(given)
    except ValidationError as error:
        raise _of_field(error) from None
    streams = bool(asked.stream)
    if asked.stream_options is not None and not streams:
        raise ApiError(400, "stream_options is for stream=true; leave it out", param="stream_options")
    return AnswerRequest(
        model=asked.model,
        prompt=asked.messages if is_chat else asked.prompt,
        is_chat=is_chat,
        drawing=_drawing(asked, _length(asked, limits, is_chat=is_chat)),
        stops=tuple([asked.stop] if isinstance(asked.stop, str) else asked.stop or ()),
        streams=streams,
        tells_usage=asked.stream_options is not None and bool(asked.stream_options.include_usage),
    )


def _refuse_unsupported(value: Mapping[str, Any], kind: type[_Common]) -> None:
    for name, given in value.items():
        if name in kind.model_fields or name in _LABELS or given is None:
            continue
        if name not in _UNSUPPORTED:
            hint = did_you_mean(name, kind.model_fields)
            said = f"there is no parameter '{one_line(name, 60)}'{hint}"
            raise ApiError(400, said, param=one_line(name, 60), code="unknown_parameter")
        if not any(given == one and type(given) is type(one) for one in _UNSUPPORTED[name]):
            said = f"{name}={shown(given)} is not supported by this server; leave it out"
            raise ApiError(400, said, param=name, code="unsupported_parameter")


def _length(asked: Any, limits: ServingLimits, *, is_chat: bool) -> int:
    """The most tokens of the answer."""
    named = asked.max_completion_tokens if is_chat else None
    name = "max_tokens" if named is None else "max_completion_tokens"
    if named is not None and asked.max_tokens is not None:
        raise ApiError(400, "give max_completion_tokens or max_tokens, not both", param="max_tokens")
    wanted = asked.max_tokens if named is None else named
    if wanted is None:
        return min(limits.max_new_tokens, limits.max_new_tokens if is_chat else _COMPLETION_TOKENS)
    if wanted > limits.max_new_tokens:
        number = f"{wanted:,}" if wanted < 10**15 else "too large"
        said = f"{name} is {number}; this server writes at most {limits.max_new_tokens:,} tokens (--max-new-tokens)"
        raise ApiError(400, said, param=name)
    return int(wanted)


def _drawing(asked: Any, length: int) -> Drawing:
    """As OpenAI's API draws where nothing is said: temperature 1, all tokens."""
    drawn = {"temperature": 1.0, "top_p": 1.0, "seed": None} | {
        name: value for name in ("temperature", "top_p", "seed") if (value := getattr(asked, name)) is not None
    }
    try:
        return Drawing(**drawn, max_new_tokens=length)
    except ValidationError as error:
        raise _of_field(error) from None


def _of_field(error: ValidationError) -> ApiError:
    fault = error.errors(include_url=False, include_input=False)[0]
    place = [str(part) for part in fault["loc"]]
    said = str(fault["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{place[0]}: {said[:1].lower() + said[1:]}", param=place[0])
