"""A teacher's checkpoint under the names and in the layout of its transformers modules, read tensor by tensor.

On disk a model may store experts separately, or transposed, or the text part under a prefix; transformers
converts this while it loads the whole model. This module does it for the supported families, without loading.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from radlads.model.teacher.refusals import stored_refusal
from radlads.model.weights.finite import check_finite
from radlads.model.weights.weight_files import WeightFiles, open_weight_files
from radlads.tasks.contracts.errors import UserError

# Errors that model constructors raise for values that are inconsistent or unknown.
_REFUSALS = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, AssertionError)
DAMAGED = "the file is damaged, or the model diverged when it was made: download it again"
# Rows compared at a time when two tensors have to be equal.
_BLOCK = 4096
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
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
# Rotary frequencies that old checkpoints store and that every model computes itself.
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")
# Layers that predict further tokens ahead, which transformers' language model leaves out (Qwen3.5).
_AHEAD = re.compile(r"^mtp\.")
_EXPERT = re.compile(
    r"^(?P<experts>.*\.mlp\.experts)\.(?P<index>\d{1,6})\.(?P<part>gate_proj|up_proj|down_proj)\.weight$"
)
_FUSED_EXPERTS = re.compile(r"^.*\.mlp\.experts\.(gate_up_proj|down_proj)$")


def build_empty(config: PreTrainedConfig) -> PreTrainedModel:
    """The config's causal language model on the meta device. Raises UserError if it cannot be built."""
    causal_models: Any = AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return causal_models.from_config(copy.deepcopy(config))
    except _REFUSALS as error:
        causes = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"transformers cannot build the model of this config: {causes}") from error


