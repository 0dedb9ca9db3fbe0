"""Which files hold a checkpoint's tensors: one lookup for all code that reads, checks, fingerprints or copies them.

A checkpoint is `model.safetensors`, or the shards that `model.safetensors.index.json` names, in a folder or a hub
repository. A place that holds both, or neither, is refused with a remedy, because other readers differ in which
they load. These are not read when present: pickled weights (`.bin`, `.pt`), GGUF, `consolidated.safetensors`
(Mistral's own names), precision variants (`model.fp16.safetensors`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from transformers.utils import cached_file

from radlads.model.weights.safetensors_header import (
    MAX_HEADER_BYTES,
    TensorEntry,
    parse_header,
    read_header,
    short_name,
    strict_json,
)
from radlads.tasks.contracts.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_ADAPTER = "adapter_config.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_VARIANT = re.compile(r"model\.([\w-]+)(-\d{5}-of-\d{5})?\.safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ERRORS = (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError, ValueError)


def find_weight_files(path: str, *, revision: str | None = None) -> tuple[Path, ...]:
    """The safetensors files of a folder or hub id, on this machine, sorted by name; downloads them.

    Raises UserError where there are none, one is missing, or the place holds more than one set of weights.
    """
    return tuple(_fetch(path, name, revision) for name in _resolve(path, revision)[0])


def read_headers(path: str, *, revision: str | None = None, download: bool = True) -> dict[str, TensorEntry]:
    """Name → entry of every tensor of a checkpoint. download: False fetches no more of a hub id's files than headers.

    Raises UserError: see `find_weight_files`, and for a file that breaks the format, a tensor in two files, or one that
    is not in the file that the index says.
    """
    names, placed = _resolve(path, revision)
    entries: dict[str, TensorEntry] = {}
    for name in names:
        join_entries(entries, read_header(_fetch(path, name, revision)) if download else _header(path, name, revision))
    _check_index(path, placed, entries)
    return entries


def join_entries(entries: dict[str, TensorEntry], more: dict[str, TensorEntry]) -> None:
    """Add the tensors of one file. Raises UserError for one that another file has too."""
    if twice := entries.keys() & more.keys():
        name = min(twice)
        raise UserError(
            f"tensor {short_name(name)} is in {entries[name].path} and in {more[name].path.name}; which one counts "
            "cannot be determined: download the checkpoint again, into an empty folder"
        )
    entries |= more


def _resolve(path: str, revision: str | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """File names in order, and the index: tensor → file name ({} without an index)."""
    present = _list_files(path, revision)
    placed = _read_index(_fetch(path, INDEX, revision)) if INDEX in present else {}
    names = tuple(sorted(set(placed.values()))) if placed else (SINGLE,)
    if _ADAPTER in present:
        beside = "beside whole weights" if SINGLE in present or placed else "alone"
        raise UserError(
            f"'{path}' holds a PEFT adapter ({_ADAPTER}) {beside}; merge it into its base model "
            f"(merge_and_unload, save_pretrained), or remove {_ADAPTER} where the weights are merged already"
        )
    if placed and SINGLE in present and names != (SINGLE,):
        raise UserError(
            f"'{path}' holds two sets of weights, {SINGLE} and the {len(names)} files that {INDEX} names, and readers "
            "differ in which they take; keep one of them in a folder of its own"
        )
    missing = [name for name in names if name not in present]
    if missing and placed:
        raise UserError(f"'{path}' lacks {missing[0]}, which {INDEX} names; download it again")
    if missing:
        raise UserError(f"'{path}' lacks {SINGLE} and {INDEX}: {_what_else(present)}")
    return names, placed


def _what_else(present: Collection[str]) -> str:
    """Why there are no weights to read, from the files that are present."""
    variants = sorted(name for name in present if _VARIANT.fullmatch(name))
    if any(_SHARD.fullmatch(name) for name in present):
        return f"it has shards without the index that says what they hold; download {INDEX} too"
    if "consolidated.safetensors" in present:
        return "consolidated.safetensors has other tensor names; download the Hugging Face weights (model*.safetensors)"
    if variants:
        return f"it has only {variants[0]}; rename it to {SINGLE} (and what belongs to it) if that is what you want"
    if any(name.endswith(_PICKLED) for name in present):
        return "pickled weights are never read (loading one runs its code); convert them to safetensors first"
    if any(name.endswith(".gguf") for name in present):
        return "GGUF weights are read where the file itself is named as the teacher (teacher: {path: model.gguf})"
    return "it holds no .safetensors weights"


def _read_index(index: Path) -> dict[str, str]:
    """Tensor → file name. Raises UserError unless every file is a plain safetensors name beside the index."""
    try:
        if index.stat().st_size > MAX_HEADER_BYTES:
            raise ValueError(f"it is larger than {MAX_HEADER_BYTES} bytes")
        parsed = strict_json(index.read_text(encoding="utf-8"))
        placed = parsed.get("weight_map") if isinstance(parsed, dict) else None
        if not isinstance(placed, dict) or not placed:
            raise ValueError("it has no weight_map")
        for tensor, name in placed.items():
            plain = isinstance(name, str) and name == Path(name).name and "\\" not in name and name.isprintable()
            if not plain or not name.endswith(".safetensors"):
                raise ValueError(
                    f"it places {short_name(tensor)} in {short_name(str(name))}, which is no safetensors file beside it"
                )
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {index}: {' '.join(str(error).split())[:300] or type(error).__name__}") from error
    return placed


def _check_index(path: str, placed: dict[str, str], entries: dict[str, TensorEntry]) -> None:
    wrong = [name for name in placed if name not in entries or entries[name].path.name != placed[name]]
    if wrong:
        name = wrong[0]
        where = f"it is in {entries[name].path.name}" if name in entries else "it is not there"
        raise UserError(
            f"{INDEX} of '{path}' places {short_name(name)} in {placed[name]}, but {where} ({len(wrong)} such in all); "
            "index and shards are not of one checkpoint: download both again"
        )


def _list_files(path: str, revision: str | None) -> set[str]:
    """Names of the files directly in a folder (links followed) or hub repository."""
    folder = Path(path)
    if not folder.is_dir():
        return _list_repository(path, revision)
    try:
        return {entry.name for entry in folder.iterdir() if entry.is_file()}
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from error


def _list_repository(repository: str, revision: str | None) -> set[str]:
    """File names from the hub, or, if it cannot be reached, of the repository's files in the local cache."""
    try:
        return set(HfApi().list_repo_files(repository, revision=revision))
    except _HUB_ERRORS as error:
        cached = _cached(repository, "config.json", revision)
        if cached is None:
            raise UserError(f"cannot list the files of '{repository}': {' '.join(str(error).split())[:300]}") from error
        return _list_files(str(cached.parent), None)


def _fetch(path: str, name: str, revision: str | None) -> Path:
    if Path(path).is_dir():
        return Path(path) / name
    with _asking_hub(path):
        found = cached_file(path, name, revision=revision)
    if found is None:
        raise UserError(f"'{path}' lacks {name}")
    return Path(found)


def _header(path: str, name: str, revision: str | None) -> dict[str, TensorEntry]:
    local = Path(path) / name if Path(path).is_dir() else _cached(path, name, revision)
    if local is not None:
        return read_header(local)
    remote, hub = f"{path}@{revision or 'main'}/{name}", HfFileSystem()
    with _asking_hub(path), hub.open(remote, "rb") as stream:
        return parse_header(stream, hub.info(remote)["size"], Path(path) / name)


def _cached(repository: str, name: str, revision: str | None) -> Path | None:
    """A hub file that is on this machine already."""
    found = cached_file(
        repository,
        name,
        revision=revision,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


@contextmanager
def _asking_hub(path: str) -> Iterator[None]:
    try:
        yield
    except _HUB_ERRORS as error:
        raise UserError(f"cannot read the weights of '{path}': {' '.join(str(error).split())[:300]}") from error
