"""The exported folder of every variant gives the same logits where only torch and transformers are."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import radlads.kernels
from radlads.model import list_variants
from radlads.model.mixers import rad_rwkv6, rwkv7
from radlads.model.student import export
from radlads.model.student.export import _flat_name, export_student, remote_code

# One process for all folders: starting it takes longer than anything that it does.
BARE = """
import json, sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("radlads", "pydantic"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
sys.meta_path.insert(0, Guard())
sys.modules["triton"] = None  # as where it is not installed
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM
tokens, seen = torch.tensor(json.loads(sys.argv[2])), {}
greedy = dict(do_sample=False, max_new_tokens=5, eos_token_id=None)
padded = torch.cat([tokens[:1], torch.cat([torch.zeros(1, 5, dtype=torch.long), tokens[1:, :-5]], 1)])
mask = torch.ones_like(padded)
mask[1, :5] = 0
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits = model(tokens).logits
    seen[folder.name] = {
        "module": type(model).__module__,
        "logits": logits.double().flatten().tolist(),
        "cached": model.generate(tokens, **greedy).tolist(),
        "uncached": model.generate(tokens, **greedy, use_cache=False).tolist(),
        "beams": model.generate(tokens, **greedy, num_beams=2).tolist(),
        "padded": model.generate(padded, attention_mask=mask, **greedy)[1, -5:].tolist(),
        "alone": model.generate(tokens[1:, :-5], **greedy)[0, -5:].tolist(),
    }
print("RESULT" + json.dumps(seen))
"""
# Name of the folder → variant, options, layers kept.
CASES = {
    **{name: (name, {}, (1,) if name.startswith("hxa") else ()) for name in list_variants()},
    "hxa079-published": ("hxa079", {"key_scaling": "log_log_decay"}, (0,)),
    "arwkv": ("rwkv7", {"gate": False, "group_norm": False}, (0,)),
    "rad_rwkv6-groupnorm": ("rad_rwkv6", {"form": "groupnorm", "gate": "low_rank"}, (2,)),
    "sliding_window-few": ("sliding_window", {"window": 3, "sinks": 2}, (1,)),
    "gated_deltanet-conv": ("gated_deltanet", {"short_conv": 4, "gate": "full"}, (0,)),
}
KERNELS = {"rad_rwkv6": "wkv6", "gated_deltanet": "gated_delta", "sliding_window": "window_attention"}  # else: wkv7


def test_a_bare_process_sees_the_same_models(make_teacher, make_student, tokens, tmp_path: Path) -> None:
    wanted, teachers = {}, {name: make_teacher(name) for name in ("qwen3", "llama")}
    for i, (name, (variant, options, kept)) in enumerate(CASES.items()):
        teacher = teachers["llama" if i % 2 else "qwen3"]
        student = make_student(teacher, variant=variant, options=options, attention_layers=kept)
        export_student(student, None, tmp_path / "models" / name)
        with torch.no_grad():
            wanted[name] = student(tokens).logits.double().flatten().tolist()
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-I", "-c", BARE, str(tmp_path / "models"), json.dumps(tokens.tolist())],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path / "elsewhere",
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.split("RESULT")[1])
    assert seen.keys() == CASES.keys()
    for name, result in seen.items():
        assert result["module"].startswith("transformers_modules."), name
        assert result["logits"] == wanted[name], name
        assert result["cached"] == result["uncached"], name
        assert result["padded"] == result["alone"], name
        assert [row[:21] for row in result["beams"]] == tokens.tolist(), name


@pytest.mark.parametrize("variant", list_variants())
def test_a_folder_carries_the_kernels_that_it_runs(variant: str) -> None:
    """Every form of its own operators, those for GPUs too, and of no other."""
    carried = {
        name for name in remote_code(variant) if re.match(r"(wkv\d|gated_delta|window_attention|mixer_ops)_", name)
    }
    own = KERNELS.get(variant, "wkv7")
    there = {
        f"{package.name}_{file.stem}_radlads.py"
        for package in (Path(radlads.kernels.__path__[0]) / name for name in (own, "mixer_ops"))
        for file in package.glob("*.py")
        if file.stem != "__init__"
    }
    assert carried == there - {"mixer_ops_reference_radlads.py"} | {f"{own}_radlads.py", "mixer_ops_radlads.py"}


def test_names_in_the_folder_follow_from_places_in_the_package() -> None:
    """Also those of a kernel or a mixer to come; what is no part of a model is refused, and so are two of one name."""
    named = {
        "radlads.model.student.cache": "cache_radlads",
        "radlads.model.mixers.shared.rwkv7_design": "mixer_rwkv7_radlads",
        "radlads.model.mixers.shared.registry": "variants_radlads",
        "radlads.model.mixers.kda": "kda_radlads",
        "radlads.kernels.shared.slots": "kernels_slots_radlads",
        "radlads.kernels.kda": "kda_radlads",
        "radlads.kernels.kda.chunked": "kda_chunked_radlads",
        "radlads.kernels.kda.triton_op": "kda_triton_op_radlads",
    }
    assert {module: _flat_name(module) for module in named} == named
    for module in ("radlads.model.training.lora", "radlads.kernels.shared", "radlads.tasks.jobs.common"):
        with pytest.raises(ValueError, match=f"cannot carry {module}"):
            _flat_name(module)


def test_a_mixer_called_like_its_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = export._source
    imports = "from radlads.kernels.{0} import {0}\n"
    monkeypatch.setattr(
        export, "_source", lambda module: imports.format("wkv6") if module.endswith(".wkv6") else source(module)
    )
    with pytest.raises(ValueError, match=r"would both be wkv6_radlads\.py"):
        remote_code("wkv6")


def test_files_hold_the_equations() -> None:
    for module in (rwkv7, rad_rwkv6):
        name = module.__name__.rpartition(".")[2]
        assert module.__doc__.strip() in remote_code(name)[f"{name}_radlads.py"]