class TeacherWeights:
    """The teacher's tensors by module name; only the last result of `read` is in memory.

    shapes: module name → shape, for every tensor of the language model. left_out: what is no part of it, by its name
    on disk → number of elements: vision parts, stored frequencies, layers that predict further ahead.
    """

    def __init__(self, files: WeightFiles, config: PreTrainedConfig, *, nested: bool) -> None:
        """config: of the language model. nested: the files are those of a vision-language model.

        Raises UserError unless the headers hold the tensors of the model that the config describes: all, no others,
        each once, of its shape, not quantised. A tied head may be present or not.
        """
        self._files, self._config = files, config
        self._experts: dict[str, dict[tuple[int, str], str]] = {}
        self._plain: dict[str, str] = {}
        self._transposed: set[str] = set()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.left_out: dict[str, int] = {}
        for disk_name in files.names():
            name = _text_name(disk_name) if nested else disk_name
            if name is None or _COMPUTED.search(name) or _AHEAD.match(name):
                self.left_out[disk_name] = _count(files.shape(disk_name))
                continue
            if reason := stored_refusal(files.stored_dtype(disk_name)):
                raise UserError(f"teacher tensor {disk_name} {reason}")
            if found := _EXPERT.match(name):
                part = "down_proj" if found["part"] == "down_proj" else "gate_up_proj"
                parts = self._experts.setdefault(f"{found['experts']}.{part}", {})
                _place(parts, (int(found["index"]), found["part"]), disk_name)
            else:
                _place(self._plain, name, disk_name)
        for name, disk_name in self._plain.items():
            shape = files.shape(disk_name)
            if _FUSED_EXPERTS.match(name) and len(shape) == 3 and shape != _expert_shape(name, config):
                shape = (shape[0], *reversed(shape[1:]))
                self._transposed.add(name)
            self.shapes[name] = shape
        for name, parts in self._experts.items():
            if name in self._plain:
                _place(self._plain, name, next(iter(parts.values())))
            self.shapes[name] = self._stacked_shape(name, parts)
        self._tied = self._check_complete()

    @property
    def dtype(self) -> torch.dtype:
        """The config's dtype, or that of the first floating-point tensor."""
        if isinstance(self._config.dtype, torch.dtype):
            return self._config.dtype
        dtypes = (self._files.dtype(name) for name in self._files.names())
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)

    def check_ties(self) -> None:
        """Raise UserError if the config ties a head for which the checkpoint has different values."""
        check_ties(self._tied, self.shapes, self.read)

    def _check_complete(self) -> dict[str, str]:
        """Tied tensor → the tensor that it is tied to."""
        config, layers = self._config, self._config.num_hidden_layers
        if self.dtype not in _DTYPES:
            raise UserError(f"the teacher's config.json asks for the dtype {self.dtype}, in which no model computes")
        if layers > len(self.shapes):  # before that many layers are built
            raise UserError(f"the teacher's config has {layers} layers, its checkpoint {len(self.shapes)} tensors")
        model = build_empty(config)
        tied = dict(model.all_tied_weights_keys)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if missing := [name for name in expected if name not in self.shapes and name not in tied]:
            hint = self._hint(missing)
            raise UserError(f"the teacher's checkpoint lacks {_listed(missing)}, which its config asks for{hint}")
        for name, shape in expected.items():
            if (found := self.shapes.get(name, shape)) != shape:
                size = " (vocab_size)" if shape[0] == config.vocab_size and found[1:] == shape[1:] else ""
                raise UserError(
                    f"teacher tensor {name} is {found} in the checkpoint and {shape} by its config{size}; "
                    "config.json and weights are not of one model"
                )
        if homeless := [name for name in self.shapes if name not in expected]:
            raise UserError(
                f"the teacher's checkpoint has {_listed(homeless)}, without a place in the model that its config "
                "describes"
            )
        return tied

    def _hint(self, missing: Sequence[str]) -> str:
        if list(missing) == ["lm_head.weight"]:
            return "; if its head is its embeddings, set tie_word_embeddings: true in its config.json"
        if all(name.removeprefix("model.") in self.shapes for name in missing if name.startswith("model.")):
            return "; the names lack the prefix 'model.': save the causal language model, not its backbone"
        return ""

    def rounded(self) -> dict[str, int]:
        """Stored dtype → number of tensors that the config's dtype holds with less precision or a smaller range."""
        counts: dict[str, int] = {}
        for name in self._disk_names():
            dtype = self._files.dtype(name)
            if torch.promote_types(dtype, self.dtype) != self.dtype:
                kept = self._files.stored_dtype(name)
                counts[kept] = counts.get(kept, 0) + 1
        return counts

    def _disk_names(self) -> Iterator[str]:
        yield from self._plain.values()
        for parts in self._experts.values():
            yield from parts.values()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """One tensor; start, stop: rows of its first axis."""
        if name in self._experts:
            return self._stack(name, start, stop)
        if name not in self._transposed:
            return self._files.read(self._plain[name], start, stop)
        return self._files.read(self._plain[name], start, stop).transpose(1, 2).contiguous()

    def load(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor to be held in a model: the file's own pages where they can be used unchanged, else memory of its
        own.

        Raises UserError for values that are not finite, in the file or in that dtype.
        """
        plain = name not in self._experts and name not in self._transposed
        found = self._files.map(self._plain[name]) if plain else self.read(name)
        tensor = found.to(dtype)
        check_finite(f"teacher tensor {name}", tensor, source=found, mend=DAMAGED)
        return tensor

    def _stacked_shape(self, name: str, parts: Mapping[tuple[int, str], str]) -> tuple[int, ...]:
        count = 1 + max(index for index, _ in parts)
        kinds = ("down_proj",) if name.endswith("down_proj") else ("gate_proj", "up_proj")
        forms = {(self._files.shape(disk_name), self._files.dtype(disk_name)) for disk_name in parts.values()}
        # All indices from 0 on and all kinds must be present.
        if count * len(kinds) != len(parts) or len(forms) != 1:
            raise UserError(f"the checkpoint's experts {name} are incomplete or of different sizes; download it again")
        ((shape, _),) = forms
        if len(shape) != 2:
            raise UserError(f"the checkpoint's experts {name} are no matrices, but {shape}")
        return (count, shape[0] * len(kinds), shape[1])

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


def open_teacher_weights(
    path: str, config: PreTrainedConfig, *, revision: str | None = None, download: bool = True
) -> TeacherWeights:
    """The weights of a folder or hub id. config: as `load_teacher_config` gives it. download: False looks at headers
    alone; of a hub id nothing can be read then. Raises UserError: see `TeacherWeights` and `read_headers`."""
    nested = getattr(config, "text_part_of", None) is not None
    files = open_weight_files(path, revision=revision, download=download)
    return TeacherWeights(files, config, nested=nested)


@torch.no_grad()
def load_causal_model(
    path: str, config: PreTrainedConfig, *, dtype: torch.dtype | None, revision: str | None
) -> PreTrainedModel:
    """The language model of a checkpoint, from the tensors that `open_teacher_weights` names and no others.

    dtype: None is the checkpoint's. Raises UserError, also for values that are not finite.
    """
    weights = open_teacher_weights(path, config, revision=revision)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or weights.dtype)
    model.tie_weights()
    weights.check_ties()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in model.all_tied_weights_keys:
            tensor.data = weights.load(name, tensor.dtype)
    return model


def check_ties(tied: Mapping[str, str], shapes: Mapping[str, Sequence[int]], read: Callable[..., Tensor]) -> None:
    """Raise UserError if a config ties tensors for which the teacher has different values.

    tied: name → the tensor that it is. read: (name, start, stop) → rows of a teacher's tensor.
    """
    for name, owner in tied.items():
        if name not in shapes or owner not in shapes or name == owner:
            continue
        for start in range(0, shapes[name][0], _BLOCK):
            rows = (start, min(start + _BLOCK, shapes[name][0]))
            ours, theirs = read(name, *rows), read(owner, *rows)
            check_finite(f"teacher tensor {owner}", theirs, mend=DAMAGED)
            if not torch.equal(ours, theirs):
                raise UserError(
                    f"the config ties {name}, but the teacher's own tensors differ there; "
                    "untie the teacher's config (tie_word_embeddings: false)"
                )


def _place(places: MutableMapping[Any, str], key: Any, disk_name: str) -> None:
    if key in places:
        raise UserError(
            f"the teacher's checkpoint holds {places[key]} and {disk_name}, which stand for one tensor; "
            "it is two models in one: download it again, into an empty folder"
        )
    places[key] = disk_name


def _listed(names: Sequence[str]) -> str:
    first = names[0]
    return first if len(names) == 1 else f"{len(names)} tensors, first {first}"


def _text_name(disk_name: str) -> str | None:
    """The language model's name of a tensor; None for a tensor of the vision parts."""
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
