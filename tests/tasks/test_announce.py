"""What a run is about to do is said before it is done, and is what happens then; sharing over whole runs."""

import json
import logging
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from radlads.tasks.announce import run_announced
from radlads.tasks.contracts.store.open import open_store
from radlads.tasks.graph import convert, judge
from radlads.tasks.launchers.launcher import JobCrashed
from radlads.tasks.pipeline import finished_students, open_pipeline
from radlads.tasks.plain_runner import PlainRunner

from .test_graph import MemoryLauncher, places  # noqa: F401

PLANNED = {
    "align": {"steps": 16, "seconds": 100.0, "gpu_hours": 8.0, "dollars": 16.0},
    "distill": {"steps": 100, "seconds": 200.0, "gpu_hours": 2.0, "dollars": 4.0},
    "evaluate": {"seconds": 10.0, "gpu_hours": 0.5, "dollars": 1.0},
}


class Launcher(MemoryLauncher):
    """Its plans know what stages cost."""

    def run(self, spec, **named) -> None:
        if spec.stage == "plan":
            commit = open_store(spec.store)
            self._plan(commit, spec)
        super().run(spec, **named)

    def _plan(self, store, spec) -> None:
        from . import test_graph

        real = test_graph.product_files

        def priced(asked):
            test_graph.product_files = real
            report = json.loads(real(asked)["plan.json"])
            return {"plan.json": json.dumps(report | {"stages": PLANNED}).encode()}

        test_graph.product_files = priced

    def launched(self) -> Counter:
        """Stage → jobs since the last time that was asked."""
        found = Counter(spec.stage for spec in self.specs)
        self.specs.clear()
        return found


@pytest.fixture
def go(places, caplog):  # noqa: F811
    """Runs smoke, announced; what was launched and what was said before that, each line by its stage."""
    launcher = Launcher()

    def run(name, judged=None, **overrides):
        caplog.clear()
        asked = {key.replace("__", "."): value for key, value in overrides.items()}
        with (
            caplog.at_level(logging.INFO, "prefect.radlads"),
            open_pipeline("smoke", overrides=asked, run=name, run_id=name, launcher=launcher, **places) as pipeline,
        ):
            graph = partial(convert, pipeline.recipe)
            if judged is not None:
                graph = partial(judge, pipeline.recipe, students=finished_students(pipeline.store, judged))
            run_announced(pipeline, PlainRunner(pipeline), graph)
        lines = [r.getMessage() for r in caplog.records if r.name == "prefect.radlads"]
        return launcher.launched(), dict(line.split(": ", 1) for line in lines)

    run.launcher = launcher
    return run


def test_a_new_run_says_what_it_costs(go):
    launched, said = go("r1")
    assert said["align"] == "new, about 8.0 GPU hours, 16.00 dollars"
    assert said["transplant"] == "new"
    assert said["in all"] == "0 reused, 0 continued, 9 new; about 10.5 GPU hours, 21.00 dollars to go"
    assert set(launched.values()) == {1, 2}
    assert launched["tokenize"] == 2, "two datasets"


def test_a_sweep_over_distill_pays_for_one_align(go):
    go("r1")
    launched, said = go("r2", distill__tokens=1048576)
    assert not {"tokenize", "transplant", "align"} & set(launched)
    assert said["align"].startswith("reused, made by run r1 on 20")
    assert said["distill"] == "new, about 2.0 GPU hours, 4.00 dollars"
    assert said["in all"] == "4 reused, 0 continued, 5 new; about 2.5 GPU hours, 5.00 dollars to go"
    launched, said = go("r3", distill__tokens=1048576)
    assert dict(launched) == {"plan": 1, "publish": 1}, "another name"
    assert said["distill"].startswith("reused, made by run r2")
    launched, said = go("r3", distill__tokens=1048576)
    assert not launched
    assert said["plan"].startswith("reused, made by run r3")
    assert said["in all"] == "10 reused, 0 continued, 0 new"


def test_what_stopped_is_continued_by_whichever_run_asks(go, places):  # noqa: F811
    go.launcher.endings["distill"] = [JobCrashed("no luck")]
    with pytest.raises(JobCrashed):
        go("r1")
    (asked,) = [spec for spec in go.launcher.specs if spec.stage == "distill"]
    for step in (25, 75):
        path = Path(places["store"], "products", "distill", asked.digest, "checkpoints", f"step-{step:06d}")
        path.mkdir(parents=True)
        (path / "manifest.json").write_text("{}")
    Path(asked.scratch, "seen").write_text("by r1")
    go.launcher.launched()
    launched, said = go("r2")
    assert said["distill"] == "continued from step 75 of 100, about 0.5 GPU hours, 1.00 dollars"
    assert said["align"].startswith("reused, made by run r1")
    assert launched["distill"] == 1
    assert Path(asked.scratch, "seen").exists(), "the same folder on this machine, whichever run asks"


def test_a_judgement_is_announced_too(go):
    go("r1")
    launched, said = go("again", judged="r1", needle__lengths=[256])
    assert dict(launched) == {"plan": 1, "needle": 1}
    assert said["evaluate"].startswith("reused, made by run r1")
    assert said["needle"] == "new"


def test_looking_writes_nothing(go, places, monkeypatch):  # noqa: F811
    go("r1")
    from radlads.tasks import announce

    seen, real = [], announce.outlook

    def times():
        return {str(path): path.stat().st_mtime_ns for path in Path(places["store"]).rglob("*") if path.is_file()}

    def look(*arguments):
        start = times()
        found = real(*arguments)
        seen.append({key for key, _ in start.items() ^ times().items()})
        return found

    monkeypatch.setattr(announce, "outlook", look)
    go("r2", distill__tokens=1048576)
    (changed,) = seen
    (changed,) = seen
    assert all(key.endswith("lease.json") for key in changed), "only the run's heartbeat"
