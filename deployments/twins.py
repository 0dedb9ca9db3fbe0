"""Writes the tiny twin of every recipe that converts a large teacher: `python -m radlads.deployments.twins`.

A twin has the stages, the variant, the options, the losses, the phases and the rates of its original; its teacher is a
small one of the same family, and contexts, batches and tokens are small enough to plan and run anywhere. A test
compares the files with this program's output.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from radlads.tasks.contracts.stages import EVALUATE, NEEDLE, TRAINING_STAGES, stage_info

_log = logging.getLogger(__name__)
PREFIX = "tiny-"
# Teacher → the shipped teacher of its family, and its number of layers.
_TEACHERS = {
    "RekaAI/reka-flash-3": ("demo:llama", 6),
    "RekaAI/reka-flash-3.1": ("demo:llama", 6),
    "Qwen/Qwen2.5-7B-Instruct": ("demo:qwen2", 4),
    "Qwen/Qwen2.5-32B-Instruct": ("demo:qwen2", 4),
    "Qwen/Qwen2.5-72B-Instruct": ("demo:qwen2", 4),
    "Qwen/Qwen3-8B": ("demo", 4),
    "Qwen/Qwen3-14B": ("demo", 4),
    "SmolLM2-135M-Instruct.Q4_1.gguf": ("demo:llama", 6),
}
_CONTEXTS = {512: 32, 1024: 48, 2048: 64, 4096: 96, 8192: 128, 16384: 192, 32768: 256, 65536: 320, 131072: 384}
# Optimizer steps of a stage with a teacher, and of one without.
_STEPS, _STEPS_ALONE = 4, 3
# A choice by recall may read a twentieth of the run's training tokens, so these must be enough.
_STEPS_TO_CHOOSE_FROM = {"layerwise": 160, "logits": 320}
_BATCH, _MICRO_BATCH, _RANK = 4, 2, 4
_STORIES = {"paths": ["demo:stories.txt.gz"], "separator": "<|endoftext|>"}


def large_recipes() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, content) of every shipped recipe that has a twin."""
    for path in sorted(recipe_folder().glob("*.yaml")):
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        if raw.get("teacher", {}).get("path") in _TEACHERS:
            yield path.stem, raw


def recipe_folder() -> Path:
    """deployments/recipes."""
    return Path(str(resources.files("radlads.deployments"))) / "recipes"


def shrink(raw: dict[str, Any]) -> dict[str, Any]:
    """The twin of a recipe."""
    path, num_layers = _TEACHERS[raw["teacher"]["path"]]
    student = dict(raw["student"])
    chooses = isinstance(student.get("attention_layers"), dict)
    if chooses:
        recall = {"lengths": [64], "documents": 4, "heldout_tokens": 64, "context": 64}
        choice = student["attention_layers"] | {"count": num_layers // 4, "recall": recall}
        # Tiny teachers find no needle, and their tokenizers need hundreds of tokens for one.
        student["attention_layers"] = {key: value for key, value in choice.items() if key != "probe"}
    elif student.get("attention_layers"):
        student["attention_layers"] = list(range(num_layers // 2 - 1, num_layers, num_layers // 2))
    twin = {
        "name": PREFIX + raw["name"],
        "description": f"The twin of {raw['name']} for trying and testing: the same but for its sizes.",
        "sources": [f"Made from {raw['name']} by deployments/twins.py; its sources are there. Every size is ours."],
        "teacher": {key: value for key, value in raw["teacher"].items() if key != "pypi"} | {"path": path},
        "student": student,
        "data": {name: _shrink_data(dataset) for name, dataset in raw["data"].items()},
    }
    twin |= {stage: _shrink_stage(raw[stage], _steps(stage, chooses)) for stage in TRAINING_STAGES if stage in raw}
    twin[EVALUATE.name] = {"data": raw[EVALUATE.name]["data"], "heldout_tokens": 2048, "context": 64, "batch": 4}
    needle = {"lengths": [128, 256], "depths": [0.0, 0.5, 1.0], "haystack": _STORIES["paths"]}
    twin[NEEDLE.name] = needle | {"haystack_separator": _STORIES["separator"]}
    return twin | ({"resources": raw["resources"]} if "resources" in raw else {})


def _shrink_data(dataset: dict[str, Any]) -> dict[str, Any]:
    """The shipped stories in place of texts; recall text stays recall text."""
    if all(source["kind"] == "recall" for source in dataset["sources"]):
        haystack = {"haystack": _STORIES["paths"], "haystack_separator": _STORIES["separator"]}
        return {"sources": [{"kind": "recall", "documents": 200, "lengths": [64, 128], **haystack}]}
    return {"sources": [{"kind": "files", **_STORIES, "max_documents": 300}]}


def _steps(stage: str, chooses: bool) -> int:
    info = stage_info(stage)
    if not info.needs_teacher:
        return _STEPS_ALONE
    return _STEPS_TO_CHOOSE_FROM["layerwise" if info.layerwise else "logits"] if chooses else _STEPS


def _shrink_stage(section: dict[str, Any], steps: int) -> dict[str, Any]:
    small = {**section, **_shrink_sizes(section, section["context"], steps), "heldout_tokens": 1024}
    if "lora" in section:
        small["lora"] = section["lora"] | {"rank": _RANK}
    if "phases" in section:
        small["phases"] = [
            phase | _shrink_sizes(phase, phase.get("context", section["context"]), steps) for phase in section["phases"]
        ]
        small["tokens"] = sum(phase["tokens"] for phase in small["phases"])
    return small


def _shrink_sizes(sizes: dict[str, Any], context: int, steps: int) -> dict[str, int]:
    small = {"context": _CONTEXTS[context], "batch": _BATCH, "micro_batch": _MICRO_BATCH}
    kept = {name: value for name, value in small.items() if name in sizes}
    return kept | {"tokens": steps * _BATCH * _CONTEXTS[context]}


def render(twin: dict[str, Any]) -> str:
    """A twin as YAML, without anchors."""
    return yaml.dump(twin, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)


class _PlainDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def write_twins() -> list[str]:
    """Write every twin; the names of those that changed."""
    changed = []
    for name, raw in large_recipes():
        path, text = recipe_folder() / f"{PREFIX}{name}.yaml", render(shrink(raw))
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            changed.append(path.stem)
    return changed


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    _log.info("written: %s", ", ".join(write_twins()) or "nothing, all are up to date")
