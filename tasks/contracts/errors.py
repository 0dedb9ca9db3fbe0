"""The error that a user can mend, and any error in one line."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can mend. The message is the whole story; no traceback is shown for it."""


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
