"""Resolves the places that a recipe names to files and folders on this machine."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.data.chat_templates import SHIPPED, shipped_chat_template

DEMO = "demo"
_DEMO_FILE = "demo:"
_GGUF = ".gguf"
COMPRESSED = (".gz", ".xz", ".zst")
"""Endings of compressed text and JSON lines."""


def demo_folder() -> Path:
    """The folder deployments/demo, shipped with the package."""
    return Path(str(resources.files("radlads.deployments"))) / "demo"


def is_gguf(path: str) -> bool:
    """Whether a teacher's path names a GGUF file."""
    return path.lower().endswith(_GGUF)


def resolve_teacher_path(path: str) -> str:
    """`demo` or `demo:NAME` → folder of a shipped teacher; a local folder or GGUF file → its absolute path; else a hub
    id.

    Raises UserError if a shipped teacher or a path that looks local does not exist.
    """
    if is_gguf(path):
        return _gguf_file(path)
    if path == DEMO or path.startswith(_DEMO_FILE):
        folder = demo_folder() / ("teacher" if path == DEMO else path.removeprefix(_DEMO_FILE))
        if not (folder / "config.json").is_file():
            shipped = sorted(one.parent.name for one in demo_folder().glob("*/config.json"))
            names = [DEMO if name == "teacher" else f"{_DEMO_FILE}{name}" for name in shipped]
            known = ", ".join(names) or "none: reinstall the package"
            raise UserError(f"there is no shipped teacher '{path}'; shipped are {known}")
        return str(folder)
    found = _folder_or_hub_id(path, "teacher folder", ", a GGUF file, or `demo`")
    held = sorted(Path(found).glob(f"*{_GGUF}")) if Path(found).is_dir() else []
    if held and not Path(found, "config.json").is_file():
        raise UserError(f"{found} is a folder of GGUF files; name one of them, with gguf_file: {held[0].name}")
    return found


def _gguf_file(path: str) -> str:
    local = Path(path).expanduser()
    if not local.is_file():
        raise UserError(
            f"there is no GGUF file at {path}; one of the hub is downloaded first (hf download REPOSITORY FILE "
            "--local-dir FOLDER) and named by its path"
        )
    return str(local.resolve())


def resolve_tokenizer_path(path: str) -> str:
    """As resolve_teacher_path; `demo:NAME` is a folder shipped with the demo teacher."""
    if path.startswith(_DEMO_FILE):
        return str(resolve_file(path))
    return resolve_teacher_path(path)


def resolve_dataset_path(path: str) -> str:
    """Path of a `hub` source: a local folder → its absolute path; else a hub id. Raises UserError."""
    return _folder_or_hub_id(path, "dataset folder", "")


def _folder_or_hub_id(path: str, what: str, more: str) -> str:
    local = Path(path).expanduser()
    if local.is_dir():
        return str(local.resolve())
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise UserError(f"there is no {what} at {path}; give a Hugging Face folder, a hub id{more}")
    return path


def resolve_task_folder(path: str) -> Path:
    """The folder of a user-supplied task. Raises UserError."""
    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    return folder


def resolve_file(path: str) -> Path:
    """The local path of a file; `demo:NAME` is shipped with the demo teacher, `template:NAME` is a shipped chat
    template."""
    if path.startswith(_DEMO_FILE):
        return demo_folder() / path.removeprefix(_DEMO_FILE)
    if path.startswith(SHIPPED):
        return shipped_chat_template(path)
    return Path(path).expanduser()


def expand_paths(patterns: Iterable[str]) -> list[str]:
    """All files that match the paths and globs, in a stable order; shipped files (`demo:`, `template:`) as named.

    Raises UserError for a pattern that matches nothing.
    """
    names: list[str] = []
    for pattern in patterns:
        local = resolve_file(pattern)
        if local.is_file():
            matches = [pattern if pattern.startswith((_DEMO_FILE, SHIPPED)) else str(local.resolve())]
        else:
            matches = sorted(str(Path(m).resolve()) for m in glob.glob(str(local), recursive=True) if Path(m).is_file())
        if not matches:
            hint = "" if local.is_absolute() else " in the recipe's folder or in the working directory"
            raise UserError(f"no file matches '{pattern}'{hint}")
        names += [m for m in matches if m not in names]
    return names
