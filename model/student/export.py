"""Write a student as a Hugging Face folder that needs nothing but torch and transformers to load.

The folder carries this package's own files, flat and with their imports rewritten: what was trained is what runs. The
pydantic options stay behind; the config holds them resolved.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from radlads.model.student.modeling import RadladsForCausalLM
from radlads.model.student.releases import TESTED
from radlads.model.training.quantized import quantized_names
from radlads.model.weights.finite import check_finite
from radlads.model.weights.weight_files import WeightFiles

_AUTO_MAP = {
    "AutoConfig": "configuration_radlads.RadladsConfig",
    "AutoModel": "modeling_radlads.RadladsModel",
    "AutoModelForCausalLM": "modeling_radlads.RadladsForCausalLM",
    "AutoModelForSequenceClassification": "modeling_radlads.RadladsForSequenceClassification",
}
_HEADER = "# Part of a model exported by radlads (Apache-2.0). Loaded by transformers with trust_remote_code=True.\n"
# Module of the package → file name in the folder; what a module imports from the package follows it.
_FLAT = {
    "radlads.model.student.configuration": "configuration_radlads",
    "radlads.model.student.modeling": "modeling_radlads",
    "radlads.model.student.cache": "cache_radlads",
    "radlads.model.student.documents": "documents_radlads",
    "radlads.model.student.forward_pass": "forward_pass_radlads",
    "radlads.model.mixers.shared.attention_shape": "attention_shape_radlads",
    "radlads.model.mixers.shared.mixer": "mixer_radlads",
    "radlads.model.mixers.shared.rwkv7_design": "mixer_rwkv7_radlads",
    "radlads.model.mixers.shared.recurrence": "recurrence_radlads",
    "radlads.model.mixers.shared.recurrence_wkv7": "recurrence_wkv7_radlads",
    "radlads.model.mixers.shared.token_shift": "token_shift_radlads",
    "radlads.model.student.precision": "precision_radlads",
    "radlads.model.student.releases": "releases_radlads",
    "radlads.model.mixers.shared.registry": "variants_radlads",
    "radlads.kernels.shared.slots": "slots_radlads",
    "radlads.kernels.wkv6": "wkv6_radlads",
    "radlads.kernels.wkv6.chunked": "wkv6_chunked_radlads",
    "radlads.kernels.wkv6.step": "wkv6_step_radlads",
    "radlads.kernels.wkv7": "wkv7_radlads",
    "radlads.kernels.wkv7.chunked": "wkv7_chunked_radlads",
    "radlads.kernels.wkv7.step": "wkv7_step_radlads",
}
# Written instead of copied: the package's own versions choose among variants and backends, the folder has one of each.
_WRITTEN = {
    "radlads.kernels.wkv6": (
        '"""The RAD-RWKV6 operator: the chunked torch form for sequences, one step for decoding."""\n\n'
        "from radlads.kernels.wkv6.chunked import wkv6_chunked as wkv6\n"
        "from radlads.kernels.wkv6.step import wkv6_step_torch as wkv6_step\n\n"
        '__all__ = ["wkv6", "wkv6_step"]\n'
    ),
    "radlads.kernels.wkv7": (
        '"""The RWKV-7 operator: the chunked torch form for sequences, one step for decoding."""\n\n'
        "from radlads.kernels.wkv7.chunked import wkv7_chunked as wkv7\n"
        "from radlads.kernels.wkv7.step import wkv7_delta_step_torch as wkv7_delta_step\n\n"
        '__all__ = ["wkv7", "wkv7_delta_step"]\n'
    ),
}
# Needed to choose a variant's options, not to run it.
_BUILD_ONLY_IMPORTS = {"pydantic", "radlads.model.mixers.shared.options"}
_BUILD_ONLY_CLASSES = {"Options"}
_IMPORT = re.compile(r"^(\s*)from (radlads\.[\w.]+) import", re.MULTILINE)


def export_student(
    student: RadladsForCausalLM,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    max_shard_bytes: int = 4_000_000_000,
    dtype: torch.dtype | None = None,
    originals: WeightFiles | None = None,
) -> Path:
    """Write weights (safetensors, sharded above `max_shard_bytes`), config, generation config, code and tokenizer.

    dtype: of the weights written; None keeps the student's. originals: the files that the student was loaded from;
    weights that it holds in 8 bit are written as they are there. Weights left in the folder by an earlier try are
    replaced. Raises UserError, before the index is written, for values that are not finite.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
        stale.unlink()
    export_papers(student, tokenizer, folder, dtype=dtype)
    _save_weights(student, folder, max_shard_bytes=max_shard_bytes, dtype=dtype or student.dtype, originals=originals)
    return folder


