"""Pins: what is there, at a place that a recipe names, when a run is planned; and whether it still is when it is read.

Files and folders are named by their content, models and datasets of the hub by their commit.
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
    expand_paths,
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

# What transformers reads a tokenizer from, the code of one that brings its own included.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("tekken.json", "*.model", "*.tiktoken", "*.txt", "*.vocab", "*.jinja", "additional_chat_templates/*.jinja"),
    *("chat_template.json", "*.py"),
)
_TEACHER, _TOKENIZER = "teacher.path", "pretrain.tokenizer"
_MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


def pin_place(reading: Reading, hashes: ContentHashes) -> Pin:
    """What a place holds now. Raises UserError."""
    content, files = _CONTENTS[reading.kind](reading.place, reading.revision, hashes)
    return Pin(kind=reading.kind, place=reading.place, revision=reading.revision, content=content, files=files)


def pin_teacher(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False, hashes: ContentHashes | None = None
) -> TeacherRef:
    """The teacher and its tokenizer, by what they hold. Raises UserError as teacher_revision does."""
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
    """The commit of a teacher of the hub; the revision as it is of a folder.

    Raises UserError when it cannot be reached, has no safetensors, or is to run code of a commit that nobody named.
    """
    resolved = resolve_teacher_path(path)
    if Path(resolved).is_dir():
        _require_weights(Path(resolved))
        return revision
    commit = hub_commit(resolved, revision, "model")
    if trust_remote_code and not is_commit(revision):
        raise UserError(
            f"trust_remote_code runs code of '{path}', so the commit that was read must be named: "
            f"`revision: {commit}` is the one that it is at now"
        )
    return commit


def teacher_fingerprint(path: str, revision: str | None, hashes: ContentHashes) -> str:
    """Folder: sha256 over config, tokenizer and every byte of the weights. Hub: `hub:<id>@<commit>`."""
    return _teacher((path,), revision, hashes)[0]


def tokenizer_fingerprint(path: str, revision: str | None = None, hashes: ContentHashes | None = None) -> str:
    """Folder: sha256 over the tokenizer's files, its chat templates included. Hub: `hub:<id>@<commit>`."""
    return _tokenizer((path,), revision, hashes or ContentHashes())[0]


def pinned_commit(fingerprint: str) -> str | None:
    """The commit that a hub fingerprint names; None of a folder's."""
    return fingerprint.rpartition("@")[2] if fingerprint.startswith("hub:") else None


def check_pins(spec: StageSpec, hashes: ContentHashes) -> None:
    """Raises UserError unless everything that a stage's spec names is what the plan saw. What is of the hub is read by
    its commit, and stays what it is."""
    pins: Mapping[str, Pin] = getattr(spec, "pins", {})
    for reading in readings(spec):
        pin = pins.get(reading.location)
        if pin is not None and reading.place and pin.commit is None:
            _compare(pin, pin_place(reading, hashes), " and ".join(reading.place))
    teacher: TeacherRef | None = getattr(spec, "teacher", None)
    if teacher is not None and pinned_commit(teacher.fingerprint) is None:
        found = teacher_fingerprint(teacher.path, teacher.revision, hashes)
        _same(found, teacher.fingerprint, f"the teacher at {teacher.path}")
    if isinstance(spec, TokenizeSpec) and pinned_commit(spec.tokenizer_fingerprint) is None:
        found = tokenizer_fingerprint(spec.tokenizer, None, hashes)
        _same(found, spec.tokenizer_fingerprint, f"the tokenizer at {spec.tokenizer}")


def follow_moves(recipe: Recipe, report: PlanReport, hashes: ContentHashes) -> PlanReport:
    """The report with the places that the recipe names now: folders move, and what a committed plan pinned does not.

    A moved folder that is not on this machine keeps what the plan saw: what was made from it stands, and what is yet to
    read it says so. Raises UserError where another content is at a place that the plan did not see.
    """
    pins = dict(report.pins)
    for location, found in _moved(recipe, report, hashes):
        pin = pins[location]
        if found.content != pin.content:
            raise UserError(
                f"{location} names {' and '.join(found.place)}, which holds something else than what was planned with "
                f"({' and '.join(pin.place)}); start the run again, or put the recipe back"
            )
        pins[location] = found.model_copy(update={"commits": pin.commits})
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
            _log.warning("%s is left as the plan saw it: %s", reading.location, error)


def _last_names(place: tuple[str, ...]) -> list[str]:
    """Absolute places by their last names, which they keep where a folder moves; others, hub ids above all, whole."""
    return [PurePosixPath(text).name if text.startswith("/") else text for text in place]


