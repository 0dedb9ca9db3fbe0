"""Shipped chat templates: deployments/chat_templates/NAME.jinja, in recipes NAME or template:NAME."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from radlads.tasks.contracts.errors import UserError, did_you_mean

SHIPPED = "template:"


def shipped_chat_templates() -> list[str]:
    """Names of the shipped chat templates, sorted."""
    return sorted(path.stem for path in _folder().glob("*.jinja"))


def shipped_chat_template(place: str) -> Path:
    """The file of `template:NAME`. Raises UserError for an unknown name."""
    name, known = place.removeprefix(SHIPPED), shipped_chat_templates()
    if name not in known:
        hint = did_you_mean(name, known, cutoff=0.5)
        raise UserError(f"no chat template '{name}' (a file ends with .jinja; shipped: {', '.join(known)}){hint}")
    return _folder() / f"{name}.jinja"


def _folder() -> Path:
    return Path(str(resources.files("radlads.deployments"))) / "chat_templates"
