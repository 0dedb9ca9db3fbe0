"""A teacher that a package of the Python package index holds: where a fetched one lies, and whether it is there."""

from __future__ import annotations

import hashlib
from pathlib import Path

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.files import file_errors
from radlads.tasks.contracts.recipe.recipe import Recipe
from radlads.tasks.contracts.recipe.teacher import PackagedFile


def fetched_place(packaged: PackagedFile, home: Path) -> Path:
    """Where the file lies once it was fetched. home: of the settings."""
    return home / "teachers" / packaged.sha256[:16] / packaged.file


def awaited_file(recipe: Recipe) -> PackagedFile | None:
    """The packaged file that stands for the teacher: of an anchored recipe whose `path` is only the file's name. None
    where `path` leads to a teacher already."""
    teacher = recipe.teacher
    return teacher.pypi if teacher is not None and teacher.pypi and teacher.path == teacher.pypi.file else None


def at_fetched_teacher(recipe: Recipe, home: Path) -> Recipe:
    """The anchored recipe with the place of the teacher that was fetched; unchanged if it names another one. Raises
    UserError if none was fetched, or the file is not the recipe's."""
    packaged = awaited_file(recipe)
    if packaged is None or recipe.teacher is None:
        return recipe
    place = fetched_place(packaged, home)
    if not place.is_file():
        raise UserError(
            f"the teacher of '{recipe.name}' is {packaged.file} of the PyPI package {packaged.package} "
            f"{packaged.version}, and it is not here; run it with --fetch-teacher, which downloads it, or give the "
            "place of your own copy with --set teacher.path=FILE"
        )
    if (found := file_sha256(place)) != packaged.sha256:
        raise UserError(f"{place} is damaged (sha256 {found}); delete it, and run with --fetch-teacher again")
    return recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"path": str(place)})})


def file_sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal. Raises UserError if it cannot be read."""
    with file_errors(str(path)), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
