"""A teacher's checkpoint under the names and in the layout that its transformers modules have, read tensor by tensor.

On disk a model may keep every expert by itself, or experts transposed, or the text part under a prefix; transformers
sorts this out while it loads the whole model. This does it for the families that can be converted, without loading.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from radlads.model.weight_files import WeightFiles, open_weight_files
from radlads.tasks.job import UserError

# Prefixes of the text part in checkpoints of vision-language models.
_TEXT_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.layers.", "model.layers."),
    ("model.embed_tokens.", "model.embed_tokens."),
    ("model.norm.", "model.norm."),
    ("lm_head.", "lm_head."),
)
# Frequencies that old checkpoints carry and that every model computes by itself.
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")
_EXPERT = re.compile(r"^(?P<experts>.*\.mlp\.experts)\.(?P<index>\d+)\.(?P<part>gate_proj|up_proj|down_proj)\.weight$")
_FUSED_EXPERTS = re.compile(r"^.*\.mlp\.experts\.(gate_up_proj|down_proj)$")


class TeacherWeights:
    """The teacher's tensors by module name; nothing is in memory but what `read` returned last.

    shapes: module name → shape, for every tensor of the language model. left_out: what is no part of it, by its name
    on disk → number of elements: vision parts, stored frequencies.
    """

    def __init__(self, files: WeightFiles, config: PreTrainedConfig, *, nested: bool) -> None:
        """config: of the language model. nested: the files are those of a vision-language model."""
        self._files, self._config = files, config
        self._experts: dict[str, dict[tuple[int, str], str]] = {}
        self._plain: dict[str, str] = {}
        self._transposed: set[str] = set()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.left_out: dict[str, int] = {}
        for disk_name in files.names():
            name = _text_name(disk_name) if nested else disk_name
            if name is None or _COMPUTED.search(name):
                self.left_out[disk_name] = _count(files.shape(disk_name))
            elif found := _EXPERT.match(name):
                part = "down_proj" if found["part"] == "down_proj" else "gate_up_proj"
                parts = self._experts.setdefault(f"{found['experts']}.{part}", {})
                parts[int(found["index"]), found["part"]] = disk_name
            else:
                self._plain[name] = disk_name
        for name, disk_name in self._plain.items():
            shape = files.shape(disk_name)
            if _FUSED_EXPERTS.match(name) and shape != _expert_shape(name, config):
                shape = (shape[0], *reversed(shape[1:]))
                self._transposed.add(name)
            self.shapes[name] = shape
        for name, parts in self._experts.items():
            self.shapes[name] = self._stacked_shape(name, parts)

    @property
    def dtype(self) -> torch.dtype:
        """As the config says, or of the first floating-point tensor."""
        if isinstance(self._config.dtype, torch.dtype):
            return self._config.dtype
        dtypes = (self._files.dtype(name) for name in self._files.names())
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """One tensor; start, stop: rows of its first axis."""
        if name in self._experts:
            return self._stack(name, start, stop)
        if name not in self._transposed:
            return self._files.read(self._plain[name], start, stop)
        return self._files.read(self._plain[name], start, stop).transpose(1, 2).contiguous()

    def _stacked_shape(self, name: str, parts: Mapping[tuple[int, str], str]) -> tuple[int, ...]:
        count = 1 + max(index for index, _ in parts)
        kinds = ("down_proj",) if name.endswith("down_proj") else ("gate_proj", "up_proj")
        wanted = {(index, kind) for index in range(count) for kind in kinds}
        shapes = {self._files.shape(disk_name) for disk_name in parts.values()}
        if wanted != parts.keys() or len(shapes) != 1:
            raise UserError(f"the checkpoint's experts {name} are incomplete or of different sizes; download it again")
        rows, columns = shapes.pop()
        return (count, rows * len(kinds), columns)

    def _stack(self, name: str, start: int, stop: int | None) -> Tensor:
        """Experts start ... stop - 1: [E, 2I, D] with the gates above the ups, or [E, D, I]."""
        parts = self._experts[name]
        stop = self.shapes[name][0] if stop is None else stop
        stacked = torch.empty(stop - start, *self.shapes[name][1:], dtype=self._files.dtype(next(iter(parts.values()))))
        kinds = ("down_proj",) if name.endswith("down_proj") else ("gate_proj", "up_proj")
        for index in range(start, stop):
            for kind, rows in zip(kinds, stacked[index - start].chunk(len(kinds)), strict=True):
                rows.copy_(self._files.read(parts[index, kind]))
        return stacked


def open_teacher_weights(path: str, config: PreTrainedConfig, *, revision: str | None = None) -> TeacherWeights:
    """The weights of a folder or hub id. config: as `load_teacher_config` gives it. Raises UserError."""
    nested = getattr(config, "text_part_of", None) is not None
    return TeacherWeights(open_weight_files(path, revision=revision), config, nested=nested)


@torch.no_grad()
def load_text_part(
    path: str, config: PreTrainedConfig, *, dtype: torch.dtype | None, revision: str | None
) -> PreTrainedModel:
    """The language model within a vision-language checkpoint. Raises UserError when tensors are missing or misfit."""
    weights = open_teacher_weights(path, config, revision=revision)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or weights.dtype)
    model.tie_weights()
    tied = set(model.all_tied_weights_keys)
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        if weights.shapes.get(name) != tensor.shape:
            found = weights.shapes.get(name, "missing")
            raise UserError(f"the text part of '{path}' does not fit its config: {name} is {found}, not {tensor.shape}")
        tensor.copy_(weights.read(name))
    return model


def _text_name(disk_name: str) -> str | None:
    """The language model's own name of a tensor; None for one of the vision parts."""
    for prefix, plain in _TEXT_PREFIXES:
        if disk_name.startswith(prefix):
            return plain + disk_name.removeprefix(prefix)
    return None


def _expert_shape(name: str, config: PreTrainedConfig) -> tuple[int, ...]:
    """Of the modules' fused experts."""
    inner, width = config.moe_intermediate_size, config.hidden_size
    rows_columns = (width, inner) if name.endswith("down_proj") else (2 * inner, width)
    return (config.num_experts, *rows_columns)


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
