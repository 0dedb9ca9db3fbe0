"""An exported folder gives the same logits, here and in a process that has never heard of this package."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from radlads.model import list_variants
from radlads.model.student import export as export_module
from radlads.model.student.export import export_student, remote_code
from radlads.model.student.load import load_student
from radlads.tasks.contracts.errors import UserError

# Loads the folders with bare transformers and prints what it sees; the package and pydantic cannot be imported. One
# process for all: starting it takes longer than what it does.
BARE = """
import json, sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("radlads", "pydantic"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
sys.meta_path.insert(0, Guard())
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
tokens, seen = torch.tensor(json.loads(sys.argv[2])), {}
greedy = dict(do_sample=False, max_new_tokens=6, eos_token_id=None)
padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), tokens[1:, :-5]], 1)
mask = torch.ones_like(tokens)
mask[1, :5] = 0
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits = model(tokens).logits
    torch.manual_seed(0)
    seen[folder.name] = {
        "module": type(model).__module__,
        "dtype": str(model.dtype),
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        "logits": logits.double().flatten().tolist(),
        "made": model.generate(tokens, **greedy).tolist(),
        "uncached": model.generate(tokens, **greedy, use_cache=False).tolist(),
        "padded": model.generate(torch.cat([tokens[:1], padded]), attention_mask=mask, **greedy)[1, -6:].tolist(),
        "alone": model.generate(tokens[1:, :-5], **greedy)[0, -6:].tolist(),
        "sampled": list(model.generate(tokens, do_sample=True, max_new_tokens=3, eos_token_id=None).shape),
        "words": len(AutoTokenizer.from_pretrained(folder)),
    }
