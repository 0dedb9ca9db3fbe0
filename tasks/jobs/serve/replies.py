"""Answers in the form of OpenAI's API: whole, or as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from radlads.tasks.jobs.serve.ticket import AnswerPart

DONE = "data: [DONE]\n\n"


def event(value: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


class ReplyForm:
    """How the answer to one request is written."""

    def __init__(self, model: str, prompt_tokens: int, *, is_chat: bool, tells_usage: bool) -> None:
        self._prompt_tokens, self._is_chat, self._tells_usage = prompt_tokens, is_chat, tells_usage
        kind = "chat.completion" if is_chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, parts: list[AnswerPart]) -> dict[str, Any]:
        """The answer in one piece."""
        text, last = "".join(part.text for part in parts), parts[-1]
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": last.finish}
        return {**self._head, "choices": [choice], "usage": self._usage(last)}

    def begin(self) -> str:
        """What a stream begins with."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None) if self._is_chat else ""

    def part(self, part: AnswerPart) -> str:
        """A part of a stream, with the end of the stream after the last one."""
        text = {"delta": {"content": part.text}} if self._is_chat else {"text": part.text}
        if part.finish is None:
            return self._chunk(text, None)
        said = self._chunk(text, None) if part.text else ""
        said += self._chunk({"delta": {}} if self._is_chat else {"text": ""}, part.finish)
        if self._tells_usage:
            said += event(self._chunk_head() | {"choices": [], "usage": self._usage(part)})
        return said + DONE

    def _chunk(self, said: dict[str, Any], finish: str | None) -> str:
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        return event(self._chunk_head() | {"choices": [choice]} | ({"usage": None} if self._tells_usage else {}))

    def _chunk_head(self) -> dict[str, Any]:
        return self._head | ({"object": "chat.completion.chunk"} if self._is_chat else {})

    def _usage(self, last: AnswerPart) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": last.tokens,
            "total_tokens": self._prompt_tokens + last.tokens,
        }
