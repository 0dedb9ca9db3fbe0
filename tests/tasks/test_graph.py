"""The graph without a job: which stage reads what, the same for every runner; and launchers other than local."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import CodeVersion, InputRef, JobResources, Manifest
from radlads.tasks.contracts.parsing.document import DocumentError
from radlads.tasks.contracts.recipe.recipe import Resources, load_recipe
from radlads.tasks.contracts.specs import PlanReport, PlanSpec, spec_digest
from radlads.tasks.contracts.stages import STAGES
from radlads.tasks.contracts.store.open import open_store
from radlads.tasks.graph import convert, judge, pretrain
from radlads.tasks.launchers.launcher import JobCrashed, JobFailed
from radlads.tasks.launchers.local import LocalLauncher
from radlads.tasks.launchers.registry import LAUNCHERS, find_launcher
from radlads.tasks.pipeline import Plan, finished_students, open_pipeline
from radlads.tasks.plain_runner import Done, PlainRunner
from radlads.tasks.stage import Product

from ..flows.conftest import product_files

RECIPES = {
    "smoke": (convert, "hybrid, every stage"),
    "smoke-pure": (convert, "no attention layer"),
    "tiny-qwen3-8b-hybrid": (convert, "layers chosen after align"),
    "tiny-hrwkv7-reka-flash-3.1": (convert, "no finetune"),
    "tiny-qwen3-8b-hybrid-128k": (convert, "extend, with rows of a second dataset"),
    "demo-teacher": (pretrain, "a teacher from nothing"),
}


def manifest_of(spec) -> Manifest:
    return Manifest(
        stage=spec.stage, digest=spec.digest, inputs=spec.inputs, spec=spec.spec, files=(), metrics={},
        run=getattr(spec, "run", ""), code=CodeVersion(sha=None, versions={}), created_at=datetime.now(UTC),
    )  # fmt: skip


class MemoryLauncher:
    """Commits a small product for any stage, in this process; endings: stage → what its next attempts raise."""

    def __init__(self) -> None:
        self.specs = []
        self.endings: dict[str, list[Exception]] = {}
        self.graces: set[float] = set()

    def run(self, spec, *, on_progress=None, grace_seconds=60.0) -> None:
        self.specs.append(spec)
        self.graces.add(grace_seconds)
        if self.endings.get(spec.stage):
            raise self.endings[spec.stage].pop(0)
        output = Path(spec.scratch, "output")
        for name, data in product_files(spec).items():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_bytes(data)
        store = open_store(spec.store)
        store.commit(store.key(spec.output_uri), output, manifest_of(spec))

    def resources(self, asked: Resources) -> JobResources:
        return JobResources(device="cuda", processes=64, threads=3)

    def check(self, store, work) -> None:
        pass

    def hold_devices(self, resources, purpose):
        return nullcontext()


class RecordingRunner:
    """Runs nothing: notes what it is asked for, and hands out products without a store."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, dict[str, str]]] = []
        self.digests: dict[str, str] = {}

    def plan(self, recipe) -> Plan:
        product = self.run("plan", PlanSpec(recipe=recipe, run="r"), {})
        data = product_files(SimpleNamespace(stage="plan", spec={"recipe": recipe.model_dump(mode="json")}))
        return Plan(product=product, report=PlanReport.model_validate_json(data["plan.json"]))

    def run(self, stage, spec, inputs, *, label=None) -> Product:
        label = label or stage
        self.steps.append((label, {name: product.uri for name, product in inputs.items()}))
        refs = {name: product.ref for name, product in inputs.items()}
        self.digests[label] = spec_digest(stage, spec, refs)
        asked = SimpleNamespace(stage=stage, digest=self.digests[label], spec=spec.model_dump(mode="json"), inputs=refs)
        return Product(uri=label, manifest=manifest_of(asked), reused=False)

    def submit(self, stage, spec, inputs) -> Done:
        return Done(self.run(stage, spec, inputs))


def recorded(name: str) -> RecordingRunner:
    runner = RecordingRunner()
    RECIPES[name][0](load_recipe(name), runner)
    return runner


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("RADLADS_HOME", str(tmp_path / "home"))
    return {"store": str(tmp_path / "store"), "tracking": "none", "work": str(tmp_path / "work")}


