"""wkv7_operands: against the mixers that it is to serve, against its reference in Triton's interpreter and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from radlads.kernels.mixer_ops import Residual, wkv7_operands
from radlads.kernels.shared.testing import relative_rms
from radlads.model.mixers.shared import recurrence_wkv7
from radlads.model.mixers.shared.mixer import AttentionShape, FirstValues
from radlads.model.mixers.shared.registry import mixer_class

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def cases_are_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


def mixer(variant, **options):
    shape = AttentionShape(32, 4, 2, 8, False, False, False, False, False, 1e-6)
    torch.manual_seed(0)
    cls = mixer_class(variant)
    resolved = sys.modules[cls.__module__].Options(rope=False, **options).resolve(32, 32)
    made = cls(shape, SimpleNamespace(**resolved.model_dump()), layer=1, num_layers=2, first=False).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return made


@pytest.mark.parametrize(
    ("variant", "options"),
    [("rad_rwkv7", {}), ("hxa079", {}), ("hxa079", {"key_scaling": "log_log_decay"})],
)
def test_the_mixers_compute_these_operands(variant, options, monkeypatch):
    one = mixer(variant, **options)
    seen = []
    monkeypatch.setattr(
        recurrence_wkv7, "wkv7", lambda *inputs, **_: (seen.extend(inputs) or torch.zeros_like(inputs[3]), None)
    )
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    heads = 4 if variant == "rad_rwkv7" else 2
    first = FirstValues(*(torch.randn(2, 5, n, 8, dtype=torch.float64) for n in (heads, 2)))
    one.mix(x, first=first)
    _, k, v, _ = one.project(x, None)
    has_keys = variant == "hxa079"
    found = wkv7_operands(
        k,
        v,
        torch.tanh(x @ one.w1) @ one.w2,
        x @ one.a1 @ one.a2,
        one.w0,
        one.a0,
        values=Residual(first.v, x @ one.v1 @ one.v2, one.v0),
        keys=Residual(first.k, x @ one.k1 @ one.k2, one.k0) if has_keys else None,
        log_log=options.get("key_scaling") == "log_log_decay",
    )
    for name, ours, theirs in zip(found._fields, found, seen[1:], strict=True):
        assert relative_rms(ours, theirs) <= 1e-6, name  # mixers round their gates to fp32


def test_shapes_that_do_not_fit_are_refused_in_one_line():
    k, low = torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 16)
    with pytest.raises(ValueError, match="do not fit together"):
        wkv7_operands(k, k, low, torch.zeros(1, 2, 8), low[0, 0], low[0, 0])
    wide = Residual(torch.zeros(1, 2, 4, 4), low, low[0, 0])
    with pytest.raises(ValueError, match="the residual of keys has the widths 16, 16 and 16; all three must be 8"):
        wkv7_operands(k, k, low, low, low[0, 0], low[0, 0], keys=wide)


@pytest.mark.slow
def test_interpreted():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreter_operands.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "repeats"), [(64, 3), (96, 8), (128, 7)])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_compiles(target, size, repeats, tmp_path):
    code = f"from operands_cases import compile_operands; compile_operands('{target}', {size}, {repeats})"
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.mark.gpu
def test_on_the_gpu():
    from operands_cases import CASES, Case, make, outputs_and_gradients

    from radlads.kernels.mixer_ops import wkv7_operands_reference

    for case in (*CASES, Case("7B", B=1, T=300, G=4, R=7, K=128, values="heads")):
        exact = outputs_and_gradients(
            wkv7_operands_reference, *make(case, torch.bfloat16, as_type=torch.float64, device="cuda")
        )
        ours = outputs_and_gradients(wkv7_operands, *make(case, torch.bfloat16, device="cuda"))
        for name, reference in exact.items():
            assert relative_rms(ours[name], reference) <= 4e-3, (case.name, name)
