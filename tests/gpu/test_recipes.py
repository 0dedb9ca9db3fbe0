"""The gate before a release: shipped recipes at their true width, every stage by the product's own job, on a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Between them: 8-bit MLPs and teacher, a hybrid and a pure student, every phase of a distill, temperatures, L2Wrap,
# cross-entropy spikes, the seven-term loss, LoRA at 16k, packed documents, a choice of layers by recall.
LANES = (("hrwkv7-reka-flash-3.1",), ("prwkv7-reka-flash-3",), ("qwen3-8b-hybrid",))
STAGES = {"plan", "transplant", "align", "distill", "evaluate", "needle", "publish", "reload"}


@pytest.mark.gpu
@pytest.mark.timeout(590)
def test_recipes_at_true_width(project_root: Path, tmp_path: Path):
    script = project_root / "benchmarks" / "recipes_gpu.py"
    sizes = ("--layers", "2", "--steps", "1", "--vocab", "32768")
    lanes = [
        subprocess.Popen(
            [sys.executable, str(script), "--recipes", *names, *sizes, "--json", str(tmp_path / f"{number}.json")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, names in enumerate(LANES)
    ]
    said = [lane.communicate()[0] for lane in lanes]
    rows = []
    for number, (names, lane) in enumerate(zip(LANES, lanes, strict=True)):
        assert lane.returncode == 0, said[number][-6000:]
        rows += json.loads((tmp_path / f"{number}.json").read_text())["rows"]
        for name in names:
            mine = {row["stage"]: row for row in rows if row["recipe"] == name}
            assert mine.keys() >= STAGES, (name, sorted(mine))
            assert mine["distill"]["kernels"]["linear_kl"].startswith(("triton", "library products, rows by triton"))
            assert mine["distill"]["kernels"]["wkv7"].startswith("triton")
            assert "plain torch" not in json.dumps(mine["align"]["kernels"] | mine["distill"]["kernels"])
    assert {row["recipe"] for row in rows if row["stage"] == "choose"} == {"qwen3-8b-hybrid"}
    assert {row["recipe"] for row in rows if row["stage"] == "finetune"} == {"prwkv7-reka-flash-3", "qwen3-8b-hybrid"}
