"""Write a student as a Hugging Face folder that needs nothing but torch and transformers to load.

The folder carries this package's own files, flat and with their imports rewritten: the code that runs is the code that
was trained. The pydantic options stay behind; the config holds them resolved.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import re
from collections.abc import Callable
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
# Files that keep an older name in the folder; the other names follow from the place in the package.
_RENAMED = {
    "radlads.model.mixers.shared.rwkv7_design": "mixer_rwkv7",
    "radlads.model.mixers.shared.registry": "variants",
}
# Modules that a folder may carry: pattern of a module → its name there. GPU kernels are imported where they are called
# for the first time, so that the folder needs neither a GPU nor Triton.
_CARRIED = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"radlads\.model\.(?:student|student\.decoding|mixers\.shared)\.(\w+)", r"\1"),
        (r"radlads\.model\.mixers\.(?!shared\b)(\w+)", r"\1"),
        (r"radlads\.kernels\.shared\.(\w+)", r"kernels_\1"),
        (r"radlads\.kernels\.(?!shared\b)(\w+)", r"\1"),
        (r"radlads\.kernels\.(?!shared\b)(\w+)\.(\w+)", r"\1_\2"),
    )
)
_REGISTRY = "radlads.model.mixers.shared.registry"
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
    read: Callable[[str], Tensor] | None = None,
) -> Path:
    """Write weights (safetensors, sharded above `max_shard_bytes`), config, generation config, code and tokenizer.

    dtype: of the weights written; None keeps the student's. originals: the files that the student was loaded from;
    weights that it holds in 8 bit are copied from them. read: name of a tensor → the tensor, where the student does not
    hold it whole; no more than a shard is read at a time. Weights left in the folder by an earlier attempt are
    replaced. Raises UserError, before the index is written, for values that are not finite.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
        stale.unlink()
    export_papers(student, tokenizer, folder, dtype=dtype)
    written = dtype or student.dtype
    _save_weights(student, folder, max_shard_bytes=max_shard_bytes, dtype=written, originals=originals, read_whole=read)
    return folder


def export_papers(
    student: RadladsForCausalLM,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write an exported folder without its weights: config, generation config, code and tokenizer. The student may be
    on the meta device. dtype: of the weights, None: the student's."""
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
    files: dict[str, str] = {}
    origins: dict[str, str] = {}
    waiting = ["radlads.model.student.configuration", "radlads.model.student.modeling"]
    while waiting:
        module = waiting.pop()
        name = f"{_flat_name(module)}.py"
        if origins.setdefault(name, module) != module:
            raise ValueError(f"{module} and {origins[name]} would both be {name} in an exported model: rename one")
        if name in files:
            continue
        if module == _REGISTRY:
            text = _only_mixer(variant)
        else:
            text = _without_build_parts(_source(module))
        waiting += [match.group(2) for match in _IMPORT.finditer(text)]
        files[name] = _HEADER + _IMPORT.sub(lambda m: f"{m.group(1)}from .{_flat_name(m.group(2))} import", text)
    # One process may load several students whose folders are all called `model`. transformers finds a model's class by
    # its config's, and takes config classes for the same where folder name and text are: so the text names the code.
    code = hashlib.sha256("".join(files[name] for name in sorted(files)).encode()).hexdigest()
    files["configuration_radlads.py"] += f"\n# Goes with the code whose sha256 is {code}.\n"
    return files


def _flat_name(module: str) -> str:
    for pattern, name in _CARRIED:
        if found := pattern.fullmatch(module):
            return f"{_RENAMED.get(module) or found.expand(name)}_radlads"
    raise ValueError(
        f"an exported model cannot carry {module}: it has files of model/student, model/mixers and kernels"
    )


def _only_mixer(variant: str) -> str:
    """The registry of a folder, which has one mixer."""
    return (
        '"""The one mixer of this model."""\n\n'
        f"from radlads.model.mixers.{variant} import Mixer\n\n\n"
        "def mixer_class(name: str) -> type[Mixer]:\n"
        f'    if name != "{variant}":\n'
        f'        raise ValueError(f"this folder holds the mixer {variant}, its config names {{name}}")\n'
        "    return Mixer\n"
    )


def _source(module: str) -> str:
    package, _, name = module.rpartition(".")
    place = resources.files(package)
    file = place / name / "__init__.py" if (place / name).is_dir() else place / f"{name}.py"
    return file.read_text(encoding="utf-8")


def _without_build_parts(text: str) -> str:
    """Remove the pydantic options of a mixer file, which are only used to build a student."""
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
    read_whole: Callable[[str], Tensor] | None,
) -> None:
    tied = set(student.all_tied_weights_keys)
    state = {name: tensor.detach() for name, tensor in student.state_dict().items() if name not in tied}
    planned = {name: _as_written(tensor, dtype) for name, tensor in state.items()}
    rounded = quantized_names(student)
    if rounded and originals is None:
        raise ValueError(f"{rounded[0]} is held in 8 bit: `originals` must say where it is as it was")
    for name in rounded:
        planned[name] = torch.empty(originals.shape(name), dtype=dtype, device="meta")

    def read(name: str) -> Tensor:
        if name in rounded:
            tensor = originals.read(name)
        else:
            tensor = state[name].cpu() if read_whole is None else read_whole(name)
        return (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()

    plan = split_torch_state_dict_into_shards(
        planned, max_shard_size=max_shard_bytes, filename_pattern="model{suffix}.safetensors"
    )
    for name, keys in plan.filename_to_tensors.items():
        _save_shard({key: read(key) for key in keys}, folder / name)  # nothing keeps it while the next one is read
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True), encoding="utf-8"
        )


def _save_shard(shard: dict[str, Tensor], path: Path) -> None:
    places: set[int] = set()
    for key, tensor in shard.items():
        if tensor.data_ptr() in places:  # equal head and embeddings, held once while both are frozen
            shard[key] = tensor.clone()
        places.add(tensor.data_ptr())
        check_finite(f"the student's tensor {key}", tensor, mend="no model was written")
    save_file(shard, path, metadata={"format": "pt"})


def _as_written(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What a tensor's size in a file is told from: itself where its dtype stays, so that nothing is converted yet."""
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    return torch.empty(tensor.shape, dtype=dtype, device="meta")
