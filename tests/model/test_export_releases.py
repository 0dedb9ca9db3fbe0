"""Exports under the lowest, the locked and the newest release of transformers; older ones are refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from radlads.model.student import releases
from radlads.model.student.export import export_student
from radlads.model.student.load import load_student
from radlads.model.student.releases import TESTED, cache_keyword, check_calls, check_release
from radlads.model.teacher.load import list_families

# Runs in a process of its own, which has bare transformers and the folders.
SCRIPT = """
import json, sys, tempfile, torch, transformers
from transformers import AutoModelForCausalLM
greedy = dict(do_sample=False, max_new_tokens=6, eos_token_id=None)
seen = {"version": transformers.__version__, "from": transformers.__file__}
given = json.loads(sys.argv[1])

class Replays:
    def __init__(self, device): pass
    def rehearse(self, run, *, strict): run()
    def record(self, run): return None, run

def recorded(model):
    # As on a GPU, with steps that run again in a graph's place: a cache that is returned, and one gone on from.
    here = type(model).__module__.rpartition(".")[0]
    loop, steps = (sys.modules[f"{here}.{name}_radlads"] for name in ("generation_loop", "recorded_steps"))
    on_one_gpu, loop._on_one_gpu, steps.CudaRecorder = loop._on_one_gpu, lambda model: True, Replays
    options = dict(do_sample=False, max_new_tokens=16, eos_token_id=None)
    first = model.generate(tokens, **options, return_dict_in_generate=True)
    name = "cache" if "cache" in first else "past_key_values"
    more = torch.cat([first.sequences, tokens[:, :3]], 1)
    second = model.generate(more, **options, **{name: first[name]})
    assert model._recorded_steps, "nothing was recorded"
    plain = model.generate(tokens, **options, disable_compile=True)
    again = model.generate(more, **options, disable_compile=True)
    loop._on_one_gpu = on_one_gpu
    return [torch.equal(first.sequences, plain), torch.equal(second, again)]

tokens = torch.tensor(given["tokens"])
short = tokens[1:, :-5]
rows = torch.cat([tokens[:1], torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1)])
mask = torch.ones_like(rows)
mask[1, :5] = 0
for folder in given["folders"]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(tokens).logits
    made = model.generate(tokens, **greedy)
    replayed = recorded(model)
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        again = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        same = torch.equal(again(tokens).logits, logits)
    gradients = []
    for kind in (None, False, True):
        model.train().zero_grad()
        if kind is not None:
            model.gradient_checkpointing_enable({"use_reentrant": kind})
        model(tokens, labels=tokens, use_cache=kind is not None).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    model.eval()
    seen[folder] = {
        "logits": logits[0, -1].tolist(),
        "made": made.tolist(),
        "uncached": model.generate(tokens, **greedy, use_cache=False).tolist(),
        "padded": model.generate(rows, attention_mask=mask, **greedy)[1, -6:].tolist(),
        "alone": model.generate(short, **greedy)[0, -6:].tolist(),
        "reloaded": same,
        "recorded": replayed,
        "checkpointed": max(float((g - gradients[0]).norm() / gradients[0].norm()) for g in gradients[1:]),
    }
families = {}
for folder in given["families"]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(tokens).logits[:, -1].tolist()
    made, uncached = (model.generate(tokens, **greedy, use_cache=c, pad_token_id=0).tolist() for c in (True, False))
    families[folder] = {"logits": logits, "made": made, "uncached": uncached}
