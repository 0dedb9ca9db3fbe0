"""The password of the two servers: generated once, kept in a file that only this user can read."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.files import write_private


def password_file(home: Path) -> Path:
    """Where `user:password` of both servers is kept."""
    return home / "services-password"


def read_password(home: Path) -> str | None:
    """`user:password` of both servers; None if none was generated. Raises UserError."""
    try:
        status = password_file(home).stat()
        text = password_file(home).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {password_file(home)}: {getattr(error, 'strerror', error)}") from None
    user, _, password = text.partition(":")
    if status.st_mode & 0o077 or status.st_uid != os.geteuid() or not user or len(password) < 16:
        raise UserError(
            f"{password_file(home)} can be read by other users, or was altered; delete it, and run "
            "`radlads services down` and `radlads services up`"
        )
    return text


def make_password(home: Path) -> str:
    """The password of both servers, generated if there is none yet. Raises UserError."""
    known = read_password(home)
    if known is None:
        known = f"radlads:{secrets.token_urlsafe(24)}"
        write_private(password_file(home), known + "\n")
    return known
