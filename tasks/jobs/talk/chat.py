"""The program of `radlads chat`: a conversation at a terminal with one model, or with several side by side.

`python -m radlads.tasks.jobs.talk.chat request.json`. Lines of standard input are messages; those that begin with a
slash are commands. Ctrl-C ends an answer, not the program.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch
from pydantic import ValidationError

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.document import one_line
from radlads.tasks.contracts.parsing.files import file_errors
from radlads.tasks.contracts.requests.talk import Drawing, TalkRequest
from radlads.tasks.jobs.data.text.chat import ChatTemplate
from radlads.tasks.jobs.process_group import quiet_libraries
from radlads.tasks.jobs.talk.opening import open_models
from radlads.tasks.jobs.talk.speaker import Reply, Speaker

HELP = """\
/reset            forget the conversation
/system TEXT      the system prompt, from here on (it begins a new conversation); without TEXT: none
/set NAME VALUE   temperature, top_p, top_k, repetition_penalty, max_new_tokens, seed; without a name: what is set
/save FILE        write the conversation as JSON
/help             this list
/exit             leave (also Ctrl-D); Ctrl-C ends an answer"""


class Conversation:
    """Messages, and the models that answer them."""

    def __init__(self, speakers: dict[str, Speaker], template: ChatTemplate | None, request: TalkRequest) -> None:
        """template: None for a tokenizer without one: what is typed is continued as it is."""
        self.speakers, self.template = speakers, template
        self.system, self.sampling = request.system, request.sampling
        self.stop = False
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.messages = {name: list(first) for name in self.speakers}
        self.numbers: dict[str, list[dict[str, Any]]] = {name: [] for name in self.speakers}
        for speaker in self.speakers.values():
            speaker.reset()

    def ask(self, name: str, text: str, on_text: Callable[[str], None]) -> Reply:
        """One model's answer to a message. Raises UserError where the template refuses the conversation."""
        said, speaker = self.messages[name], self.speakers[name]
        said.append({"role": "user", "content": text})
        try:
            ids = self._ids(name)
            if not ids:
                raise UserError("the chat template writes nothing for this conversation: there is nothing to answer")
            answer = speaker.answer(ids, self.sampling, on_text, lambda: self.stop)
        except BaseException:
            said.pop()
            raise
        said.append({"role": "assistant", "content": answer.text})
        kept = ("tokens", "first_seconds", "rate", "length", "memory", "stopped")
        self.numbers[name].append({key: getattr(answer, key) for key in kept})
        return answer

    def set(self, name: str, value: str) -> None:
        """Change how answers are drawn. Raises UserError."""
        if name not in Drawing.model_fields:
            raise UserError(f"/set {one_line(name, 30)}: choose from {', '.join(Drawing.model_fields)}")
        changed = self.sampling.model_dump() | {name: None if value in ("none", "") else value}
        try:
            self.sampling = Drawing.model_validate(changed, strict=False)
        except ValidationError as error:
            raise UserError(f"/set {name}: {error.errors()[0]['msg']}") from error

    def save(self, path: str) -> Path:
        """Write what was said. Raises UserError where that cannot be done."""
        if not path:
            raise UserError("/save needs the name of a file")
        told = {name: {"messages": self.messages[name], "answers": self.numbers[name]} for name in self.speakers}
        with file_errors(path):
            target = Path(path).expanduser()
            target.write_text(
                json.dumps({"sampling": self.sampling.model_dump(), "models": told}, indent=1, ensure_ascii=False),
                encoding="utf-8",
            )
        return target

    def _ids(self, name: str) -> list[int]:
        """The conversation as tokens: what was read and said as it was, then the new message. A text can be tokens in
        several ways, and a model's own are not always those that its tokenizer would choose."""
        said, speaker = self.messages[name], self.speakers[name]
        if self.template is None:
            ids = speaker.tokenizer(said[-1]["content"], add_special_tokens=not speaker.heard).input_ids
            return [*speaker.heard, *ids]
        rest = self.template.ids_after(said, len(said) - 2) if speaker.heard else None
        if rest is None:
            return self.template.conversation_ids(said)
        return [*speaker.heard, *(rest[1:] if rest[:1] == speaker.heard[-1:] else rest)]


