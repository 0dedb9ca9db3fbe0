"""benchmarks/training.py: it runs where there is no GPU, and both of its builds compute the same step."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "training.py"
TINY = "--shape tiny --device cpu --threads 1 --context 16 --micro-batch 2 --steps 1 --warmup 1".split()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))


@pytest.mark.slow
def test_both_builds_run_and_lose_the_same(job_python: Any, tmp_path: Path) -> None:
    out = tmp_path / "rows.md"
    options = [*TINY, "--batch", "4", "--profile", "1", "--compare-plain", "--out", str(out)]
    code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import training; sys.exit(training.main())"
    job_python.run("-c", code, *options)
    text = out.read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| tiny")]
    assert [row[5].split(",")[0] for row in rows] == ["product", "plain"]
    product, plain = ([float(x) for x in row[-1].split(" → ")] for row in rows)
    assert product == pytest.approx(plain, rel=1e-3)
    assert product[0] != product[-1]
    assert all(float(row[6].replace(",", "")) > 0 for row in rows)
    kept = [float(row[10].split()[0].replace(",", "")) for row in rows]
    assert all(5 * 64 * 4 < one < 500 * 64 * 4 for one in kept)
    assert float(re.sub(r" .*", "", rows[0][13])) > 0, "a checkpoint was saved"
    for group in ("gemm", "wkv7", "mixer, elementwise", "optimizer", "loss"):
        assert len(re.findall(rf"^\| {group} \| [\d.]+ \| [\d.]+% \|$", text, re.MULTILINE)) == 2, group


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--batch", "3"], "--batch 3 is not a multiple of --micro-batch 2 × --gpus 1"),
        (["--attention-layers", "3"], "a model of 3 layers does not have"),
        (["--mlp-bits", "8"], "needs --freeze mlp"),
        (["--recipe", "nothing"], "no shipped recipe 'nothing'"),
        (["--zero", "7"], "training.py: zero_stage: Input should be 0, 1, 2 or 3"),
        (["--layers", "0"], "--layers 0: give a number of at least 1"),
        (["--gpus", "0"], "--gpus 0: give a number of at least 1"),
        (["--variant", "nothing"], "training.py: no mixer variant named 'nothing'"),
        (["--context", "33", "--sequence-parallel", "2", "--gpus", "2", "--batch", "2"], "context (33) must be"),
        (["--sweep-file", "/none/cases"], "No such file or directory: '/none/cases'"),
        (["--sequence-parallel", "2"], "--sequence-parallel 2 does not divide --gpus 1"),
        (["--sequence-parallel", "2", "--gpus", "2", "--compare-plain"], "the plain build has no rows that GPUs share"),
        (["--record"], "--record is for runs on a GPU of tasks/jobs/train/gpu_kinds.py, and this is 'cpu'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_made(
    bench: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str], why: str
) -> None:
    import training

    monkeypatch.setattr(sys, "argv", ["training.py", *TINY, "--work", str(tmp_path / "work"), *options])
    with pytest.raises(SystemExit, match=re.escape(why)) as caught:
        training.main()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "work").exists()


def test_flops_follow_the_rules(bench: None) -> None:
    from training_bench.case import Case
    from training_bench.inputs import case_flops

    every = 7_615_616_512  # Qwen2.5-7B
    looked_up = 152064 * 3584
    found = {stage: case_flops(Case("qwen2.5-7b", stage)) for stage in ("align", "distill", "finetune")}
    assert {parameters for _, parameters in found.values()} == {every}
    assert found["distill"][0].by_rule == 8 * every
    assert found["finetune"][0].by_rule == 6 * every
    # A student is its teacher and a few per cent of low-rank maps; embeddings are looked up.
    assert 1.0 < found["distill"][0].counted / (8 * (every - looked_up)) < 1.05
    assert 1.0 < found["finetune"][0].counted / (6 * (every - looked_up)) < 1.05
    align = found["align"][0].counted - 2 * (every - 2 * looked_up)
    attention = 28 * 2 * 3584 * (3584 + 512)
    assert 4 * attention < align < 6 * 1.5 * attention
    frozen = case_flops(Case("qwen2.5-7b", "distill", freeze=("mlp",)))[0]
    assert found["distill"][0].counted - frozen.counted == pytest.approx(2 * 28 * 3 * 3584 * 18944)


def test_a_recipe_gives_its_settings(bench: None) -> None:
    from training_bench.case import recipe_settings

    found = recipe_settings("hrwkv7-reka-flash-3.1", "distill", 6)
    assert (found["shape"], found["variant"], found["context"]) == ("reka-flash-21b", "hxa079", 4096)
    assert (found["micro_batch"], found["batch"], found["mlp_bits"], found["teacher_bits"]) == (7, 35, 8, 8)
    assert "mlp" in found["freeze"]


@pytest.mark.parametrize(
    ("kernel", "part", "group"),
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopB_TNT", "backward of student mlp", "gemm"),
        ("void at::native::vectorized_elementwise_kernel<4, MulFunctor>", "student mixer", "mixer, elementwise"),
        ("forward_kernel", "backward of wkv7", "wkv7"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "gradients", "communication"),
        ("void at::native::vectorized_elementwise_kernel<4, MulFunctor>", "backward of teacher norm", "norm"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "teacher attention", "softmax attention"),
        ("nvjet_tst_128x256_64x4", "loss", "loss"),
    ],
)
def test_kernels_are_grouped_by_name_and_part(bench: None, kernel: str, part: str, group: str) -> None:
    from training_bench.profiling import group_of

    assert group_of(kernel, part) == group


def test_what_is_allocated_at_a_peak(bench: None) -> None:
    """By place; what was freed before the peak, or allocated after it, is not told."""
    from training_bench.memory import at_peak

    mixer = [{"filename": "/lib/torch/nn.py", "line": 1, "name": "linear"}]
    mixer.append({"filename": f"{ROOT}/model/mixers/rwkv7.py", "line": 7, "name": "mix"})
    family = [{"filename": "/lib/site-packages/transformers/models/llama.py", "line": 9, "name": "forward"}]

    def event(action: str, addr: int, size: int, frames: object = ()) -> dict[str, object]:
        return {"action": action, "addr": addr, "size": size, "frames": frames}

    trace = [
        event("alloc", 1, 50, mixer),
        event("free_requested", 1, 50),
        event("free_completed", 1, 50),
        event("free_requested", 99, 10),  # allocated before the record
        event("alloc", 1, 40, mixer),
        event("alloc", 2, 30, family),
        event("alloc", 3, 5),
        event("alloc", 4, 2, mixer),
        event("free_requested", 2, 30),
        event("alloc", 5, 20, mixer),
    ]
    found = at_peak(trace, 100)
    assert found["peak_bytes"] == 100 - 10 + 40 + 30 + 5 + 2
    assert found["held_bytes"] == 90
    places = {place: (size, count) for size, count, place in found["places"]}
    assert places == {
        "model/mixers/rwkv7.py:7 mix": (42, 2),
        "/lib/site-packages/transformers/models/llama.py:9 forward": (30, 1),
        "backward pass of torch's own operators": (5, 1),
    }
    assert at_peak([], 7) == {"peak_bytes": 7, "held_bytes": 7, "places": []}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--recipes", "nothing"], "no shipped recipe of a large teacher: nothing"),
        (["--layers", "0"], "--layers, --steps and --lanes are numbers of at least 1"),
        (["--twins", "--resources", '{"zero_stage": 3}'], "--training and --resources change the large recipes"),
        (["--twins", "--lanes", "2"], "--lanes has folders of its own and large recipes alone"),
    ],
)
def test_bad_options_of_the_recipes_on_a_gpu(
    bench: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], why: str
) -> None:
    import recipes_gpu

    monkeypatch.setattr(sys, "argv", ["recipes_gpu.py", *options])
    with pytest.raises(SystemExit) as caught:
        recipes_gpu.main()
    assert caught.value.code == 2
    assert why in capsys.readouterr().err
