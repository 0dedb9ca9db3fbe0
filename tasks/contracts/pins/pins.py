"""Pins record the content of everything that a recipe reads when a run is planned, and verify it before use.

Files and folders are pinned by sha256, models and datasets of the hub by commit.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.identity import Reading, readings
from radlads.tasks.contracts.pins.content import ContentHashes, hash_of, matching_files, walk_files
from radlads.tasks.contracts.pins.hub import hub_commit, is_commit
from radlads.tasks.contracts.pins.places import (
    COMPRESSED,
    expand_paths,
    is_gguf,
    resolve_dataset_path,
    resolve_file,
    resolve_task_folder,
    resolve_teacher_path,
    resolve_tokenizer_path,
)
from radlads.tasks.contracts.pins.task_files import outside_files
from radlads.tasks.contracts.recipe.base import ReadsKind
from radlads.tasks.contracts.recipe.sections import Dataset, Recipe
from radlads.tasks.contracts.specs import FileRef, Pin, PlanReport, StageSpec, TeacherRef, TokenizeSpec

_log = logging.getLogger(__name__)

# The files from which transformers loads a tokenizer, including custom code.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("tekken.json", "*.model", "*.tiktoken", "*.txt", "*.vocab", "*.jinja", "additional_chat_templates/*.jinja"),
    *("chat_template.json", "*.py"),
)
_TEACHER, _TOKENIZER = "teacher.path", "pretrain.tokenizer"
_MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


def pin_place(reading: Reading, hashes: ContentHashes) -> Pin:
    """Pin the current content of a place. Raises UserError."""
    content, files = _CONTENTS[reading.kind](reading.place, reading.revision, hashes)
    return Pin(kind=reading.kind, place=reading.place, revision=reading.revision, content=content, files=files)


def pin_teacher(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False, hashes: ContentHashes | None = None
) -> TeacherRef:
    """Pin a teacher and its tokenizer by content. Raises UserError as teacher_revision does."""
    hashes = hashes or ContentHashes()
    pinned = teacher_revision(path, revision, trust_remote_code=trust_remote_code)
    return TeacherRef(
        path=path,
        revision=pinned,
        trust_remote_code=trust_remote_code,
        fingerprint=teacher_fingerprint(path, pinned, hashes),
        tokenizer_fingerprint=tokenizer_fingerprint(path, pinned, hashes),
    )


def teacher_revision(path: str, revision: str | None, *, trust_remote_code: bool) -> str | None:
    """The commit of a hub teacher; the given revision for a folder or GGUF file.

    Raises UserError if it cannot be reached, has no safetensors, or needs remote code without a pinned commit.
    """
    resolved = resolve_teacher_path(path)
    if is_gguf(path) or Path(resolved).is_dir():
        _require_weights(Path(resolved))
        return revision
    commit = hub_commit(resolved, revision, "model")
    if trust_remote_code and not is_commit(revision):
        raise UserError(
            f"trust_remote_code runs code of '{path}', so its commit must be pinned; set "
            f"`revision: {commit}` for the current one"
        )
    return commit


def teacher_fingerprint(path: str, revision: str | None, hashes: ContentHashes) -> str:
    """Folder: sha256 over config, tokenizer and weights. GGUF: sha256 of the file. Hub: `hub:<id>@<commit>`."""
    return _teacher((path,), revision, hashes)[0]


def tokenizer_fingerprint(path: str, revision: str | None = None, hashes: ContentHashes | None = None) -> str:
    """Folder: sha256 over the tokenizer files, including chat templates. GGUF and hub: as teacher_fingerprint."""
    return _tokenizer((path,), revision, hashes or ContentHashes())[0]


def pinned_commit(fingerprint: str) -> str | None:
    """The commit of a hub fingerprint; None for a folder."""
    return fingerprint.rpartition("@")[2] if fingerprint.startswith("hub:") else None


def check_pins(spec: StageSpec, hashes: ContentHashes) -> None:
    """Raises UserError if anything that a stage's spec reads differs from its pin. Hub content is read by commit, so it
    cannot change."""
    pins: Mapping[str, Pin] = getattr(spec, "pins", {})
    for reading in readings(spec):
        pin = pins.get(reading.location)
        if pin is not None and reading.place and pin.commit is None:
            _compare(pin, pin_place(reading, hashes), " and ".join(reading.place))
    teacher: TeacherRef | None = getattr(spec, "teacher", None)
    if teacher is not None and pinned_commit(teacher.fingerprint) is None:
        actual = teacher_fingerprint(teacher.path, teacher.revision, hashes)
        _same(actual, teacher.fingerprint, f"the teacher at {teacher.path}")
    if isinstance(spec, TokenizeSpec) and pinned_commit(spec.tokenizer_fingerprint) is None:
        actual = tokenizer_fingerprint(spec.tokenizer, None, hashes)
        _same(actual, spec.tokenizer_fingerprint, f"the tokenizer at {spec.tokenizer}")


def follow_moves(recipe: Recipe, report: PlanReport, hashes: ContentHashes) -> PlanReport:
    """Update the places in a committed plan to those of the recipe, if their content equals the pins.

    A moved folder that does not exist on this machine keeps its pin; a stage that reads it will report it. Raises
    UserError if a new place has other content than its pin.
    """
    pins = dict(report.pins)
    for location, actual in _moved(recipe, report, hashes):
        pin = pins[location]
        if actual.content != pin.content:
            raise UserError(
                f"{location} is {' and '.join(actual.place)}, whose content differs from what this run was planned "
                f"with ({' and '.join(pin.place)}); start the run again, or restore the recipe"
            )
        pins[location] = actual.model_copy(update={"commits": pin.commits})
    changes: dict[str, Any] = {"pins": pins}
    if report.teacher is not None and _TEACHER in pins:
        (path,) = pins[_TEACHER].place
        changes |= {"teacher": report.teacher.model_copy(update={"path": path}), "tokenizer": path}
    elif _TOKENIZER in pins:
        (changes["tokenizer"],) = pins[_TOKENIZER].place
    return report.model_copy(update=changes)


def moved_content(recipe: Recipe, report: PlanReport, hashes: ContentHashes) -> dict[str, str]:
    """Location in the recipe → content, where it names another place than the plan saw, and that holds something else.

    Raises UserError where nothing can be found there.
    """
    pins = report.pins
    return {name: pin.content for name, pin in _moved(recipe, report, hashes) if pin.content != pins[name].content}


def _moved(recipe: Recipe, report: PlanReport, hashes: ContentHashes) -> Iterator[tuple[str, Pin]]:
    """(location, what is there) of every place that the recipe names otherwise than the plan did."""
    for reading in readings(recipe):
        pin = report.pins.get(reading.location)
        if pin is None or (pin.place, pin.revision) == (reading.place, reading.revision):
            continue
        if pin.commit is not None and pin.place == reading.place and reading.revision in (None, pin.commit):
            continue  # what had no revision is read at the commit that was pinned
        try:
            yield reading.location, pin_place(reading, hashes)
        except UserError as error:
            if _last_names(pin.place) != _last_names(reading.place) or pin.revision != reading.revision:
                raise UserError(f"{reading.location}: {error}") from error
            _log.warning("%s keeps the pin of the plan: %s", reading.location, error)


def _last_names(place: tuple[str, ...]) -> list[str]:
    """The last path components of absolute places, which survive a move; other places, such as hub ids, unchanged."""
    return [PurePosixPath(text).name if text.startswith("/") else text for text in place]


def with_commits(dataset: Dataset, pins: Mapping[str, Pin], place: str) -> Dataset:
    """The dataset with its hub sources at their pinned commits. place: key prefix of the dataset in the pins."""
    sources = []
    for index, source in enumerate(dataset.sources):
        commit = _commit(source.path, pins.get(f"{place}.sources.{index}.path")) if source.kind == "hub" else None
        sources.append(source if commit is None else source.model_copy(update={"revision": commit}))
    return dataset.model_copy(update={"sources": tuple(sources)})


def at_pinned_commits(recipe: Recipe, pins: Mapping[str, Pin]) -> Recipe:
    """The recipe with all hub content at the commits pinned by its plan."""
    data = {name: with_commits(dataset, pins, f"data.{name}") for name, dataset in recipe.data.items()}
    changes: dict[str, Any] = {"data": data}
    teacher = recipe.teacher
    commit = _commit(teacher.path, pins.get(_TEACHER)) if teacher is not None else None
    if teacher is not None and commit is not None:
        changes["teacher"] = teacher.model_copy(update={"revision": commit})
    return recipe.model_copy(update=changes)


def _commit(path: str, pin: Pin | None) -> str | None:
    """The commit of a hub id, if the pin is for it."""
    return pin.commit if pin is not None and pin.place == (path,) else None


def _compare(pin: Pin, actual: Pin, place: str) -> None:
    if actual.content == pin.content:
        return
    before, after = ({file.path: file.sha256 for file in one.files} for one in (pin, actual))
    for name in (*before, *after):
        if before.get(name) != after.get(name):
            whole = name if pin.kind == "files" else f"{place}/{name}"
            raise UserError(_changed(whole, "is new" if name not in before else "is gone" if name not in after else ""))
    raise UserError(_changed(place))


def _same(actual: str, pinned: str, what: str) -> None:
    if actual != pinned:
        raise UserError(_changed(what))


def _changed(what: str, how: str = "") -> str:
    more = f" (it {how})" if how else ""
    return (
        f"{what} changed since the run was planned{more}; restore it, or choose a new run name to use it as it is now"
    )


_Found = tuple[str, tuple[FileRef, ...]]


def _files(place: tuple[str, ...], _: str | None, hashes: ContentHashes) -> _Found:
    names = expand_paths(place)
    refs = _refs([(name, resolve_file(name)) for name in names], hashes)
    # Order and format affect the documents, so both enter the hash.
    return hash_of([[_format(name), ref.sha256] for name, ref in zip(names, refs, strict=True)]), refs


def _format(name: str) -> str:
    """The suffix that determines the format of a corpus file, e.g. `.jsonl.gz`."""
    path = PurePosixPath(name)
    return ("".join(PurePosixPath(path.stem).suffixes[-1:]) if path.suffix in COMPRESSED else "") + path.suffix


def _folder(folder: Path, names: Sequence[str], hashes: ContentHashes, more: Any = None) -> _Found:
    refs = _refs([(name, folder / name) for name in names], hashes)
    listed = [[ref.path, ref.sha256] for ref in refs]
    return hash_of(listed if more is None else [listed, more]), refs


def _dataset(place: tuple[str, ...], revision: str | None, hashes: ContentHashes) -> _Found:
    resolved = resolve_dataset_path(place[0])
    folder = Path(resolved)
    if not folder.is_dir():
        return f"hub:{resolved}@{hub_commit(resolved, revision, 'dataset')}", ()
    names = list(walk_files(folder))
    if not names:
        raise UserError(f"the dataset folder {folder} is empty")
    return _folder(folder, names, hashes)


def _task(place: tuple[str, ...], _: str | None, hashes: ContentHashes) -> _Found:
    if not place:
        return "harness", ()
    folder = resolve_task_folder(place[0])
    names = list(walk_files(folder))
    outside = outside_files(folder, [name for name in names if name.endswith((".yaml", ".yml"))])
    shown = [[written, hashes.of(path)] for written, path in outside]
    return _folder(folder, names, hashes, more=shown or None)


def _teacher(place: tuple[str, ...], revision: str | None, hashes: ContentHashes) -> _Found:
    folder = Path(resolved := resolve_teacher_path(place[0]))
    if (found := _without_folder(resolved, revision, hashes)) is not None:
        return found
    _require_weights(folder)
    return _folder(folder, matching_files(folder, {*_MODEL_FILES, *_TOKENIZER_FILES}), hashes)


def _tokenizer(place: tuple[str, ...], revision: str | None, hashes: ContentHashes) -> _Found:
    folder = Path(resolved := resolve_tokenizer_path(place[0]))
    if (found := _without_folder(resolved, revision, hashes)) is not None:
        return found
    names = matching_files(folder, _TOKENIZER_FILES)
    if not names:
        raise UserError(f"{folder} has no tokenizer files (expected {', '.join(_TOKENIZER_FILES[:4])}, ...)")
    return _folder(folder, names, hashes, more=_class_hints(folder))


def _without_folder(resolved: str, revision: str | None, hashes: ContentHashes) -> _Found | None:
    """The content of a model that is a GGUF file or a hub id; None for a folder."""
    if is_gguf(resolved):
        return hashes.of(Path(resolved)), ()
    return None if Path(resolved).is_dir() else (f"hub:{resolved}@{hub_commit(resolved, revision, 'model')}", ())


def _require_weights(folder: Path) -> None:
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        mend = "name its GGUF file with gguf_file" if any(folder.glob("*.gguf")) else "convert them first"
        raise UserError(f"{folder} has no .safetensors weights (pickled .bin files are not supported); {mend}")


def _class_hints(folder: Path) -> dict[str, Any] | None:
    """The config keys that determine the tokenizer class in transformers; None without a config."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    return {key: config.get(key) for key in ("model_type", "tokenizer_class")} if isinstance(config, dict) else None


def _refs(named: Sequence[tuple[str, Path]], hashes: ContentHashes) -> tuple[FileRef, ...]:
    hashed = hashes.of_all([path for _, path in named])
    return tuple(
        FileRef(path=name, size=path.stat().st_size, sha256=sha256)
        for (name, path), sha256 in zip(named, hashed, strict=True)
    )


_CONTENTS: dict[ReadsKind, Callable[[tuple[str, ...], str | None, ContentHashes], _Found]] = {
    "files": _files,
    "dataset": _dataset,
    "task": _task,
    "teacher": _teacher,
    "tokenizer": _tokenizer,
}
