"""benchmarks/variants converts by the product's own functions, its engine included; here with the smallest sizes."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def benchmark(project_root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Its command line as a module; its files import each other by their bare names."""
    folder = project_root / "benchmarks" / "variants"
    monkeypatch.syspath_prepend(folder)
    spec = importlib.util.spec_from_file_location("variants_benchmark", folder / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in ("conversion", "pool", "rows", "table"):
        sys.modules.pop(name, None)


def test_a_pure_and_a_hybrid_student(benchmark: ModuleType, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"align_tokens": 512, "align_batch": 4, "distill_tokens": 512, "distill_batch": 4}
    asked = argparse.Namespace(
        **sizes, trials=5, quick=True, large="4x64", device="cpu", work=tmp_path / "work", speed_steps=1, seeds=1,
        processes=1, out=tmp_path,
    )  # fmt: skip
    settings = benchmark.settings_of(asked)
    conversion = sys.modules["conversion"]
    conversion.make_data(settings.recipe, settings.work)
    bench = conversion.Bench(settings)
    bench.open_data()
    results = benchmark.Results(tmp_path / "out", benchmark.describe(asked, settings), {"align": 512, "distill": 512})
    pure = bench.run(benchmark.Unit("pure", "rad_rwkv7"))
    assert pure["align_final"] < pure["align_0"], "nothing was learned"
    assert set(pure["choices"]) == {"even", "last", "difficulty", "recall"}
    results.add(benchmark.Unit("teacher_needle"), bench.run(benchmark.Unit("teacher_needle")))
    results.add(benchmark.Unit("pure", "rad_rwkv7"), pure)
    hybrid = bench.run(benchmark.Unit("hybrid", "rad_rwkv7", layers=(1,)))
    assert 0 < hybrid["kl"] < 10
    assert "rad_rwkv7" in results.page.read_text(encoding="utf-8")
