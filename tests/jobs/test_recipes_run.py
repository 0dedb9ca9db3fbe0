"""One twin of each kind is converted: every job of its pipeline, one after the other, in this process."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from radlads.model.student.load import load_student
from radlads.tasks.contracts.job import InputRef, JobResources, JobSpec, Stage, StoreRef
from radlads.tasks.contracts.recipe.recipe import Recipe, load_recipe
from radlads.tasks.contracts.specs import PlanReport, StageSpec, spec_digest
from radlads.tasks.jobs import transplant
from radlads.tasks.jobs.common import Job, execute
from radlads.tasks.jobs.data import tokens
from radlads.tasks.jobs.judge import evaluate
from radlads.tasks.jobs.plan import plan
from radlads.tasks.jobs.train import train
from radlads.tasks.stage_specs import evaluate_spec, tokenize_spec, train_spec, transplant_spec

RESOURCES = JobResources(device="cpu", processes=1, threads=1)

# What choosing layers takes, this test leaves out.
CHANGES: dict[str, dict[str, Any]] = {
    "tiny-qwen3-8b-hybrid-128k": {"student.attention_layers": [3], "align.tokens": 512, "distill.tokens": 512}
}


@dataclass
class Conversion:
    """A pipeline without its orchestrator; `jobs`: stage → the job that made its product."""

    recipe: Recipe
    root: Path
    jobs: dict[str, Job] = field(default_factory=dict)

    def run(self) -> PlanReport:
        report = plan.make_plan(self.recipe, RESOURCES)
        for name in self.recipe.datasets_used:
            self._job("tokenize", tokens, tokenize_spec(self.recipe, report, name), {}, name=f"data-{name}")
        self._job("transplant", transplant, transplant_spec(self.recipe, report), {})
        last = "transplant"
        for stage in self.recipe.training_stages:
            spec = train_spec(self.recipe, report, stage)
            inputs = {name: f"data-{dataset}" for name, dataset in spec.section.datasets.items()}
            self._job(stage, train, spec, inputs | {"student": last})
            last = stage
        section = self.recipe.evaluate
        assert section is not None
        spec = evaluate_spec(self.recipe, report)
        self._job("evaluate", evaluate, spec, {"student": last, "data": f"data-{section.data}"})
        return report

    def _job(
        self, stage: Stage, module: ModuleType, spec: StageSpec, inputs: dict[str, str], *, name: str | None = None
    ) -> None:
        refs = {
            kind: InputRef(uri=self.jobs[made].spec.output_uri, digest=self.jobs[made].spec.digest)
            for kind, made in inputs.items()
        }
        store = StoreRef(uri=str(self.root / "store"))
        sheet = JobSpec(
            stage=stage,
            run="test",
            recipe=self.recipe.name,
            digest=spec_digest(stage, spec, refs),
            spec=spec.model_dump(mode="json"),
            inputs=refs,
            output_uri=f"{store.uri}/{name or stage}",
            store=store,
            resources=RESOURCES.model_copy(update={"zero_stage": self.recipe.resources.zero_stage}),
            scratch=str(self.root / "scratch" / (name or stage)),
        )
        Path(sheet.scratch).mkdir(parents=True)
        (Path(sheet.scratch) / "job.json").write_text(sheet.model_dump_json(), encoding="utf-8")
        job = Job(spec=sheet)
        assert execute(module.main, job) == "done", (job.scratch / "exit.json").read_text()
        self.jobs[name or stage] = job


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "tiny-prwkv7-reka-flash-3",
        "tiny-hrwkv7-reka-flash-3.1",
        "tiny-qwerky6-qwen2.5-7b",
        "tiny-qwerky7-qwen2.5-7b-2a",
        "tiny-arwkv-qwen2.5-7b",
        "tiny-qwen3-8b-hybrid-128k",
    ],
)
def test_a_twin_is_converted_from_end_to_end(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, CHANGES.get(name))
    conversion = Conversion(recipe, tmp_path)
    report = conversion.run()
    for stage in recipe.training_stages:
        rows = (conversion.jobs[stage].scratch / "metrics.jsonl").read_text().splitlines()
        losses = [row["loss"] for row in map(json.loads, rows) if "loss" in row]
        assert len(losses) == getattr(recipe, stage).num_steps
    if "distill" in conversion.jobs:
        spec = conversion.jobs["distill"].typed
        assert (spec.mlp_bits, spec.teacher_bits) == (recipe.student.mlp_bits, recipe.teacher.bits)
    student = load_student(conversion.jobs[recipe.training_stages[-1]].output / "model")
    assert student.config.variant == recipe.student.variant
    assert tuple(student.config.attention_layers) == report.attention_layers
    assert sum(parameter.numel() for parameter in student.parameters()) == report.student_parameters
    judged = json.loads((conversion.jobs["evaluate"].output / "evaluate.json").read_text())
    assert judged
