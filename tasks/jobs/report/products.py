"""Reads the products of a run for its report: manifests and small JSON files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import Manifest
from radlads.tasks.contracts.recipe.choice import listed_layers
from radlads.tasks.contracts.recipe.sections import Recipe
from radlads.tasks.contracts.specs import PlanReport
from radlads.tasks.contracts.stages import CHOOSE, EVALUATE, MODEL_STAGES, NEEDLE, PLAN, STAGES, TOKENIZE
from radlads.tasks.jobs.common import Job


@dataclass(frozen=True)
class ReportedProduct:
    """One committed product."""

    name: str
    """Name of the input: a stage or a dataset."""
    prefix: str
    """Its key in the store."""
    manifest: Manifest

    @property
    def short(self) -> str:
        """Prefix of the digest, used as its name in the report."""
        return self.manifest.digest[:12]


class Products:
    """All inputs of a publish job, and the datasets that they were made from (`datasets`)."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.all = [
            ReportedProduct(name, job.store.key(ref.uri), job.input_manifest(name))
            for name, ref in job.spec.inputs.items()
        ]
        self.datasets = self._find_datasets()

    def of_stage(self, stage: str) -> ReportedProduct | None:
        """The product of a stage; None where the run does not have it."""
        return next((product for product in self.all if product.manifest.stage == stage), None)

    @property
    def stages(self) -> list[ReportedProduct]:
        """Every product but the datasets, models in the order of the pipeline."""
        order = (name for name, stage in STAGES.items() if not stage.several)
        return [product for name in order if (product := self.of_stage(name)) is not None]

    @property
    def final(self) -> ReportedProduct:
        """The last model of the run. Raises UserError when there is none."""
        models = [product for stage in MODEL_STAGES if (product := self.of_stage(stage)) is not None]
        if not models:
            raise UserError("publish needs a model, but none of its inputs is the product of a stage that makes one")
        return models[-1]

    def _find_datasets(self) -> list[ReportedProduct]:
        """The datasets that were given, and those that the given products were made from."""
        datasets = {p.manifest.digest: p for p in self.all if p.manifest.stage == TOKENIZE.name}
        for product in self.all:
            for name, ref in product.manifest.inputs.items():
                if name != "data" or ref.digest in datasets:
                    continue
                prefix = self._job.store.key(ref.uri)
                manifest = self._job.store.read_manifest(prefix)
                if manifest is not None:
                    datasets[ref.digest] = ReportedProduct(name, prefix, manifest)
        return list(datasets.values())

    def sheet(self, stage: str, file: str) -> dict[str, Any] | None:
        """A verified JSON file of a stage's product; None if the run has no such product."""
        product = self.of_stage(stage)
        if product is None:
            return None
        read: dict[str, Any] = json.loads(self._job.store.read_file(product.prefix, file))
        return read

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl of a training stage; empty if there is none."""
        product = self.of_stage(stage)
        if product is None or not any(entry.path == "metrics.jsonl" for entry in product.manifest.files):
            return []
        text = self._job.store.read_file(product.prefix, "metrics.jsonl").decode("utf-8")
        return [json.loads(line) for line in text.splitlines() if line.strip()]

    def picture(self, stage: str, file: str) -> bytes | None:
        """A picture of a stage's product; None if the run has no such product."""
        product = self.of_stage(stage)
        return None if product is None else self._job.store.read_file(product.prefix, file)

    @cached_property
    def plan(self) -> PlanReport | None:
        """plan.json."""
        sheet = self.sheet(PLAN.name, "plan.json")
        return None if sheet is None else PlanReport.model_validate(sheet)

    @cached_property
    def choice(self) -> dict[str, Any] | None:
        """choose.json."""
        return self.sheet(CHOOSE.name, "choose.json")

    def attention_layers(self, recipe: Recipe) -> tuple[int, ...]:
        """Attention layers of the final model: from choose.json, else plan.json, else the recipe."""
        if self.choice is not None:
            return tuple(self.choice["attention_layers"])
        return self.plan.attention_layers if self.plan is not None else tuple(sorted(listed_layers(recipe.student)))

    @cached_property
    def evaluation(self) -> dict[str, Any] | None:
        """evaluate.json."""
        return self.sheet(EVALUATE.name, "evaluate.json")

    @cached_property
    def needle(self) -> dict[str, Any] | None:
        """needle.json."""
        return self.sheet(NEEDLE.name, "needle.json")

    def fetch_model(self, into: Path) -> Path:
        """Download the final model's Hugging Face folder, verified; returns its path."""
        return self._job.store.fetch(self.final.prefix, into, subset="model") / "model"
