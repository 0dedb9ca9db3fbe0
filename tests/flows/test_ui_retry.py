"""A person's rescue of a run, with nothing faked: server, worker, a rank killed with -9, Retry pressed in the page."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import yaml

JOBS = "radlads.tasks.jobs"
ENDED = ("FAILED", "COMPLETED", "CRASHED")
ROOT = Path(__file__).resolve().parent.parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: chromium)"),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A random two-layer teacher, a corpus, and a recipe whose align stage lasts long enough to be stopped."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("recipe")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=2048, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder / "teacher")
    for file in (ROOT / "deployments" / "demo" / "tokenizer").iterdir():
        shutil.copy(file, folder / "teacher")
    words = ["red", "dog", "ran", "far", "and", "saw", "one", "big", "sun"]
    documents = [" ".join(words[(n * k) % 9] for k in range(1, 60)) for n in range(200)]
    (folder / "corpus.txt").write_text("\n\n".join(documents))
    recipe = {
        "name": "rescue",
        "teacher": {"path": "teacher"},
        "student": {"attention_layers": [1]},
        "data": {"train": {"sources": [{"kind": "files", "paths": ["corpus.txt"], "separator": "\n\n"}]}},
        "align": {"tokens": 32 * 2 * 60, "context": 32, "batch": 2, "micro_batch": 2, "checkpoint_every": 5},
        "resources": {"device": "cpu", "threads": 1},
    }
    path = folder / "rescue.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


class Rescue:
    """A run that is started, stopped and rescued as a person does it in Prefect's page."""

    def __init__(self, services, recipe, name, overrides):
        self.services, self.home, self.api, self.name = services, services.home, services.api(), name
        deployment = self.api.get("/deployments/name/radlads/full").json()["id"]
        asked = {"parameters": {"recipe": str(recipe), "run": name, "overrides": overrides}}
        answer = self.api.post(f"/deployments/{deployment}/create_flow_run", json=asked)
        assert answer.is_success, answer.text
        self.flow_run = answer.json()["id"]
        self.wait_for(lambda: (self.product("align") / "checkpoints" / "latest").exists(), "a checkpoint of align")

    def state(self):
        run = self.api.get(f"/flow_runs/{self.flow_run}").json()
        return run["state"]["type"], run["state"]["message"] or "", run["run_count"]

    def wait_for(self, condition, what, seconds=600):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited too long for {what}; the run is {self.state()}"
            time.sleep(0.2)

    def product(self, stage):
        return self.home / "store" / "products" / stage / self.digest(stage)

    def scratch(self, stage):
        return self.home / "work" / "products" / stage / self.digest(stage)

    def digest(self, stage):
        """Of what the run points at; a name that nothing has before it does."""
        (path,) = [*(self.home / "store" / "runs" / self.name / "stages").glob(f"{stage}*.json")] or [None]
        return json.loads(path.read_text())["digest"] if path else "none"

    def processes(self, stage):
        """Every process of a stage's job: supervisor, launchers, ranks."""
        marker = str(self.scratch(stage))
        found = [p for p in psutil.process_iter(["cmdline"]) if marker in " ".join(p.info["cmdline"] or ())]
        return {process.pid: process.info["cmdline"] for process in found}

    def kill_a_rank(self, stage):
        """kill -9, as the kernel does it when memory runs out."""
        ranks = [pid for pid, line in self.processes(stage).items() if line[1:4] == ["-u", "-m", f"{JOBS}.train.train"]]
        assert len(ranks) == 1, self.processes(stage)
        os.kill(ranks[0], signal.SIGKILL)

    def press_retry(self):
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1400, "height": 1000})
            page.goto(f"{self.services.urls['prefect']}/login")
            page.get_by_role("textbox").fill(self.services.password)
            page.get_by_role("button", name="Login").click()
            page.wait_for_url("**/dashboard**")
            page.goto(f"{self.services.urls['prefect']}/runs/flow-run/{self.flow_run}")
            page.get_by_role("button", name="Retry").click(timeout=60_000)
            page.get_by_role("dialog").get_by_role("button", name="Retry").click()
            page.get_by_role("dialog").wait_for(state="hidden")
            browser.close()

    def attempts(self):
        """Stage → how often a job was started for it."""
        pointed = (self.home / "store" / "runs" / self.name / "stages").glob("*.json")
        logs = {stage: self.scratch(stage) / "log.txt" for stage in (path.stem.split("-")[0] for path in pointed)}
        return {stage: path.read_text().count("=== attempt") for stage, path in logs.items() if path.exists()}

    def steps(self, stage):
        rows = (self.scratch(stage) / "metrics.jsonl").read_text().splitlines()
        return [row["step"] for row in map(json.loads, rows) if "loss" in row]


@pytest.fixture
def start(running, deployed, recipe):
    """start(name, steps): a run that has saved a checkpoint of align. Runs share every product of before."""
    made = []

    def one(name, steps):
        made.append(Rescue(running, recipe, name, {"align.tokens": 32 * 2 * steps}))
        return made[-1]

    yield one
    for each in made:
        each.api.close()


def test_a_killed_run_is_rescued_in_the_page(start):
    run = start("rescue", 60)
    run.kill_a_rank("align")
    run.wait_for(lambda: run.state()[0] in ENDED, "the failure")
    kind, message, _ = run.state()
    assert kind == "FAILED"
    assert "align crashed" in message
    assert run.attempts() == {"plan": 1, "tokenize": 1, "transplant": 1, "align": 1}

    run.press_retry()
    run.wait_for(lambda: run.state()[2] > 1, "the second attempt")
    run.wait_for(lambda: run.state()[0] in ENDED, "the end")
    assert run.state()[0] == "COMPLETED", run.state()
    assert run.attempts() == {"plan": 1, "tokenize": 1, "transplant": 1, "align": 2, "publish": 1}
    assert run.steps("align") == list(range(1, 61))
    log = (run.scratch("align") / "log.txt").read_text().split("=== attempt")[-1]
    assert "step 1/60" not in log, "it started over instead of going on from its checkpoint"


def test_a_cancelled_run_leaves_no_process(start):
    run = start("cancelled", 120)
    assert len(run.processes("align")) >= 4, "supervisor, its warden, launcher, rank"
    run.api.post(f"/flow_runs/{run.flow_run}/set_state", json={"state": {"type": "CANCELLING"}})
    run.wait_for(lambda: run.state()[0] == "CANCELLED", "the cancellation")
    run.wait_for(lambda: not run.processes("align"), "the end of the job", seconds=90)
    ending = json.loads((run.scratch("align") / "exit.json").read_text())
    assert ending["reason"] == "preempted", "the ranks were asked before anybody was killed, and saved a checkpoint"
