"""Where things are and what they are: teachers, tokenizers and corpus files, resolved to places and pinned by content.

A place may move; a fingerprint says what was there. Digests are made of fingerprints (tasks/specs.py).
"""

from __future__ import annotations

import glob
import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from radlads.tasks.chat_templates import SHIPPED, shipped_chat_template
from radlads.tasks.job import UserError
from radlads.tasks.sections import FilesSource, HubSource, RecallSource, Source
from radlads.tasks.specs import FileRef, TeacherRef

DEMO = "demo"
_DEMO_FILE = "demo:"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# Enough to tell two trainings of one shape apart without reading hundreds of gigabytes.
_SAMPLED_BLOCKS = 64
_BLOCK_BYTES = 1 << 16


def demo_folder() -> Path:
    """The folder deployments/demo, shipped with the package."""
    return Path(str(resources.files("radlads.deployments"))) / "demo"


def resolve_teacher_path(path: str) -> str:
    """`demo` → the shipped teacher's folder, `demo:NAME` → that of another one shipped beside it; a local folder → its
    absolute path; anything else is a hub id.

    Raises UserError where the shipped teacher or a path that looks local does not exist.
    """
    if path == DEMO or path.startswith(_DEMO_FILE):
        folder = demo_folder() / ("teacher" if path == DEMO else path.removeprefix(_DEMO_FILE))
        if not (folder / "config.json").is_file():
            raise UserError(
                f"there is no shipped teacher at {folder}; reinstall the package, or give a teacher of your own"
            )
        return str(folder)
    local = Path(path).expanduser()
    if local.is_dir():
        return str(local.resolve())
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise UserError(f"there is no teacher folder at {path}; give a Hugging Face folder, a hub id, or `demo`")
    return path


