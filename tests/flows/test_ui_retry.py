"""A person's rescue of a run, with nothing faked: server, worker, a rank killed with -9, Retry pressed in the page.

Run as a script, it shows what it does: python tests/flows/test_ui_retry.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

JOBS = "radlads.tasks.jobs"
ROOT = Path(__file__).resolve().parent.parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: chromium)"),
]


def write_recipe(folder, seed=0):
    """A random two-layer teacher, a corpus, and a recipe whose align stage lasts long enough to be killed. seed: of the
    teacher; runs with the same one share their products."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
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
    """A server, a worker and MLflow of their own in `home`, and the run that is to be rescued."""

    def __init__(self, home):
        self.home = home
        self.env = {**os.environ, "RADLADS_HOME": str(home), "RADLADS_RETRIES": "0", "OMP_NUM_THREADS": "1"}
        for name in ("PREFECT_API_URL", "RADLADS_STORE", "RADLADS_TRACKING", "RADLADS_WORK"):
            self.env.pop(name, None)

    def radlads(self, *arguments):
        command = [sys.executable, "-m", "radlads.flows.cli", *arguments]
        return subprocess.run(command, env=self.env, check=True, capture_output=True, text=True)

    def start(self):
        self.radlads("services", "up")
        services = json.loads((self.home / "services.json").read_text())
        self.page = services["prefect"]["url"]
        self.password = (self.home / "services-password").read_text().strip()
        auth = tuple(self.password.split(":"))
        self.api = httpx.Client(base_url=f"{self.page}/api", auth=auth, trust_env=False, timeout=60)
        env = {
            **self.env, "PREFECT_API_URL": f"{self.page}/api", "PREFECT_API_AUTH_STRING": self.password,
            "PREFECT_HOME": str(self.home / "prefect"),
        }  # fmt: skip
        deploy = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
        try:
            subprocess.run(deploy, cwd=ROOT, env=env, check=True, capture_output=True)
        except subprocess.CalledProcessError:
            self.stop()  # a fixture that fails here is not torn down
            raise

    def stop(self):
        self.radlads("services", "down")

    def run(self, recipe, name):
        self.name = name
        deployment = self.api.get("/deployments/name/radlads/full").json()["id"]
        asked = {"parameters": {"recipe": str(recipe), "run": name}}
        answer = self.api.post(f"/deployments/{deployment}/create_flow_run", json=asked)
        assert answer.is_success, answer.text
        self.flow_run = answer.json()["id"]

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

    def press_retry(self, picture=None):
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1400, "height": 1000})
            page.goto(f"{self.page}/login")
            page.get_by_role("textbox").fill(self.password)
            page.get_by_role("button", name="Login").click()
            page.wait_for_url("**/dashboard**")
            page.goto(f"{self.page}/runs/flow-run/{self.flow_run}")
            page.get_by_role("button", name="Retry").click(timeout=60_000)
            page.get_by_role("dialog").get_by_role("button", name="Retry").click()
            page.get_by_role("dialog").wait_for(state="hidden")
            if picture:
                page.screenshot(path=picture)
            browser.close()

    def attempts(self):
        """Stage → how often a job was started for it."""
        pointed = (self.home / "store" / "runs" / self.name / "stages").glob("*.json")
        logs = {stage: self.scratch(stage) / "log.txt" for stage in (path.stem.split("-")[0] for path in pointed)}
        return {stage: path.read_text().count("=== attempt") for stage, path in logs.items() if path.exists()}

    def steps(self, stage):
        rows = (self.scratch(stage) / "metrics.jsonl").read_text().splitlines()
        return [row["step"] for row in map(json.loads, rows) if "loss" in row]


@pytest.fixture(scope="module")
def rescue(tmp_path_factory):
    made = Rescue(tmp_path_factory.mktemp("services") / "home")
    made.start()
    yield made
    made.stop()


def rescue_a_run(rescue, folder, say=lambda text: None):
    rescue.run(write_recipe(folder), "rescue")
    say(f"started {rescue.page}/runs/flow-run/{rescue.flow_run}")
    rescue.wait_for(lambda: (rescue.product("align") / "checkpoints" / "latest").exists(), "a checkpoint of align")
    rescue.kill_a_rank("align")
    say("killed a rank of align with -9")
    rescue.wait_for(lambda: rescue.state()[0] in ("FAILED", "COMPLETED", "CRASHED"), "the failure")
    kind, message, _ = rescue.state()
    say(f"{kind}: {message.splitlines()[0]}")
    assert kind == "FAILED"
    assert "align crashed" in message
    assert rescue.attempts() == {"plan": 1, "tokenize": 1, "transplant": 1, "align": 1}

    rescue.press_retry()
    say("pressed Retry in the page")
    rescue.wait_for(lambda: rescue.state()[2] > 1, "the second attempt")
    rescue.wait_for(lambda: rescue.state()[0] in ("FAILED", "COMPLETED", "CRASHED"), "the end")
    assert rescue.state()[0] == "COMPLETED", rescue.state()
    say(f"completed; jobs started for each stage: {rescue.attempts()}")
    assert rescue.attempts() == {"plan": 1, "tokenize": 1, "transplant": 1, "align": 2, "publish": 1}
    assert rescue.steps("align") == list(range(1, 61))
    log = (rescue.scratch("align") / "log.txt").read_text().split("=== attempt")[-1]
    assert "step 1/60" not in log, "it started over instead of going on from its checkpoint"


def test_a_killed_run_is_rescued_in_the_page(rescue, tmp_path):
    rescue_a_run(rescue, tmp_path)


def test_a_cancelled_run_leaves_no_process(rescue, tmp_path):
    rescue.run(write_recipe(tmp_path, seed=1), "cancelled")
    rescue.wait_for(lambda: (rescue.product("align") / "checkpoints" / "latest").exists(), "a checkpoint of align")
    assert len(rescue.processes("align")) >= 4, "supervisor, its warden, launcher, rank"
    rescue.api.post(f"/flow_runs/{rescue.flow_run}/set_state", json={"state": {"type": "CANCELLING"}})
    rescue.wait_for(lambda: rescue.state()[0] == "CANCELLED", "the cancellation")
    rescue.wait_for(lambda: not rescue.processes("align"), "the end of the job", seconds=90)
    ending = json.loads((rescue.scratch("align") / "exit.json").read_text())
    assert ending["reason"] == "preempted", "the ranks were asked before anybody was killed, and saved a checkpoint"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        tale = Rescue(Path(place) / "home")
        tale.start()
        try:
            rescue_a_run(tale, Path(place), say=lambda text: os.write(1, f"{text}\n".encode()))
        finally:
            tale.stop()