leaked = [name for name in sys.modules if name.split(".")[0] in ("radlads", "pydantic")]
print("RESULT" + json.dumps(seen | {"leaked": leaked}))
"""


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<unk>": 0, "a": 1, "b": 2, "<eos>": 3}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")


# Name of the folder → teacher, whether it is tied, settings of the student, dtype.
CASES = {
    "hybrid": ("qwen3", True, {"attention_layers": (1,)}, torch.float32),
    "groupnorm-bf16": ("llama", False, {"options": {"form": "groupnorm"}}, torch.bfloat16),
}


def test_a_bare_process_sees_the_same_models(make_teacher, make_student, tokens, tokenizer, tmp_path: Path) -> None:
    students, wanted = {}, {}
    for name, (model_type, tied, settings, dtype) in CASES.items():
        students[name] = make_student(make_teacher(model_type, tie_word_embeddings=tied), **settings).to(dtype)
        folder = export_student(students[name], tokenizer, tmp_path / "models" / name)
        with torch.no_grad():
            wanted[name] = students[name](tokens).logits
            native = load_student(folder)
            assert native.dtype == dtype
            assert not native.training
            assert torch.equal(native(tokens).logits, wanted[name])

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
    every = json.loads(done.stdout.split("RESULT")[1])
    assert every.pop("leaked") == []
    assert every.keys() == CASES.keys()
    for name, (_, tied, _, dtype) in CASES.items():
        seen = every[name]
        assert seen["module"].startswith("transformers_modules."), name
        assert seen["dtype"] == str(dtype)
        assert seen["tied"] == tied
        assert seen["logits"] == wanted[name].double().flatten().tolist(), name
        assert seen["made"] == seen["uncached"] or dtype == torch.bfloat16
        assert seen["padded"] == seen["alone"] or dtype == torch.bfloat16
        here = students[name].generate(tokens, do_sample=False, max_new_tokens=6, eos_token_id=None)
        assert seen["made"] == here.tolist(), name
        assert seen["sampled"] == [2, 24]
        assert seen["words"] == 4


def test_the_config_holds_every_constant(make_teacher, make_student, tmp_path: Path) -> None:
    student = make_student(make_teacher("qwen3"), attention_layers=(2,))
    config = json.loads((export_student(student, None, tmp_path) / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "radlads"
    assert config["architectures"] == ["RadladsForCausalLM"]
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_radlads.RadladsForCausalLM"
    assert config["dtype"] == "float32"
    assert config["attention_layers"] == [2]
    assert config["teacher"]["model_type"] == "qwen3"
    assert config["options"]["decay_rank"] == 32
    assert config["constants"] == {"decay_offset": 0.5, "group_norm_eps_per_channel": 1e-5}
    assert config["initial_values"] == {"decay_shift": 0.0, "gate_init": "published", "value_residual_init": 1.0}
    assert not config["initial_values"].keys() & config["options"].keys()
    assert config["layer_types"] == ["linear_attention", "linear_attention", "full_attention"]
    assert (config["vocab_size"], config["hidden_size"], config["eos_token_id"]) == (64, 32, 2)
    assert str(tmp_path) not in json.dumps(config)


def test_large_models_are_sharded_and_stale_shards_go(make_teacher, make_student, tokens, tmp_path: Path) -> None:
    student = make_student(make_teacher("qwen3"))
    export_student(student, None, tmp_path, max_shard_bytes=50_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(set(index["weight_map"].values())) > 2
    with torch.no_grad():
        assert torch.equal(load_student(tmp_path)(tokens).logits, student(tokens).logits)
    export_student(student, None, tmp_path, dtype=torch.bfloat16)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert load_student(tmp_path).dtype == torch.bfloat16
    assert load_student(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert student.dtype == torch.float32


def test_a_tied_head_is_saved_once(make_teacher, make_student, tmp_path: Path) -> None:
    student = make_student(make_teacher("llama", tie_word_embeddings=True))
    export_student(student, None, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - it is no mapping
        assert file.metadata() == {"format": "pt"}
    loaded = load_student(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_generation_config_that_transformers_would_not_save(make_teacher, make_student, tmp_path: Path) -> None:
    student = make_student(make_teacher("llama"))
    student.generation_config.temperature = 0.6
    export_student(student, None, tmp_path)
    assert load_student(tmp_path).generation_config.temperature == 0.6


def test_folders_that_are_no_students_are_refused(make_teacher, make_student, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_student(tmp_path / "nothing")
    make_teacher("llama").save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match="not an exported student"):
        load_student(tmp_path / "teacher")
    student = make_student(make_teacher("llama"))
    export_student(student, None, tmp_path / "student")
    config = json.loads((tmp_path / "student/config.json").read_text(encoding="utf-8"))
    config["options"]["gate_rank"] = 64
    (tmp_path / "student/config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=r"does not fit its config: mismatched keys.*g1"):
        load_student(tmp_path / "student")
    config["options"]["gate_rank"] = 32
    config["constants"]["decay_offset"] = 0.6
    (tmp_path / "student/config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="constants"):
        load_student(tmp_path / "student")


@pytest.mark.parametrize("variant", list_variants())
def test_initial_values_are_of_no_meaning_to_an_export(
    make_teacher, make_student, tokens, tmp_path: Path, variant: str
) -> None:
    """Gone, or those of a later version: the folder loads and computes the same, here and by its own code."""
    student = make_student(make_teacher("qwen3"), variant=variant)
    export_student(student, None, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    assert config["initial_values"] or variant == "sliding_window"
    for changed in ({}, {"of_a_later_version": 3}):
        path.write_text(json.dumps(config | {"initial_values": changed}), encoding="utf-8")
        own = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
        with torch.no_grad():
            assert torch.equal(load_student(tmp_path)(tokens).logits, student(tokens).logits)
            assert torch.equal(own(tokens).logits, student(tokens).logits)


@pytest.mark.parametrize("kind", ["options", "constants"])
def test_what_defines_inference_is_required(make_teacher, make_student, tmp_path: Path, kind: str) -> None:
    export_student(make_student(make_teacher("llama")), None, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in config[kind]:
        left = {key: value for key, value in config[kind].items() if key != name}
        path.write_text(json.dumps(config | {kind: left}), encoding="utf-8")
        with pytest.raises(UserError, match=name if kind == "options" else "constants"):
            load_student(tmp_path)
    path.write_text(json.dumps(config | {kind: config[kind] | {"of_a_later_version": 1}}), encoding="utf-8")
    with pytest.raises(UserError, match="of_a_later_version"):
        load_student(tmp_path)


@pytest.mark.parametrize("variant", list_variants())
def test_remote_code_is_flat_and_free_of_the_package(variant: str) -> None:
    files = remote_code(variant)
    assert {"configuration_radlads.py", "modeling_radlads.py", f"{variant}_radlads.py"} <= files.keys()
    for name, text in files.items():
        compile(text, name, "exec")
        code = [line for line in text.splitlines() if "import" in line and not line.startswith("#")]
        assert not any("radlads." in line or "pydantic" in line for line in code), name


def test_weights_are_written_a_shard_at_a_time(make_teacher, make_student, tmp_path, monkeypatch):
    """Neither converted nor read before their turn, and given up after it."""
    seen: list[tuple[weakref.ref[torch.Tensor], int]] = []
    real = export_module._save_shard

    def save(shard, path):
        assert all(reference() is None for reference, _ in seen)
        seen.extend((weakref.ref(tensor), tensor.nbytes) for tensor in shard.values())
        real(shard, path)

    monkeypatch.setattr(export_module, "_save_shard", save)
    student = make_student(make_teacher("qwen3"))
    export_student(student, None, tmp_path, dtype=torch.bfloat16, max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(size for _, size in seen)
