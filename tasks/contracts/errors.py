"""The error that a user can fix, and helpers for messages: any error in one line, suggestions for unknown words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST_WORD = 64  # longer words are not typing errors, and slow to compare


class UserError(Exception):
    """An error that the user can fix. Its message is complete; no traceback is shown."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def error_text(error: BaseException, longest: int = 300) -> str:
    """An exception's message in one line, truncated if very long; its class if the message is empty."""
    return " ".join(str(error).split())[:longest] or type(error).__name__


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """The end of a message about an unknown word: "; did you mean 'this'?", or "" if no known word is close."""
    close = [] if len(word) > _LONGEST_WORD else difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean '{close[0]}'?" if close else ""
