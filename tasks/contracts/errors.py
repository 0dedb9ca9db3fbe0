"""The error that a user can mend, and what messages have in common: any error in one line, a word that was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST_WORD = 64  # longer words are no typing mistake, and slow to compare


class UserError(Exception):
    """Something that the user can mend. The message is the whole story; no traceback is shown for it."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def error_text(error: BaseException, longest: int = 300) -> str:
    """All that an exception says, in one line, cut where it is very long; its class where it says nothing."""
    return " ".join(str(error).split())[:longest] or type(error).__name__


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """The end of a message about an unknown word: "; did you mean 'this'?", or nothing where no known one is close."""
    close = [] if len(word) > _LONGEST_WORD else difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean '{close[0]}'?" if close else ""
