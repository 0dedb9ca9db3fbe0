"""The teacher that a recipe is drafted for: what its files, or the table of well-known ones, say of it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from transformers import PreTrainedConfig

from radlads.model.teacher.gguf import load_gguf_config, open_gguf
from radlads.model.teacher.load import NoTeacherError, find_family, load_teacher_config
from radlads.model.teacher.weights import build_empty
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.pins.known_teachers import known_names
from radlads.tasks.contracts.pins.places import is_gguf, resolve_teacher_path
from radlads.tasks.jobs.plan.subject import known_teacher_config

_TEMPLATE = "chat_template"
_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Candidate:
    """A teacher. softmax: how many layers can be converted. context: its positions. chat: whether it has a chat
    template; None: not known."""

    path: str
    config: PreTrainedConfig
    family: str
    parameters: int
    layers: int
    softmax: int
    context: int
    chat: bool | None

    def facts(self) -> tuple[str, ...]:
        """Two lines for a user."""
        values: Any = self.config
        heads, kv = (
            values.num_attention_heads,
            getattr(values, "num_key_value_heads", None) or values.num_attention_heads,
        )
        layers = (
            f"{self.layers} layers" if self.softmax == self.layers else f"{self.layers} layers, {self.softmax} softmax"
        )
        chat = {True: "with a chat template", False: "without a chat template", None: "chat template not looked at"}
        return (
            f"{self.path}: {self.family}, {self.parameters:,} parameters, {layers}, {values.hidden_size:,} wide, "
            f"{heads} heads ({kv} of keys and values)",
            f"context of {self.context:,} tokens, vocabulary of {values.vocab_size:,}, {chat[self.chat]}",
        )


def find_candidate(path: str) -> Candidate:
    """Look at a teacher: a folder, a GGUF file, `demo`, a hub id. Raises UserError with what is near a wrong name, or
    why it cannot be converted."""
    chat: bool | None = None
    if is_gguf(path):
        opened = open_gguf(Path(resolve_teacher_path(path)))
        config = load_gguf_config(opened)
        chat = f"tokenizer.{_TEMPLATE}" in opened.header.settings
    else:
        place = _place(path)
        try:
            config = load_teacher_config(place)
            chat = _has_template(place)
        except NoTeacherError as error:
            if Path(place).exists():
                raise
            known = known_teacher_config(path)
            if known is None:
                raise NoTeacherError(f"{error}{_near(path)}") from error
            config = known
    family = find_family(config)
    softmax = family.softmax_layers(config)
    values: Any = config
    return Candidate(
        path=path,
        config=config,
        family=family.model_type,
        parameters=sum(parameter.numel() for parameter in build_empty(config).parameters()),
        layers=values.num_hidden_layers,
        softmax=len(softmax),
        context=int(getattr(values, "max_position_embeddings", None) or 2048),
        chat=chat,
    )


def _place(path: str) -> str:
    """As resolve_teacher_path, with what is near a wrong path."""
    try:
        return resolve_teacher_path(path)
    except UserError as error:
        local = Path(path).expanduser()
        try:
            beside = [
                one.name for one in local.parent.iterdir() if Path(one, "config.json").is_file() or is_gguf(one.name)
            ]
        except OSError:
            beside = []
        near = difflib.get_close_matches(local.name, beside, n=4, cutoff=0.4)
        raise UserError(f"{error}{_said([str(local.parent / name) for name in near])}") from error


def _has_template(place: str) -> bool | None:
    """Whether a folder or a hub id has a chat template; None where the hub does not say."""
    seen = None
    for name in _FILES:
        file = Path(place, name)
        if not Path(place).is_dir():
            try:
                file = Path(hf_hub_download(place, name))
            except Exception:  # noqa: BLE001 - a hint; the plan reads the tokenizer itself
                continue
        if file.is_file():
            seen = False
            with suppress(OSError, ValueError):
                if name.endswith(".jinja") or _TEMPLATE in json.loads(file.read_text(encoding="utf-8")):
                    return True
    return False if Path(place).is_dir() else seen


def _near(path: str) -> str:
    """The names that a user may have meant: of well-known teachers, by their own part and their owner's; of the hub
    where it answers."""
    names = {name.lower(): name for name in known_names()} | {n.rsplit("/", 1)[-1].lower(): n for n in known_names()}
    last = path.lower().rsplit("/", 1)[-1]
    words = [path.lower(), last, f"{last}-instruct"]
    close = [names[near] for word in words for near in difflib.get_close_matches(word, list(names), n=3, cutoff=0.75)]
    if not close:
        with suppress(Exception):  # the hub is out of reach, and has been said to be
            close = [model.id for model in HfApi().list_models(search=last, limit=4)]
    return _said(close)


def _said(close: Sequence[str]) -> str:
    return f"; near it: {', '.join(list(dict.fromkeys(close))[:4])}" if close else ""
