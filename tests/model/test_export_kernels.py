"""The GPU kernels that an exported folder carries run without this package, and compute what its torch forms do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from radlads.model.student.export import export_student

pytest.importorskip("triton")

# Runs the kernels under Triton's interpreter, from the code of loaded folders alone.
BARE = """
import importlib, json, sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("radlads", "pydantic"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
sys.meta_path.insert(0, Guard())
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM
torch.manual_seed(0)
B, T, H, K = 1, 33, 1, 16

def part(model, name):
    return importlib.import_module(type(model).__module__.rpartition(".")[0] + f".{name}_radlads")

def inputs(operator):
    r, k, v = (torch.randn(B, T, H, K) for _ in range(3))
    decay = -0.6065 * torch.rand(B, T, H, K)
    kk = torch.nn.functional.normalize(torch.randn(B, T, H, K), dim=-1)
    return (r, decay, k, v) if operator == "wkv6" else (r, decay, k, v, -kk, kk * torch.rand(B, T, H, K))

def run(function, tensors, **options):
    own = [x.clone().requires_grad_() for x in tensors]
    state = torch.full((B, H, K, K), 0.1, requires_grad=True)
    out, final = function(*own, initial_state=state, output_final_state=True, **options)
    (out.sin().sum() + final.cos().sum()).backward()
    return [out.detach(), final.detach(), *(x.grad for x in (*own, state))]

seen = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    operator = folder.name
    function, tensors = getattr(part(model, operator), operator), inputs(operator)
    found, wanted = (run(function, tensors, backend=backend) for backend in ("triton", "reference"))
    seen[operator] = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted))
    if operator == "wkv7":
        heads = [x[:, 0].contiguous() for x in tensors]
        states = [torch.full((B, H, K, K), 0.1) for _ in range(2)]
        plain = part(model, "wkv7_step").wkv7_step_torch(*heads, states[0])
        quick = part(model, "wkv7_triton_step").wkv7_step_triton(*heads, states[1])
        seen["step"] = max((plain - quick).abs().max().item(), (states[0] - states[1]).abs().max().item())
    y, bonus = torch.randn(B, T, H, K), torch.randn(B, T, H * K)
    finish = part(model, "mixer_ops").wkv7_finish
    both = [finish(y, scale=0.5, gate_BTA=bonus, backend=form) for form in ("triton", "torch")]
    seen[operator + " finish"] = (both[0] - both[1]).abs().max().item()
print("RESULT" + json.dumps(seen))
"""


def test_kernels_of_a_folder_run_without_the_package(make_teacher, make_student, tmp_path: Path) -> None:
    for operator, variant in (("wkv7", "rad_rwkv7"), ("wkv6", "rad_rwkv6")):
        student = make_student(make_teacher("llama"), variant=variant)
        export_student(student, None, tmp_path / "models" / operator)
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-I", "-c", BARE, str(tmp_path / "models")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path / "elsewhere",
        env={
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "home"),
            "OMP_NUM_THREADS": "1",
            "TRITON_INTERPRET": "1",
            "PATH": os.environ["PATH"],
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.split("RESULT")[1])
    assert seen.keys() == {"wkv6", "wkv7", "step", "wkv6 finish", "wkv7 finish"}
    assert max(seen.values()) < 2e-5, seen
