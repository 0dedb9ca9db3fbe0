"""Folders exported by version 0.1.0, before the student was its family's own model, load and give the same numbers."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from radlads.model.student.load import load_student


@pytest.mark.parametrize("kind", ["hybrid", "pure"])
def test_an_older_folder_loads(project_root: Path, tmp_path: Path, kind: str) -> None:
    """The config and logits are recorded; weights are random, drawn anew by their names."""
    golden = json.loads((project_root / "tests/golden/export_format_0.1.0.json").read_text(encoding="utf-8"))[kind]
    (tmp_path / "config.json").write_text(json.dumps(golden["config"]), encoding="utf-8")
    weights = {
        name: 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        for name, shape in golden["shapes"].items()
    }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    student = load_student(tmp_path)
    assert student.config.attention_layers == golden["config"]["attention_layers"]
    assert student.config.constants == student.mixers()[0].CONSTANTS
    both = student.config.options | student.config.initial_values
    assert both == golden["config"]["options"], "initial values were among the options"
    assert student.config.initial_values["decay_shift"] == 0.0
    with torch.no_grad():
        logits = student(torch.arange(3, 24)[None] * 7 % 61 + 3).logits[0, -1, :8]
    torch.testing.assert_close(logits, torch.tensor(golden["logits"]), atol=2e-6, rtol=1e-5)
