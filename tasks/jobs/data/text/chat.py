"""Chats as text: which characters the assistant said, and which control tokens the template wrote.

The words of a message never become control tokens: before a template sees them, every text of a control token in them
is put out of its sight (a noncharacter and a private one), and put back after it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.chat_templates import SHIPPED, shipped_chat_templates
from radlads.tasks.jobs.data.text.token_encoder import Control, TokenEncoder
from radlads.tasks.jobs.sources import first_line, resolve_file

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
# Unicode noncharacters, which no text may hold: _HIDDEN and a private character stand for the text of a control token.
_HIDDEN = "\ufdd1"
_NONCHARACTERS = re.compile("[\ufdd0\ufdd1]")
_FIRST_PRIVATE = 0xF0000
# Templates of Llama 3.1 and later write today's date where they are not given one; this is their own fixed default.
_DATE = "26 Jul 2024"
_TURN = re.compile(r"<\|[a-z_]+\|>|\[/?[A-Z_]+\]")


@dataclass(frozen=True)
class Rendered:
    """A chat as the model reads it."""

    text: str
    assistant_spans: tuple[tuple[int, int], ...]
    """Character ranges [start, end) of `text` that the assistant said, its end-of-turn marker included."""
    controls: tuple[Control, ...]
    """The control tokens in `text`; everything else is words."""


@dataclass
class ChatTemplate:
    """A chat template and the tokenizer that reads what it writes."""

    encoder: TokenEncoder
    template: str
    parse: bool = False
    """Whether the text of a control token in a message is that token."""
    _seen_roles: set[tuple[str, bool]] = field(default_factory=set)

    def render(self, messages: Sequence[dict[str, Any]], where: str = "a chat") -> Rendered:
        """Render and find the assistant's part.

        Templates with `{% generation %}` marks say it themselves; for others the text is rendered up to each assistant
        turn, without and with it, and the difference is what the assistant said. An empty thought
        (`<think></think>`) that the template puts before an answer is not the assistant's. Raises UserError, beginning
        with `where`, for a chat that the template refuses, leaves out in part, or rewrites so that the difference
        cannot be told.
        """
        try:
            return self._render(self._hide(list(messages)))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error

    def prompt(self, content: str) -> Rendered:
        """A user's message, up to where the assistant begins. Raises UserError."""
        messages = self._hide([{"role": "user", "content": content}])
        return self._reveal(self._text(messages, add_generation_prompt=True), ())

    def encode(self, rendered: Rendered) -> tuple[list[int], np.ndarray, list[int]]:
        """(ids, spans [tokens, 2], mask): mask is 1 for a token of what the assistant said. Raises UserError."""
        ids, spans, is_control = self.encoder.encode_rendered(rendered.text, rendered.controls)
        mask = np.zeros(len(ids), np.bool_)
        for start, end in rendered.assistant_spans:
            # Some control tokens swallow the space after them: only where they begin counts.
            mask |= (spans[:, 0] < end) & (spans[:, 1] > start) & (~is_control | (spans[:, 0] >= start))
        return ids, spans, mask.astype(int).tolist()

    def _render(self, messages: list[dict[str, Any]]) -> Rendered:
        if _GENERATION_MARKER.search(self.template):
            text, spans = self._marked(messages)
        else:
            text, spans = self._by_prefix(messages)
        self._check_whole(messages, text)
        return self._reveal(text, spans)

    def _marked(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        texts, spans = self._call(messages, return_assistant_tokens_mask=True)
        if not spans[0] and any(message["role"] == "assistant" for message in messages):
            raise UserError("the chat template marks no word of the assistant with {% generation %}")
        return texts[0], [(start, end) for start, end in spans[0]]

    def _by_prefix(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        whole = self._text(messages)
        spans: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if index == 0:
                raise UserError(
                    "the chat begins with the assistant, and the chat template does not mark the assistant's words; "
                    f"begin with a user or system message, or {_way_out()}"
                )
            before = self._text(messages[:index], add_generation_prompt=True)
            after = self._text(messages[: index + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise UserError(
                    "the chat template rewrites earlier turns, so the assistant's tokens cannot be told from the rest; "
                    f"{_way_out()}, or train on single-turn chats"
                )
            spans.append((len(before), len(after)))
        return whole, spans

    def _check_whole(self, messages: list[dict[str, Any]], text: str) -> None:
        """Raises UserError where the template leaves a message out, or writes an object as Python would."""
        for index, message in enumerate(messages):
            calls = [key for key in ("tool_calls", "function_call") if message.get(key)]
            if missing := [key for key in calls if key not in self.template]:
                raise UserError(f"message {index + 1} has {missing[0]}, of which the chat template knows nothing")
            for key in calls:
                self._check_objects(message[key], text, index)
            place = (message["role"], index == 0)
            if place in self._seen_roles:
                continue
            changed = [*messages]
            changed[index] = message | {"content": message["content"] + " x"}
            if self._text(changed) == text:
                raise UserError(
                    f"message {index + 1}: the chat template leaves out what '{message['role']}' says there; drop such "
                    "messages, or give a chat_template that knows the role"
                )
            self._seen_roles.add(place)

    def _check_objects(self, value: Any, text: str, index: int) -> None:
        if isinstance(value, dict | list):
            shown = repr(value)
            if value and shown in text and shown != json.dumps(value, ensure_ascii=False):
                raise UserError(
                    f"message {index + 1}: the chat template writes an object as Python does ({shown[:60]}), not as "
                    "JSON; mend it with `| tojson`"
                )
            for item in value.values() if isinstance(value, dict) else value:
                self._check_objects(item, text, index)

    def _text(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
        text: str = self._call(messages, add_generation_prompt=add_generation_prompt)[0][0]
        return text

    def _call(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        names: dict[str, Any] = {"date_string": _DATE, **self.encoder.tokenizer.special_tokens_map}
        try:
            return render_jinja_template(conversations=[messages], chat_template=self.template, **options, **names)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"the chat template refuses the chat: {first_line(error)}") from error

    def _hide(self, value: Any) -> Any:
        """The messages with every text of a control token hidden. Raises UserError for noncharacters."""
        if isinstance(value, str):
            if _NONCHARACTERS.search(value):
                raise UserError("a message holds U+FDD0 or U+FDD1, which are no characters; remove them")
            return value if self.parse else self.encoder.special_pattern.sub(self._hidden, value)
        if isinstance(value, dict):
            return {key: self._hide(item) for key, item in value.items()}
        return [self._hide(item) for item in value] if isinstance(value, list) else value

    @cached_property
    def _written(self) -> re.Pattern[str]:
        """What is hidden (group 1), or the text of a control token."""
        return re.compile(f"{_HIDDEN}(.)|{self.encoder.special_pattern.pattern}", re.DOTALL)

    def _hidden(self, found: re.Match[str]) -> str:
        return _HIDDEN + chr(_FIRST_PRIVATE + self.encoder.numbers[found[0]])

    def _reveal(self, text: str, spans: Sequence[tuple[int, int]]) -> Rendered:
        """What was hidden put back; spans are of the text with it hidden."""
        specials = self.encoder.specials
        pieces: list[str] = []
        controls: list[Control] = []
        shifts: list[tuple[int, int]] = []  # (place in the text given, characters gained up to there)
        at = length = gained = 0
        for found in self._written.finditer(text):
            pieces.append(text[at : found.start()])
            length += found.start() - at
            at = found.end()
            if found[1] is None:
                pieces.append(found[0])
                controls.append(Control(length, length + len(found[0]), self.encoder.numbers[found[0]]))
            else:
                pieces.append(specials[ord(found[1]) - _FIRST_PRIVATE])
                gained += len(pieces[-1]) - 2
                shifts.append((at, gained))
            length += len(pieces[-1])
        whole = "".join([*pieces, text[at:]])

        def moved(place: int) -> int:
            return place + next((more for end, more in reversed(shifts) if end <= place), 0)

        said = [_words(whole, controls, moved(start), moved(end)) for start, end in spans]
        return Rendered(whole, tuple(span for span in said if span[0] < span[1]), tuple(controls))


def _words(text: str, controls: Sequence[Control], start: int, end: int) -> tuple[int, int]:
    """A span without an empty thought before the answer, and without what follows its end-of-turn token."""
    if thought := _EMPTY_THOUGHT.match(text, start, end):
        start = thought.end()
    words = end
    for control in reversed(controls):
        if control.end > words:
            continue
        if control.start < start or text[control.end : words].strip():
            break
        # Nothing but space and control tokens follows: the turn ends here, or earlier.
        words, end = control.start, control.end
    return start, end


def open_chat_template(encoder: TokenEncoder, name: str | None, *, parse: bool = False) -> ChatTemplate:
    """The template that a source asks for: `template:NAME` for a shipped one, a file, or (None) the tokenizer's own.

    Raises UserError where there is none, where it writes today's date, or where the tokenizer lacks its control tokens.
    """
    if name is not None:
        template = _read(resolve_file(name))
        if name.startswith(SHIPPED):
            _check_known(encoder, template, name.removeprefix(SHIPPED))
        return ChatTemplate(encoder, template, parse)
    tokenizer = encoder.tokenizer
    if not tokenizer.chat_template:
        raise UserError(
            f"messages_field is given, but the tokenizer has no chat template; {_way_out()}, or use text_field"
        )
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise UserError(f"the tokenizer has several chat templates and none is the default; {_way_out()}") from error
    if "strftime_now" in template and "date_string" not in template:
        raise UserError(
            f"the tokenizer's chat template writes today's date, so that tomorrow the same recipe gives other tokens; "
            f"{_way_out()}"
        )
    return ChatTemplate(encoder, template, parse)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the chat template {path} cannot be read: {first_line(error)}") from error


def _check_known(encoder: TokenEncoder, template: str, name: str) -> None:
    known = {token.content for token in encoder.tokenizer.added_tokens_decoder.values()}
    if missing := sorted(set(_TURN.findall(template)) - known):
        raise UserError(
            f"chat_template {name} is not for this tokenizer, which has no token '{missing[0]}'; {_way_out()}"
        )


def _way_out() -> str:
    names = ", ".join(shipped_chat_templates())
    return f"set chat_template on the source: one of {names}, or a Jinja file of your own with {{% generation %}} marks"
