"""deployments/containers as Docker Compose reads it: the project with values from an environment, and the images."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "deployments" / "containers"
SECRETS = {
    "RADLADS_SERVICES_PASSWORD": "radlads:0123456789abcdefghij",
    "S3_ACCESS_KEY": "radlads",
    "S3_SECRET_KEY": "abcdefghij0123456789",
}
_VARIABLE = re.compile(r"\$\{(?P<name>[A-Z0-9_]+)(?:(?P<how>:-|-|:\?)(?P<rest>[^}]*))?\}")
_INSTRUCTION = re.compile(
    r"^(FROM|ARG|ENV|COPY|RUN|USER|VOLUME|HEALTHCHECK|ENTRYPOINT|CMD|WORKDIR|EXPOSE|SHELL)\s+(.*)$"
)


def variables() -> set[str]:
    """Names that the project takes from `.env` or the shell."""
    return {found["name"] for found in _VARIABLE.finditer((FOLDER / "compose.yaml").read_text(encoding="utf-8"))}


def project(environment: Mapping[str, str] = SECRETS) -> dict[str, Any]:
    """The project, variables replaced. Raises KeyError for one that has to be set and is not."""

    def value(found: re.Match[str]) -> str:
        given = environment.get(found["name"])
        if given or (given is not None and found["how"] == "-"):
            return given
        if found["how"] in (":-", "-"):
            return str(found["rest"])
        raise KeyError(found["name"])

    def replaced(part: Any) -> Any:  # after parsing, as Compose does: a value may be empty
        if isinstance(part, dict):
            return {key: replaced(one) for key, one in part.items()}
        if isinstance(part, list):
            return [replaced(one) for one in part]
        return _VARIABLE.sub(value, part) if isinstance(part, str) else part

    made = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
    return {key: replaced(part) for key, part in made.items() if not key.startswith("x-")}


@dataclass(frozen=True)
class Stage:
    """One stage of the Dockerfile. parent: an image, build arguments replaced by their defaults, or another stage."""

    name: str
    parent: str
    instructions: list[tuple[str, str]]

    def all(self, kind: str) -> list[str]:
        return [rest for name, rest in self.instructions if name == kind]


def stages() -> dict[str, Stage]:
    """Name → stage."""
    text = re.sub(r"^\s*#.*\n", "", (FOLDER / "Dockerfile").read_text(encoding="utf-8"), flags=re.M)
    text = re.sub(r"\\\n\s*", " ", text)
    arguments: dict[str, str] = {}
    found: dict[str, Stage] = {}
    stage: Stage | None = None
    for line in filter(None, map(str.strip, text.splitlines())):
        match = _INSTRUCTION.match(line)
        assert match is not None, line
        kind, rest = match[1], match[2]
        if kind == "FROM":
            parent, _, name = rest.partition(" AS ")
            stage = found[name] = Stage(name, re.sub(r"\$\{(\w+)\}", lambda m: arguments[m[1]], parent), [])
        elif stage is None:
            assert kind == "ARG", line
            name, _, default = rest.partition("=")
            arguments[name] = default
        else:
            stage.instructions.append((kind, rest))
    return found
