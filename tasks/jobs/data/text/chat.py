"""Renders chats as text, with the character ranges of the assistant and of the template's control tokens.

Message text never becomes control tokens: before rendering, each occurrence of a control token's text in a message is
replaced by a placeholder (a noncharacter and a private-use character), and it is restored afterwards.
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
from radlads.tasks.contracts.recipe.data.chat_templates import SHIPPED, shipped_chat_templates
from radlads.tasks.jobs.data.text.token_encoder import BARE, Control, TokenEncoder, prompt_frame
from radlads.tasks.jobs.sources import first_line, resolve_file

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
# Unicode noncharacters, rejected in messages. _HIDDEN and a private-use character replace the text of a control token.
_HIDDEN = "\ufdd1"
_NONCHARACTERS = re.compile("[\ufdd0\ufdd1]")
_FIRST_PRIVATE = 0xF0000
# Templates of Llama 3.1 and later write today's date unless one is given; this is their own fixed default.
_DATE = "26 Jul 2024"
_TURN = re.compile(r"<\|[a-z_]+\|>|\[/?[A-Z_]+\]")


@dataclass(frozen=True)
class Rendered:
    """A chat rendered by its template."""

    text: str
    assistant_spans: tuple[tuple[int, int], ...]
    """Character ranges [start, end) of the assistant in `text`, end-of-turn marker included."""
    controls: tuple[Control, ...]
    """The control tokens in `text`; everything else is plain text."""


@dataclass
class ChatTemplate:
    """A chat template and the encoder for its output."""

    encoder: TokenEncoder
    template: str
    parse: bool = False
    """Whether a control token's text in a message is encoded as that token."""
    _seen_roles: set[tuple[str, bool]] = field(default_factory=set)

    def render(self, messages: Sequence[dict[str, Any]], where: str = "a chat") -> Rendered:
        """Render a chat and locate the assistant's text.

        Templates with `{% generation %}` marks give its ranges. For others the chat is rendered up to each assistant
        turn, without it and with it; the difference is the assistant's text. An empty thought (`<think></think>`) that
        the template adds before an answer does not count. Raises UserError, prefixed with `where`, if the template
        rejects the chat, drops a message, or rewrites earlier turns.
        """
        try:
            return self._render(self._hide(list(messages)))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error

    def prompt(self, content: str) -> Rendered:
        """Render one user message and the generation prompt. Raises UserError."""
        messages = self._hide([{"role": "user", "content": content}])
        return self._reveal(self._text(messages, add_generation_prompt=True), ())

    def conversation_ids(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The ids of a conversation and the generation prompt. Raises UserError."""
        rendered = self._reveal(self._text(self._hide(list(messages)), add_generation_prompt=True), ())
        return self.encode(rendered)[0]

    def ids_after(self, messages: Sequence[dict[str, Any]], answer: int) -> list[int] | None:
        """The ids that follow the content of messages[answer], an assistant's, up to the next generation prompt; None
        where the template rewrites what came before. Raises UserError."""
        hidden = self._hide(list(messages))
        before = self._text(hidden[:answer], add_generation_prompt=True) + hidden[answer]["content"]
        whole = self._text(hidden, add_generation_prompt=True)
        return self.encode(self._reveal(whole[len(before) :], ()))[0] if whole.startswith(before) else None

    def prompt_ids(self, content: str, *, add_bos: bool | None = None) -> tuple[str, list[int]]:
        """(text, ids) of one user message and the generation prompt, with BOS before it if add_bos is set and the
        template writes none. Raises UserError."""
        rendered = self.prompt(content)
        ids, _, _ = self.encode(rendered)
        before, _ = (prompt_frame(self.encoder.tokenizer, True) if add_bos else BARE).around(ids)
        return rendered.text, [*before, *ids]

    def encode(self, rendered: Rendered) -> tuple[list[int], np.ndarray, list[int]]:
        """(ids, spans [tokens, 2], mask [tokens]): mask is 1 for tokens of the assistant. Raises UserError."""
        ids, spans, is_control = self.encoder.encode_rendered(rendered.text, rendered.controls)
        mask = np.zeros(len(ids), np.bool_)
        for start, end in rendered.assistant_spans:
            # Some control tokens include the following space, so only their start counts.
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
            raise UserError("the chat template marks no assistant text with {% generation %}")
        return texts[0], [(start, end) for start, end in spans[0]]

    def _by_prefix(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        whole = self._text(messages)
        spans: list[tuple[int, int]] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if index == 0:
                raise UserError(
                    "the chat begins with the assistant, and the chat template has no {% generation %} marks; "
                    f"begin with a user or system message, or {_way_out()}"
                )
            before = self._text(messages[:index], add_generation_prompt=True)
            after = self._text(messages[: index + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise UserError(
                    "the chat template rewrites earlier turns, so the assistant's tokens cannot be located; "
                    f"{_way_out()}, or train on single-turn chats"
                )
            spans.append((len(before), len(after)))
        return whole, spans

    def _check_whole(self, messages: list[dict[str, Any]], text: str) -> None:
        """Raises UserError if the template drops a message, or prints an object in Python syntax."""
        for index, message in enumerate(messages):
            calls = [key for key in ("tool_calls", "function_call") if message.get(key)]
            if missing := [key for key in calls if key not in self.template]:
                raise UserError(f"message {index + 1} has {missing[0]}, which the chat template does not support")
            for key in calls:
                self._check_objects(message[key], text, index)
            place = (message["role"], index == 0)
            if place in self._seen_roles:
                continue
            changed = [*messages]
            changed[index] = message | {"content": message["content"] + " x"}
            if self._text(changed) == text:
                raise UserError(
                    f"message {index + 1}: the chat template drops the '{message['role']}' message; remove such "
                    "messages, or set a chat_template that supports the role"
                )
            self._seen_roles.add(place)

    def _check_objects(self, value: Any, text: str, index: int) -> None:
        if isinstance(value, dict | list):
            shown = repr(value)
            if value and shown in text and shown != json.dumps(value, ensure_ascii=False):
                raise UserError(
                    f"message {index + 1}: the chat template prints an object in Python syntax ({shown[:60]}), not "
                    "as JSON; use `| tojson` in the template"
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
            raise UserError(f"the chat template rejects the chat: {first_line(error)}") from error

    def _hide(self, value: Any) -> Any:
        """Replace control-token text in the messages by placeholders. Raises UserError for noncharacters."""
        if isinstance(value, str):
            if _NONCHARACTERS.search(value):
                raise UserError("a message contains U+FDD0 or U+FDD1, which are not characters; remove them")
            return value if self.parse else self.encoder.special_pattern.sub(self._hidden, value)
        if isinstance(value, dict):
            return {key: self._hide(item) for key, item in value.items()}
        return [self._hide(item) for item in value] if isinstance(value, list) else value

    @cached_property
    def _written(self) -> re.Pattern[str]:
        """Matches a placeholder (group 1) or the text of a control token."""
        return re.compile(f"{_HIDDEN}(.)|{self.encoder.special_pattern.pattern}", re.DOTALL)

    def _hidden(self, match: re.Match[str]) -> str:
        return _HIDDEN + chr(_FIRST_PRIVATE + self.encoder.numbers[match[0]])

    def _reveal(self, text: str, spans: Sequence[tuple[int, int]]) -> Rendered:
        """Restore the text behind placeholders; spans refer to the text with placeholders."""
        specials = self.encoder.specials
        pieces: list[str] = []
        controls: list[Control] = []
        shifts: list[tuple[int, int]] = []  # (offset in the given text, characters added before it)
        at = length = gained = 0
        for match in self._written.finditer(text):
            pieces.append(text[at : match.start()])
            length += match.start() - at
            at = match.end()
            if match[1] is None:
                pieces.append(match[0])
                controls.append(Control(length, length + len(match[0]), self.encoder.numbers[match[0]]))
            else:
                pieces.append(specials[ord(match[1]) - _FIRST_PRIVATE])
                gained += len(pieces[-1]) - 2
                shifts.append((at, gained))
            length += len(pieces[-1])
        whole = "".join([*pieces, text[at:]])

        def moved(offset: int) -> int:
            return offset + next((more for end, more in reversed(shifts) if end <= offset), 0)

        trimmed = [_words(whole, controls, moved(start), moved(end)) for start, end in spans]
        return Rendered(whole, tuple(span for span in trimmed if span[0] < span[1]), tuple(controls))


def _words(text: str, controls: Sequence[Control], start: int, end: int) -> tuple[int, int]:
    """Trim a span: no empty thought before the answer, nothing after the end-of-turn token."""
    if thought := _EMPTY_THOUGHT.match(text, start, end):
        start = thought.end()
    turn_end = end
    for control in reversed(controls):
        if control.end > turn_end:
            continue
        if control.start < start or text[control.end : turn_end].strip():
            break
        # Only whitespace and control tokens follow: the turn ends here or earlier.
        turn_end, end = control.start, control.end
    return start, end


def open_chat_template(encoder: TokenEncoder, name: str | None, *, parse: bool = False) -> ChatTemplate:
    """Open a shipped template (`template:NAME`), a template file, or the tokenizer's own (None).

    Raises UserError if there is none, if it writes today's date, or if the tokenizer lacks its control tokens.
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
            f"the tokenizer's chat template writes today's date, so the tokens would change from day to day; "
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
    return f"set chat_template on the source: one of {names}, or your own Jinja file with {{% generation %}} marks"