def with_commits(dataset: Dataset, pins: Mapping[str, Pin], place: str) -> Dataset:
    """The dataset with hub sources at the commits that they were pinned to. place: of the dataset, in the pins."""
    sources = []
    for index, source in enumerate(dataset.sources):
        commit = _commit(source.path, pins.get(f"{place}.sources.{index}.path")) if source.kind == "hub" else None
        sources.append(source if commit is None else source.model_copy(update={"revision": commit}))
    return dataset.model_copy(update={"sources": tuple(sources)})


def at_pinned_commits(recipe: Recipe, pins: Mapping[str, Pin]) -> Recipe:
    """The recipe with all that it names of the hub at the commits that a plan of it pinned."""
    data = {name: with_commits(dataset, pins, f"data.{name}") for name, dataset in recipe.data.items()}
    changes: dict[str, Any] = {"data": data}
    teacher = recipe.teacher
    commit = _commit(teacher.path, pins.get(_TEACHER)) if teacher is not None else None
    if teacher is not None and commit is not None:
        changes["teacher"] = teacher.model_copy(update={"revision": commit})
    return recipe.model_copy(update=changes)


def _commit(path: str, pin: Pin | None) -> str | None:
    """The commit of a hub id, where the pin is one of it."""
    return pin.commit if pin is not None and pin.place == (path,) else None


def _compare(pin: Pin, found: Pin, place: str) -> None:
    if found.content == pin.content:
        return
    before, after = ({file.path: file.sha256 for file in one.files} for one in (pin, found))
    for name in (*before, *after):
        if before.get(name) != after.get(name):
            whole = name if pin.kind == "files" else f"{place}/{name}"
            raise UserError(_changed(whole, "is new" if name not in before else "is gone" if name not in after else ""))
    raise UserError(_changed(place))


def _same(found: str, pinned: str, what: str) -> None:
    if found != pinned:
        raise UserError(_changed(what))


def _changed(what: str, how: str = "") -> str:
    more = f" (it {how})" if how else ""
    return (
        f"{what} changed since the run was planned{more}; put it back, or choose a new run name to use it as it is now"
    )


_Found = tuple[str, tuple[FileRef, ...]]


def _files(place: tuple[str, ...], _: str | None, hashes: ContentHashes) -> _Found:
    names = expand_paths(place)
    refs = _refs([(name, resolve_file(name)) for name in names], hashes)
    # In the order in which they are read, and with what they are read as.
    return hash_of([[_format(name), ref.sha256] for name, ref in zip(names, refs, strict=True)]), refs


def _format(name: str) -> str:
    """`.jsonl.gz`: what decides how a corpus file is read."""
    path = PurePosixPath(name)
    return "".join(PurePosixPath(path.stem).suffixes[-1:]) + ".gz" if path.suffix == ".gz" else path.suffix


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
    resolved = resolve_teacher_path(place[0])
    folder = Path(resolved)
    if not folder.is_dir():
        return f"hub:{resolved}@{hub_commit(resolved, revision, 'model')}", ()
    _require_weights(folder)
    return _folder(folder, matching_files(folder, {*_MODEL_FILES, *_TOKENIZER_FILES}), hashes)


def _tokenizer(place: tuple[str, ...], revision: str | None, hashes: ContentHashes) -> _Found:
    resolved = resolve_tokenizer_path(place[0])
    folder = Path(resolved)
    if not folder.is_dir():
        return f"hub:{resolved}@{hub_commit(resolved, revision, 'model')}", ()
    names = matching_files(folder, _TOKENIZER_FILES)
    if not names:
        raise UserError(f"{folder} holds no tokenizer files (looked for {', '.join(_TOKENIZER_FILES[:4])}, ...)")
    return _folder(folder, names, hashes, more=_class_hints(folder))


def _require_weights(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no .safetensors weights (pickled .bin files are not read); convert them first")


def _class_hints(folder: Path) -> dict[str, Any] | None:
    """What of a model's config decides which tokenizer class transformers takes."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    return {key: config.get(key) for key in ("model_type", "tokenizer_class")} if isinstance(config, dict) else None


def _refs(named: Sequence[tuple[str, Path]], hashes: ContentHashes) -> tuple[FileRef, ...]:
    found = hashes.of_all([path for _, path in named])
    return tuple(
        FileRef(path=name, size=path.stat().st_size, sha256=sha256)
        for (name, path), sha256 in zip(named, found, strict=True)
    )


_CONTENTS: dict[ReadsKind, Callable[[tuple[str, ...], str | None, ContentHashes], _Found]] = {
    "files": _files,
    "dataset": _dataset,
    "task": _task,
    "teacher": _teacher,
    "tokenizer": _tokenizer,
}
