"""Which models a conversation is with: of a run by its name, from any store, or of an exported folder."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.pins.places import is_gguf, resolve_teacher_path
from radlads.tasks.contracts.requests.talk import Talker
from radlads.tasks.contracts.settings import check_run_name, resolve_settings
from radlads.tasks.contracts.stages import DEQUANTIZE
from radlads.tasks.contracts.store.base import Store
from radlads.tasks.contracts.store.open import find_store
from radlads.tasks.contracts.store.pointers import read_pointers
from radlads.tasks.pipeline import finished_students, recipe_of_run


def find_talkers(
    model: str,
    wanted: Collection[str],
    *,
    stage: str | None,
    teacher_path: str | None,
    store: str | None,
    work: str | None,
) -> dict[str, Any]:
    """`talkers`, `tokenizer` and `revision` of a TalkRequest. model: a run's name or an exported folder. wanted: of
    `teacher` and `student`. Files of a remote store are fetched into the work folder. Raises UserError."""
    if Path(model).is_dir():
        return _of_folder(Path(model).absolute(), wanted, stage, teacher_path)
    if "/" in model or model.startswith("."):
        raise UserError(f"there is no folder {model}")
    if teacher_path is not None:
        raise UserError("--teacher-path is for a folder; a run knows its teacher")
    settings = resolve_settings(store=store, work=work)
    place, kept = find_store(settings.store), settings.work
    talkers: list[Talker] = []
    if "teacher" in wanted:
        talkers.append(_teacher_of_run(place, check_run_name(model), store, kept))
    if "student" in wanted:
        students = finished_students(place, check_run_name(model))
        if stage is not None and stage not in students:
            raise UserError(f"the run '{model}' has no finished model of '{stage}'; it has {', '.join(students)}")
        name = stage or next(reversed(students))
        product = students[name]
        folder = fetch_model(place, place.key(product.uri), product.manifest.digest, kept)
        talkers.append(Talker(name="student", path=str(folder), is_student=True))
    last = talkers[-1]
    return {"talkers": tuple(talkers), "tokenizer": last.path, "revision": last.revision}


def fetch_model(place: Store, key: str, digest: str, work: Path) -> Path:
    """The model of a product as a local folder, to be read alone: links to a store in a folder, else downloads, which
    stay in the work folder for the next time. Raises StoreError."""
    return place.fetch(key, work / "models" / digest[:16], subset="model") / "model"


def _teacher_of_run(place: Store, run: str, store: str | None, kept: Path) -> Talker:
    teacher = recipe_of_run(run, store=store).teacher
    if teacher is None:
        raise UserError(f"the run '{run}' has no teacher: it trains from random weights")
    if not is_gguf(teacher.path):
        return Talker(
            name="teacher", path=resolve_teacher_path(teacher.path), is_student=False, revision=teacher.revision
        )
    made = [p for p in read_pointers(place, run).values() if p.stage == DEQUANTIZE.name]
    if not made or place.read_manifest(made[0].key) is None:
        raise UserError(f"the folder that the run '{run}' made of its GGUF teacher is no longer in {place.uri}")
    folder = fetch_model(place, made[0].key, made[0].digest, kept)
    return Talker(name="teacher", path=str(folder), is_student=False)


def _of_folder(folder: Path, wanted: Collection[str], stage: str | None, teacher_path: str | None) -> dict[str, Any]:
    if stage is not None:
        raise UserError("--stage is for a run; a folder holds one model")
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no model: its config.json cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder} is no model: its config.json holds no object")
    if "teacher" in wanted and teacher_path is None:
        raise UserError("name the teacher of a folder by --teacher-path")
    talkers: list[Talker] = []
    if "teacher" in wanted:
        talkers.append(Talker(name="teacher", path=resolve_teacher_path(str(teacher_path)), is_student=False))
    if "student" in wanted:
        is_student = str(config.get("model_type")) == "radlads"
        talkers.append(Talker(name="student" if is_student else "model", path=str(folder), is_student=is_student))
    return {"talkers": tuple(talkers), "tokenizer": str(folder), "revision": None}
