"""Converts chat messages of a data file to the form that templates read: role, text content, tool calls.

Non-text content (images, audio, other objects) is rejected.
"""

from __future__ import annotations

import json
from typing import Any

from radlads.tasks.contracts.errors import UserError

_CALLS = ("tool_calls", "function_call")


def read_messages(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """The messages of one row. Raises UserError, naming the row and the message, for anything but a text chat.

    Lists of text parts are concatenated, as templates that accept parts do. Keys with a null value are dropped.
    Tool-call arguments given as JSON text are parsed.
    """
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: expected a list of {{role, content}} messages, got {_kind(value)}")
    return tuple(_message(message, f"{where}, message {number}") for number, message in enumerate(value, start=1))


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object with role and content, got {_kind(value)}")
    message = {key: item for key, item in value.items() if item is not None}
    if not isinstance(message.get("role"), str) or not message["role"].strip():
        hint = (
            "; this looks like the ShareGPT form, whose from/value must become role/content" if "from" in value else ""
        )
        raise UserError(f"{where}: it has no role (a text such as user or assistant){hint}")
    calls = [key for key in _CALLS if message.get(key)]
    if "content" not in message:
        if not calls:
            raise UserError(f"{where}: the {message['role']} message has no content")
        message["content"] = ""
    message["content"] = _content(message["content"], where)
    if "tool_calls" in calls:
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
    return message


def _content(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise UserError(f"{where}: its content is {_kind(value)}; expected text, or a list of text parts")
    return "".join(_part(part, where) for part in value)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else _kind(part)
    if kind == "text" and not isinstance(part.get("text"), str):
        raise UserError(f"{where}: a text part of its content has no text; add the key 'text', a string")
    if kind != "text":
        raise UserError(f"{where}: a part of its content is '{kind}', but only text is supported; remove it")
    text: str = part["text"]
    return text


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise UserError(f"{where}: tool_calls is {_kind(value)}; expected a list of objects")
    return [_tool_call(call) for call in value]


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    call = {key: item for key, item in call.items() if item is not None}
    if isinstance(call.get("function"), dict):
        call["function"] = _tool_call(call["function"])
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return call  # not JSON: keep the text
        if isinstance(parsed, dict):
            call["arguments"] = parsed
    return call


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "nothing (null)", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