print("RESULT" + json.dumps(seen | {"families": families}))
"""


@pytest.fixture(scope="module")
def families(make_teacher, make_student, tokens, tmp_path_factory) -> dict[Path, torch.Tensor]:
    """Folder of an exported student of each family, layer 1 kept → its last logits, loaded here."""
    root = tmp_path_factory.mktemp("families")
    wanted = {}
    for name in list_families():
        student = make_student(make_teacher(name), attention_layers=(1,), attention_rope=True)
        folder = export_student(student, None, root / name)
        with torch.no_grad():
            wanted[folder] = load_student(folder)(tokens).logits[:, -1]
    return wanted


@pytest.mark.parametrize("release", ["lowest", "locked", "newest"])
def test_an_export_does_the_same_under_every_release(
    exported, families, tokens, project_root: Path, tmp_path, release
) -> None:
    path = project_root / ".venv-transformers" / release
    if release != "locked" and not path.is_dir():
        pytest.skip("tests/releases.py, which make test runs, installs other releases of transformers")
    given = {"tokens": tokens.tolist(), "folders": [str(exported["hybrid"]), str(exported["pure"])]}
    given["families"] = list(map(str, families))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(given)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={
            "PYTHONPATH": "" if release == "locked" else str(path),
            "PATH": os.environ["PATH"],
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "home"),
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.split("RESULT")[1])
    of_families = seen.pop("families")
    version = seen.pop("version")
    assert Path(seen.pop("from")).is_relative_to(path) == (release != "locked")
    assert version == {"locked": transformers.__version__, "lowest": TESTED[0]}.get(release, version)
    for folder, got in seen.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            wanted = model(tokens).logits[0, -1]
        torch.testing.assert_close(torch.tensor(got["logits"]), wanted, atol=1e-5, rtol=1e-5)
        assert got["made"] == got["uncached"]
        assert got["padded"] == got["alone"]
        assert got["reloaded"]
        assert got["recorded"] == [True, True]
        assert got["checkpointed"] < 1e-5
    for folder, expected in families.items():
        got = of_families[str(folder)]
        torch.testing.assert_close(torch.tensor(got["logits"]), expected, atol=1e-5, rtol=1e-5, msg=folder.name)
        assert got["made"] == got["uncached"], folder.name


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.16.1", "6.0.0", "6.0.0.dev0"])
def test_other_releases_are_refused_in_one_line(version: str) -> None:
    with pytest.raises(ImportError, match=r"needs transformers 5\.17\.0 or newer, below 6.*; .* is installed") as error:
        check_release(version)
    assert version in str(error.value)
    assert "\n" not in str(error.value)
    for good in (*TESTED, transformers.__version__, "5.99.0.dev0"):
        check_release(good)


def test_the_tested_range_is_the_projects(project_root: Path) -> None:
    text = (project_root / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"transformers>={TESTED[0].removesuffix(".0")},<6"' in text
    assert Version(TESTED[0]) <= Version(transformers.__version__) <= Version(TESTED[1])
    for page in ("serving.md", "troubleshooting.md"):
        assert " to ".join(TESTED) in (project_root / "docs" / page).read_text(encoding="utf-8")


def test_the_config_names_the_tested_range(exported) -> None:
    assert json.loads((exported["pure"] / "config.json").read_text())["tested_transformers"] == list(TESTED)


class Passing:
    """A part whose forward is as mixers need it."""

    def forward(self, hidden_states, position_embeddings=None, cache=None, position_ids=None, use_cache=None, **more):
        raise NotImplementedError


class Renamed:
    def forward(self, hidden_states, positions=None, memory=None, **more: Any) -> None:
        raise NotImplementedError


class Closed:
    def forward(self, hidden_states, position_embeddings=None, cache=None) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ((Renamed(), Passing(), Passing()), "Renamed takes no 'cache'"),
        ((Passing(), Closed(), Passing()), "Closed passes no keywords on"),
        ((Passing(), Passing(), Renamed()), "Renamed takes no 'position_embeddings'"),
    ],
)
def test_a_release_that_calls_its_parts_otherwise_is_refused(monkeypatch, parts, reason: str) -> None:
    generation = SimpleNamespace(prepare_inputs_for_generation=lambda cache=None, **more: None)
    monkeypatch.setattr(releases.transformers, "GenerationMixin", generation)
    assert cache_keyword(Passing()) == "cache"
    check_calls(Passing(), Passing(), Passing())
    with pytest.raises(ImportError, match=reason):
        check_calls(*parts)
    generation.prepare_inputs_for_generation = lambda past_key_values=None, **more: None
    with pytest.raises(ImportError, match="generate takes no 'cache'"):
        check_calls(Passing(), Passing(), Passing())