def plainly(name: str, places, launcher, **overrides):
    """The steps of a recipe as the plain runner makes them: (label, input → label of its maker), and the products."""
    done = []
    with open_pipeline(name, overrides=overrides, run="r", run_id="r", launcher=launcher, **places) as pipeline:
        made = RECIPES[name][0](pipeline.recipe, PlainRunner(pipeline, done.append))
    labels = {one.product.uri: one.label for one in done}
    steps = [(one.label, {k: labels[ref.uri] for k, ref in one.request.inputs.items()}) for one in done]
    return steps, made, done


@pytest.mark.parametrize("name", list(RECIPES))
def test_runners_see_the_same_steps_and_digests(name, places) -> None:
    launcher = MemoryLauncher()
    steps, made, done = plainly(name, places, launcher)
    assert steps == recorded(name).steps
    assert [one.label for one in done if one.product.reused] == []
    assert {one.label: one.request.digest for one in done} == {one.label: one.product.manifest.digest for one in done}
    assert [spec.digest for spec in launcher.specs] == [one.request.digest for one in done]
    assert list(made)[-1] == "publish"
    assert len(made) == len(steps)


def test_what_each_stage_reads() -> None:
    steps = dict(recorded("tiny-qwen3-8b-hybrid").steps)
    data = f"tokenize {load_recipe('tiny-qwen3-8b-hybrid').align.data}"
    assert steps["align"] == {"data": data, "student": "transplant"}
    assert steps["choose"]["student"] == "align"
    assert steps["distill"]["student"] == "choose"
    assert steps["finetune"]["student"] == "distill"
    assert steps["needle"] == {"student": "finetune", "distill": "distill"}
    judged = {name: source for name, source in steps["evaluate"].items() if name != "data"}
    assert judged == {"student": "finetune"} | {s: s for s in ("transplant", "align", "choose", "distill")}
    assert {"plan", "transplant", "align", "choose", "distill", "finetune", "evaluate", "needle"} < set(
        steps["publish"]
    )


def test_extend_reads_both_of_its_datasets_and_finetunes_student() -> None:
    steps = dict(recorded("tiny-qwen3-8b-hybrid-128k").steps)
    assert steps["extend"] == {"data": "tokenize books", "mixed_data": "tokenize recall", "student": "finetune"}
    assert steps["needle"] == {"student": "extend", "distill": "distill"}
    assert steps["evaluate"]["student"] == "extend"
    assert steps["evaluate"]["finetune"] == "finetune"


def test_a_gguf_teacher_is_made_a_folder_once_and_read_by_whatever_reads_a_teacher() -> None:
    runner = RecordingRunner()
    made = convert(load_recipe("tiny-qwen3-8b-hybrid", {"teacher.path": "x.gguf"}), runner)
    steps, read = dict(runner.steps), {"teacher": "dequantize"}
    assert [label for label, _ in runner.steps][:2] == ["plan", "dequantize"]
    assert steps["dequantize"] == {}
    assert steps["transplant"] == read
    others = {label for label, inputs in runner.steps if "teacher" in inputs}
    tokenized = {label for label in steps if label.startswith("tokenize ")}
    assert others == {"transplant", "align", "choose", "distill", "evaluate", "needle"} | tokenized
    assert steps["publish"]["dequantize"] == "dequantize"
    assert list(made)[-1] == "publish"
    plain = recorded("tiny-qwen3-8b-hybrid").digests
    assert plain["align"] != runner.digests["align"]


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_stage_reads_what_its_row_says(name) -> None:
    for label, reads in recorded(name).steps:
        allowed = set(STAGES[label.split()[0]].inputs)
        reads = set(reads) - ({"mixed_data"} if "data" in reads else set())
        kinds = {"student", "data"} & reads
        assert kinds <= allowed or "products" in allowed, label
        assert reads == kinds or allowed & {"models", "products"}, label


def test_a_recipe_of_the_other_kind_is_refused() -> None:
    with pytest.raises(UserError, match="run it with radlads-pretrain"):
        convert(load_recipe("demo-teacher"), RecordingRunner())
    with pytest.raises(UserError, match="no section `pretrain`; run it with the flow radlads"):
        pretrain(load_recipe("smoke"), RecordingRunner())


