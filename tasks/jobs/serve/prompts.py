"""Messages and texts of requests as tokens."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.document import one_line
from radlads.tasks.jobs.data.text.chat import ChatTemplate
from radlads.tasks.jobs.data.text.messages import read_messages
from radlads.tasks.jobs.serve.parameters import AnswerRequest
from radlads.tasks.jobs.serve.refusal import ApiError

_ROLES = ("system", "user", "assistant")
_CALLS = ("tool_calls", "function_call")


class PromptReader:
    """Turns what was asked into tokens. For one thread: a tokenizer's settings may change while it encodes."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None, words: int, longest: int
    ) -> None:
        """template: None refuses chats. words: of the model's vocabulary. longest: prompt, in tokens."""
        self._tokenizer, self._template, self._words, self._longest = tokenizer, template, words, longest

    def ids(self, asked: AnswerRequest) -> list[int]:
        """The prompt's tokens. Raises ApiError."""
        ids = self._chat(asked.prompt) if asked.is_chat else self._text(asked.prompt)
        param = "messages" if asked.is_chat else "prompt"
        if not ids:
            raise ApiError(400, f"{param} is no text at all: there is nothing to answer", param=param)
        if len(ids) > self._longest:
            said = (
                f"the prompt has {len(ids):,} tokens; this server reads at most {self._longest:,} (--max-prompt-tokens)"
            )
            raise ApiError(400, said, param=param, code="context_length_exceeded")
        return ids

    def _chat(self, value: Any) -> list[int]:
        if self._template is None:
            raise ApiError(
                400,
                "this model's tokenizer has no chat template: use /v1/completions, or start the server with "
                "--chat-template",
                param="messages",
            )
        try:
            messages = [_checked(number, one) for number, one in enumerate(read_messages(value, "messages"), start=1)]
            return self._template.conversation_ids(messages)
        except UserError as error:
            raise ApiError(400, one_line(str(error)), param="messages") from error

    def _text(self, prompt: Any) -> list[int]:
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            prompt = prompt[0]
        if isinstance(prompt, str):
            ids: list[int] = self._tokenizer(prompt).input_ids
            return ids
        if any(isinstance(one, str | list) for one in prompt):
            said = (
                "several prompts in one request are not supported: send a request for each, they are answered together"
            )
            raise ApiError(400, said, param="prompt")
        if not all(type(one) is int and 0 <= one < self._words for one in prompt):
            raise ApiError(
                400, f"prompt: ids of tokens are whole numbers from 0 to {self._words - 1:,}", param="prompt"
            )
        return list(prompt)


def _checked(number: int, message: dict[str, Any]) -> dict[str, Any]:
    """A message of a role that templates know; OpenAI's newer name of `system` is `developer`. Raises UserError."""
    role = "system" if message["role"] == "developer" else message["role"]
    if role not in _ROLES or any(message.get(key) for key in _CALLS):
        what = f"the role '{one_line(role, 40)}'" if role not in _ROLES else "a call of a tool"
        raise UserError(f"messages, message {number}: {what} is not supported; there are {', '.join(_ROLES)}")
    return {"role": role, "content": message["content"]}
