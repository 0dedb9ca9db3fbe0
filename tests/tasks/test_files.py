"""Folders and files that are one user's alone, and what the system refuses."""

import errno
import os

import pytest

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.files import file_errors, private_folder, write_private


def test_a_folder_is_one_users_alone(tmp_path, monkeypatch):
    folder = tmp_path / "a" / "b"
    assert private_folder(folder) == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    private_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    with pytest.raises(UserError, match=f"belongs to another user \\(uid {mine}\\); choose your own folder"):
        private_folder(folder)


def test_a_file_is_never_seen_half_or_by_others(tmp_path):
    path = tmp_path / "secret"
    path.write_text("old")
    path.chmod(0o644)
    write_private(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["secret"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "x"), "here: no space left on the device; free some, or choose another location"),
        (OSError(errno.EROFS, "x"), "here: the file system is read-only; choose another location"),
        (PermissionError(errno.EACCES, "x"), "here: permission denied"),
        (OSError(errno.EIO, "Input/output error"), "here: Input/output error"),
        (ValueError("embedded null byte"), "here: not a usable path: embedded null byte"),
    ],
)
def test_what_the_system_refuses(error, told):
    with pytest.raises(UserError, match=told) as caught, file_errors("here"):
        raise error
    assert len(str(caught.value).splitlines()) == 1
