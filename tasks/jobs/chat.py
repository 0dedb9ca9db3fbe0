"""Chats as text, with the spans that the assistant said."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from radlads.tasks.job import UserError
from radlads.tasks.jobs.sources import first_line

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """A chat as the model reads it."""

    text: str
    assistant_spans: tuple[tuple[int, int], ...]
    """Character ranges [start, end) of `text` that the assistant said, its end-of-turn marker included."""


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]]) -> Rendered:
    """Render with the tokenizer's chat template and find the assistant's part.

    Templates with `{% generation %}` markers say it themselves; for others the text is rendered up to each assistant
    turn, without and with it, and the difference is what the assistant said. Raises UserError when there is no
    template, or when it rewrites earlier turns so that the difference cannot be told.
    """
    template = tokenizer.chat_template
    if not template:
        raise UserError("messages_field is given, but the tokenizer has no chat template; use text_field, or add one")
    if _GENERATION_MARKER.search(tokenizer.get_chat_template()):
        return _render_marked(tokenizer, messages)
    return _render_by_prefix(tokenizer, messages)


def _render_marked(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]]) -> Rendered:
    names: dict[str, Any] = dict(tokenizer.special_tokens_map)
    try:
        rendered: Any = render_jinja_template(
            conversations=[list(messages)],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **names,
        )
    except (TemplateError, TypeError) as error:
        raise UserError(f"the chat template refuses a chat: {first_line(error)}") from error
    texts, spans = rendered
    return Rendered(texts[0], tuple((start, end) for start, end in spans[0]))


def _render_by_prefix(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]]) -> Rendered:
    whole = _render(tokenizer, messages)
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:index], add_generation_prompt=True)
        after = _render(tokenizer, messages[: index + 1])
        if not (after.startswith(before) and whole.startswith(after)):
            raise UserError(
                "the chat template rewrites earlier turns, so the assistant's tokens cannot be told from the rest; "
                "mark them in the template with {% generation %}, or train on single-turn chats"
            )
        spans.append((len(before), len(after)))
    return Rendered(whole, tuple(spans))


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError) as error:
        raise UserError(f"the chat template refuses a chat: {first_line(error)}") from error
    return str(text)