def export_papers(
    student: RadladsForCausalLM,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """All of an exported folder but its weights: config, generation config, code and tokenizer. The student may be on
    the meta device. dtype: of the weights, None: the student's."""
    config = copy.deepcopy(student.config)
    config.dtype = dtype or student.dtype
    config.architectures = [RadladsForCausalLM.__name__]
    config.auto_map = dict(_AUTO_MAP)
    config.tested_transformers = list(TESTED)
    config.save_pretrained(folder)
    _savable(student.generation_config).save_pretrained(folder)
    for name, text in remote_code(student.config.variant).items():
        (folder / name).write_text(text, encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def remote_code(variant: str) -> dict[str, str]:
    """File name → text of every Python file that the folder of a variant carries."""
    flat = {**_FLAT, f"radlads.model.mixers.{variant}": f"{variant}_radlads"}
    written = {
        **_WRITTEN,
        "radlads.model.mixers.shared.registry": (
            '"""The one mixer of this model."""\n\n'
            f"from radlads.model.mixers.{variant} import Mixer\n\n\n"
            "def mixer_class(name: str) -> type[Mixer]:\n"
            f'    if name != "{variant}":\n'
            f'        raise ValueError(f"this folder holds the mixer {variant}, its config names {{name}}")\n'
            "    return Mixer\n"
        ),
    }
    files: dict[str, str] = {}
    waiting = ["radlads.model.student.configuration", "radlads.model.student.modeling"]
    while waiting:
        module = waiting.pop()
        name = f"{_flat_name(flat, module)}.py"
        if name in files:
            continue
        text = written[module] if module in written else _without_build_parts(_source(module))
        waiting += [match.group(2) for match in _IMPORT.finditer(text)]
        files[name] = _HEADER + _IMPORT.sub(lambda m: f"{m.group(1)}from .{_flat_name(flat, m.group(2))} import", text)
    # One process may load several students whose folders are all called `model`. transformers finds a model's class by
    # its config's, and takes config classes for the same where folder name and text are: so the text names the code.
    code = hashlib.sha256("".join(files[name] for name in sorted(files)).encode()).hexdigest()
    files["configuration_radlads.py"] += f"\n# Goes with the code whose sha256 is {code}.\n"
    return files


def _flat_name(flat: Mapping[str, str], module: str) -> str:
    if module not in flat:
        raise ValueError(f"an exported model cannot carry {module}: give it a place in model/student/export.py")
    return flat[module]


def _source(module: str) -> str:
    package, _, name = module.rpartition(".")
    return (resources.files(package) / f"{name}.py").read_text(encoding="utf-8")


def _without_build_parts(text: str) -> str:
    """Drop the pydantic options of a mixer file, which only matter when a student is built."""
    lines = text.splitlines(keepends=True)
    for node in reversed(ast.parse(text).body):
        unwanted = (isinstance(node, ast.ImportFrom) and node.module in _BUILD_ONLY_IMPORTS) or (
            isinstance(node, ast.ClassDef) and node.name in _BUILD_ONLY_CLASSES
        )
        if unwanted:
            del lines[node.lineno - 1 : node.end_lineno]
    return "".join(lines)


def _savable(generation_config: GenerationConfig) -> GenerationConfig:
    """Some teachers set a temperature without sampling, which transformers loads but refuses to save."""
    generation_config = copy.deepcopy(generation_config)
    try:
        generation_config.validate(strict=True)
    except ValueError:
        generation_config.do_sample = True
    return generation_config


def _save_weights(
    student: RadladsForCausalLM,
    folder: Path,
    *,
    max_shard_bytes: int,
    dtype: torch.dtype,
    originals: WeightFiles | None,
) -> None:
    tied = set(student.all_tied_weights_keys)
    state = {
        name: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
        for name, tensor in student.state_dict().items()
        if name not in tied
    }
    rounded = quantized_names(student)
    if rounded and originals is None:
        raise ValueError(f"{rounded[0]} is held in 8 bit: `originals` must say where it is as it was")
    for name in rounded:
        state[name] = torch.empty(originals.shape(name), dtype=dtype, device="meta")
    plan = split_torch_state_dict_into_shards(
        state, max_shard_size=max_shard_bytes, filename_pattern="model{suffix}.safetensors"
    )
    for name, keys in plan.filename_to_tensors.items():
        shard: dict[str, Tensor] = {
            key: (originals.read(key).to(dtype) if state[key].is_meta else state[key].cpu()).contiguous()
            for key in keys
        }
        for key, tensor in shard.items():
            check_finite(f"the student's tensor {key}", tensor, mend="no model was written")
        save_file(shard, folder / name, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True), encoding="utf-8"
        )
