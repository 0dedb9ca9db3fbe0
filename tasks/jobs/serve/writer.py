"""Tokens as text while they come: nothing that a later token changes is handed on, and nothing from a stop text on."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"
_MOST_PENDING = 12
"""Tokens whose text ends in a broken character that are waited for: a character has four bytes at most, but each token
may begin the next one. More are no text."""


class Writer:
    """The text of one answer."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = (), prompt: Sequence[int] = ()
    ) -> None:
        """stops: the first of these texts ends the answer, and is no part of it. prompt: the tokens of a text that the
        answer continues; without them a tokenizer may drop its first space."""
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids = list(prompt[-_MOST_PENDING:])
        """The last tokens that were handed on, then those that were not."""
        if self._decode(self._ids).endswith(_BROKEN):  # amid a character, of which no part can be told from the prompt
            self._ids = []
        self._read = len(self._ids)
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain now."""
        self._ids.append(token)
        # Decoded with the tokens before them, since a tokenizer may drop a space at the beginning.
        before, now = self._decode(self._ids[: self._read]), self._decode(self._ids)
        if len(now) <= len(before) or (now.endswith(_BROKEN) and len(self._ids) - self._read < _MOST_PENDING):
            return ""
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return self._until_stop(now[len(before) :])

    def end(self) -> str:
        """The rest, of an answer that ends here for another reason."""
        if self.stopped:
            return ""
        certain = self._until_stop(self._decode(self._ids)[len(self._decode(self._ids[: self._read])) :])
        held, self._held = self._held, ""
        return certain + held

    def _until_stop(self, text: str) -> str:
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        begun = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` may begin."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