def run(conversation: Conversation, lines: Iterator[str], out: TextIO) -> None:
    """Reply line after line, to the end of them or /exit."""
    several = len(conversation.speakers) > 1
    for line in lines:
        text = line.strip()
        if not text:
            continue
        try:
            if not _is_text(text):
                raise UserError("this line is no UTF-8 text; it was not read")
            if text.startswith("/"):
                if text in ("/exit", "/quit"):
                    return
                _say(out, _command(conversation, text))
                continue
            for name in conversation.speakers:
                if several:
                    _say(out, f"[{name}]")
                conversation.stop = False
                answer = conversation.ask(name, text, lambda part: _write(out, part))
                _say(out, f"\n({describe(answer)})")
                if answer.stopped:
                    break
        except UserError as error:
            _say(out, str(error))
        except torch.OutOfMemoryError:
            _say(out, "\nthere is not enough memory for this conversation; /reset begins a new one")


def _is_text(line: str) -> bool:
    """Whether a line was UTF-8: bytes that are not arrive as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in line)


def describe(answer: Reply) -> str:
    """The numbers of an answer in one line."""
    rate = "" if answer.rate is None else f", {answer.rate:,.1f} tokens/s"
    stopped = ", stopped" if answer.stopped else ""
    return (
        f"{answer.tokens} tokens{stopped}, first after {answer.first_seconds:.2f} s{rate}; {answer.length:,} tokens so "
        f"far, remembered in {answer.memory / 2**20:,.1f} MiB"
    )


def _command(conversation: Conversation, text: str) -> str:
    name, _, rest = text.partition(" ")
    rest = rest.strip()
    if name == "/reset":
        conversation.reset()
        return "a new conversation"
    if name == "/system":
        conversation.system = rest or None
        conversation.reset()
        return "a new conversation, " + ("with this system prompt" if rest else "without a system prompt")
    if name == "/set":
        key, _, value = rest.partition(" ")
        if key:
            conversation.set(key.replace("-", "_"), value.strip())
        return ", ".join(f"{key} {value}" for key, value in conversation.sampling.model_dump().items())
    if name == "/save":
        return f"written to {conversation.save(rest)}"
    if name == "/help":
        return HELP
    raise UserError(f"there is no command {one_line(name, 30)}; /help lists them")


def open_conversation(request: TalkRequest) -> Conversation:
    """Load the models. Raises UserError."""
    opened = open_models(request)
    if opened.template is None and request.system is not None:
        raise UserError("--system needs a chat template, which this tokenizer does not have; give --chat-template")
    speakers = {name: Speaker(model, opened.tokenizer) for name, model in opened.models.items()}
    return Conversation(speakers, opened.template, request)


def _lines(prompt: str) -> Iterator[str]:
    """What is typed or piped, until its end; Ctrl-C at the prompt clears the line."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its history and editing
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n(Ctrl-D or /exit leaves)\n")


def _write(out: TextIO, text: str) -> None:
    out.write(text)
    out.flush()


def _say(out: TextIO, text: str) -> None:
    _write(out, text + "\n")


def main() -> int:
    """Talk; the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    quiet_libraries()
    request = TalkRequest.model_validate_json(Path(sys.argv[1]).read_bytes())
    try:
        conversation = open_conversation(request)
    except UserError as error:
        sys.stderr.write(f"radlads: {error}\n")
        return 2

    def on_sigint(number: int, frame: FrameType | None) -> None:
        if conversation.stop or frame is None:
            raise KeyboardInterrupt
        conversation.stop = True

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text is refused, and the next one read
    asked = _lines("> ")

    def lines() -> Iterator[str]:
        while True:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                line = next(asked)
            except StopIteration:
                return
            conversation.stop = False
            signal.signal(signal.SIGINT, on_sigint)
            yield line

    if conversation.template is None:
        _say(sys.stdout, "this tokenizer has no chat template: what you type is continued as it is")
    _say(sys.stdout, f"{', '.join(conversation.speakers)}; /help lists the commands")
    try:
        run(conversation, lines(), sys.stdout)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