def resolve_tokenizer_path(path: str) -> str:
    """As resolve_teacher_path, and `demo:NAME` is a folder shipped with the demo teacher."""
    if path.startswith(_DEMO_FILE):
        return str(resolve_file(path))
    return resolve_teacher_path(path)


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a teacher folder or hub id. Raises UserError when there is none or it has no EOS token."""
    resolved = resolve_tokenizer_path(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolved, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"no usable tokenizer in {path}: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {path} has no EOS token; set `eos_token` in its tokenizer_config.json")
    return tokenizer


def resolve_file(path: str) -> Path:
    """A corpus file's place on this machine; `demo:NAME` is shipped with the demo teacher, `template:NAME` is a shipped
    chat template."""
    if path.startswith(_DEMO_FILE):
        return demo_folder() / path.removeprefix(_DEMO_FILE)
    if path.startswith(SHIPPED):
        return shipped_chat_template(path)
    return Path(path).expanduser()


def expand_paths(patterns: Iterable[str]) -> list[str]:
    """Every file that the paths and globs name, in a stable order; shipped files (`demo:`, `template:`) keep that name.

    Raises UserError for a pattern that matches nothing.
    """
    found: list[str] = []
    for pattern in patterns:
        local = resolve_file(pattern)
        if local.is_file():
            matches = [pattern if pattern.startswith((_DEMO_FILE, SHIPPED)) else str(local.resolve())]
        else:
            matches = sorted(str(Path(m).resolve()) for m in glob.glob(str(local), recursive=True) if Path(m).is_file())
        if not matches:
            hint = "" if local.is_absolute() else " beside the recipe's file or where the command was given"
            raise UserError(f"no file matches '{pattern}'{hint}")
        found += [m for m in matches if m not in found]
    return found


def source_patterns(source: Source) -> tuple[str, ...]:
    """The files that a source reads, as the recipe names them; its chat template is one of them."""
    if isinstance(source, FilesSource | HubSource):
        template = () if source.chat_template is None else (source.chat_template,)
        return (*template, *(source.paths if isinstance(source, FilesSource) else ()))
    if isinstance(source, RecallSource):
        return source.haystack
    return ()


def resolve_files(sources: Sequence[Source]) -> tuple[FileRef, ...]:
    """The corpus files of a dataset, globs resolved, with size and sha256. Raises UserError."""
    names: list[str] = []
    for source in sources:
        names += [name for name in expand_paths(source_patterns(source)) if name not in names]
    return tuple(file_ref(name) for name in names)


def file_ref(name: str) -> FileRef:
    """One corpus file pinned by its content."""
    path = resolve_file(name)
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return FileRef(path=name, size=path.stat().st_size, sha256=digest)


def check_files(sources: Sequence[Source], pinned: Sequence[FileRef]) -> None:
    """Raises UserError when the files that the sources name now are not the ones that the plan pinned."""
    hashes = {file.sha256 for file in pinned}
    for file in resolve_files(sources):
        if file.sha256 not in hashes:
            raise UserError(f"{file.path} is not the file that the plan saw; start a new run to use it as it is now")


def pin_teacher(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> TeacherRef:
    """The teacher pinned by what it holds. Raises UserError when it cannot be reached or has no safetensors."""
    resolved = resolve_teacher_path(path)
    fingerprint = teacher_fingerprint(resolved, revision)
    commit = pinned_commit(fingerprint)
    return TeacherRef(
        path=path, revision=commit or revision, trust_remote_code=trust_remote_code, fingerprint=fingerprint
    )


def teacher_fingerprint(resolved: str, revision: str | None = None) -> str:
    """Folder: sha256 over config, tokenizer, and of each safetensors file its size, header and sampled blocks.
    Hub: `hub:<id>@<commit>`."""
    folder = Path(resolved)
    if not folder.is_dir():
        return f"hub:{resolved}@{_hub_commit(resolved, revision)}"
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{folder} holds no .safetensors weights (pickled .bin files are not read); convert them first")
    digest = hashlib.sha256()
    _hash_files(digest, folder, ("config.json", *_TOKENIZER_FILES))
    for path in weights:
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
        _hash_weights(digest, path)
    return digest.hexdigest()


def tokenizer_fingerprint(path: str, revision: str | None = None) -> str:
    """Folder: sha256 over the tokenizer's files. Hub: `hub:<id>@<commit>`."""
    resolved = resolve_tokenizer_path(path)
    folder = Path(resolved)
    if not folder.is_dir():
        return f"hub:{resolved}@{_hub_commit(resolved, revision)}"
    digest = hashlib.sha256()
    if not _hash_files(digest, folder, _TOKENIZER_FILES):
        raise UserError(f"{folder} holds no tokenizer files (looked for {', '.join(_TOKENIZER_FILES[:4])}, ...)")
    return digest.hexdigest()


def pinned_commit(fingerprint: str) -> str | None:
    """The commit that a hub fingerprint names; None of a folder's."""
    return fingerprint.rpartition("@")[2] if fingerprint.startswith("hub:") else None


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _hub_commit(repo: str, revision: str | None) -> str:
    try:
        commit = HfApi().model_info(repo, revision=revision).sha
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"'{repo}' is no local folder, and the hub does not have it or cannot be reached: {first_line(error)}"
        ) from error
    if commit is None:
        raise UserError(f"the hub names no commit for '{repo}'; give `teacher.revision`")
    return commit


def _hash_files(digest: hashlib._Hash, folder: Path, names: Sequence[str]) -> int:
    present = [name for name in names if (folder / name).is_file()]
    for name in present:
        digest.update(f"{name}:{(folder / name).stat().st_size}:".encode())
        digest.update((folder / name).read_bytes())
    return len(present)


def _hash_weights(digest: hashlib._Hash, path: Path) -> None:
    """Header and evenly spaced blocks of a safetensors file; the whole of a small one."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        try:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            header = stream.read(min(header_bytes, size))
            json.loads(header)
        except (struct.error, ValueError) as error:
            raise UserError(f"{path} is not a safetensors file: {first_line(error)}") from error
        digest.update(header)
        data_start = 8 + header_bytes
        step = max(_BLOCK_BYTES, (size - data_start) // _SAMPLED_BLOCKS)
        for offset in range(data_start, size, step):
            stream.seek(offset)
            digest.update(stream.read(_BLOCK_BYTES))