def test_models_are_judged_again_as_they_were(places) -> None:
    launcher = MemoryLauncher()
    _, made, _ = plainly("smoke", places, launcher)
    with open_pipeline("smoke", run="again", run_id="again", launcher=launcher, **places) as pipeline:
        students = finished_students(pipeline.store, "r")
        judged = judge(pipeline.recipe, PlainRunner(pipeline), students)
    assert list(students) == ["transplant", "align", "distill", "finetune"]
    assert list(judged) == ["evaluate", "needle"]
    for stage, product in judged.items():
        assert product.reused, "what was judged the same way is the same product"
        assert product.uri == made[stage].uri
    stranger = students | {"align": Product("x", foreign(students["align"].manifest), True)}
    runner = RecordingRunner()
    with pytest.raises(UserError, match="'align' was converted from another teacher"):
        judge(load_recipe("smoke"), runner, stranger)
    judge(load_recipe("smoke"), runner, stranger, other_teacher=True)
    assert runner.steps[-1][0] == "needle"


def test_a_stage_that_the_recipe_has_no_longer_is_not_judged(places) -> None:
    launcher = MemoryLauncher()
    plainly("smoke", places, launcher)
    changed = {"finetune": None}
    with open_pipeline("smoke", overrides=changed, run="r", run_id="r", launcher=launcher, **places) as pipeline:
        convert(pipeline.recipe, PlainRunner(pipeline))
        assert list(finished_students(pipeline.store, "r")) == ["transplant", "align", "distill"]
    plainly("smoke", places, launcher)
    assert list(finished_students(pipeline.store, "r")) == ["transplant", "align", "distill", "finetune"]


def foreign(manifest: Manifest) -> Manifest:
    teacher = manifest.spec["teacher"] | {"fingerprint": "somebody else's"}
    return manifest.model_copy(update={"spec": manifest.spec | {"teacher": teacher}})


def test_a_launcher_says_what_there_is_and_gets_every_job(places) -> None:
    launcher = MemoryLauncher()
    plainly("smoke", places, launcher)
    assert {(s.resources.device, s.resources.processes, s.resources.threads) for s in launcher.specs} == {
        ("cuda", 64, 3)
    }
    assert launcher.graces == {60.0}
    count = len(launcher.specs)
    plainly("smoke", places, launcher)
    assert len(launcher.specs) == count, "what is committed is not made again"


@pytest.mark.parametrize("error", [JobFailed("align: it is too large"), JobCrashed("align crashed")])
def test_a_graph_ends_where_a_job_does_and_goes_on_from_there(places, error) -> None:
    launcher = MemoryLauncher()
    launcher.endings["align"] = [error]
    with pytest.raises(type(error), match="align"):
        plainly("smoke", places, launcher)
    assert [spec.stage for spec in launcher.specs][-1] == "align"
    begun = len(launcher.specs)
    plainly("smoke", places, launcher)
    assert [spec.stage for spec in launcher.specs][begun] == "align"


def test_a_job_that_commits_nothing_is_a_crash(places) -> None:
    launcher = MemoryLauncher()
    launcher.run = lambda spec, **_: None
    with pytest.raises(JobCrashed, match="committed nothing"):
        plainly("smoke", places, launcher)


def test_the_recipe_names_a_launcher_that_there_is() -> None:
    assert set(LAUNCHERS) == set(get_args(Resources.model_fields["launcher"].annotation))
    assert isinstance(find_launcher(Resources()), LocalLauncher)
    with pytest.raises(DocumentError, match=r"resources\.launcher: Input should be 'local'") as raised:
        load_recipe("smoke", {"resources.launcher": "cloud"})
    assert len(str(raised.value).splitlines()) == 1


def test_the_launcher_is_in_no_digest() -> None:
    recipe = load_recipe("smoke")
    elsewhere = recipe.model_copy(update={"resources": recipe.resources.model_copy(update={"launcher": "slurm"})})
    digests = {spec_digest("plan", PlanSpec(recipe=one), dict[str, InputRef]()) for one in (recipe, elsewhere)}
    assert len(digests) == 1
