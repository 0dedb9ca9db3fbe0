"""One case of benchmarks/training.py: its settings, and its section of a recipe."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from radlads.deployments.twins import large_recipes
from radlads.model.mixers.shared.registry import find_variant
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import JobResources
from radlads.tasks.contracts.recipe.losses import Align, Distill, Finetune
from radlads.tasks.contracts.recipe.memory import freezes_mlp
from radlads.tasks.contracts.recipe.training import Training
from training_bench.shapes import SHAPE_OF_TEACHER, SHAPES

SECTIONS: dict[str, type[Training]] = {"align": Align, "distill": Distill, "finetune": Finetune}
ENGINES = ("product", "deepspeed", "overlap", "overlap-reduce")
NOT_MEASURED = ("phases", "ce_spikes", "tokens", "data", "lora", "assistant_only", "train_only")


@dataclass(frozen=True)
class Case:
    """Settings of one run. layers: None for the shape's own depth. batch: sequences of an optimizer step over all
    GPUs. sequence_parallel: GPUs that share rows. mlp_bits, teacher_bits: 8 or 16. gradient_checkpointing: or
    "selective". fused: False for the torch forms of what surrounds the recurrence. engine: "product", or a candidate,
    see product.py."""

    shape: str
    stage: str
    layers: int | None = None
    variant: str = "rad_rwkv7"
    options: dict[str, Any] = field(default_factory=dict)
    attention_layers: tuple[int, ...] = ()
    context: int = 512
    micro_batch: int = 1
    batch: int = 1
    gpus: int = 1
    zero: int = 2
    sequence_parallel: int = 1
    offload: bool = False
    engine: str = "product"
    gradient_checkpointing: bool | str = False
    cuda_graphs: str = "off"
    mlp_bits: int = 16
    teacher_bits: int = 16
    freeze: tuple[str, ...] = ()
    loss: str = "l2"
    decay_dtype: str = "auto"
    fused: bool = True
    steps: int = 5
    warmup: int = 2
    profile_steps: int = 0
    memory: bool = False
    """Whether the last step before the measured ones is recorded by the allocator."""
    checkpoint: bool = True
    device: str = "cuda"

    @property
    def depth(self) -> int:
        return self.layers or SHAPES[self.shape]["num_hidden_layers"]

    @property
    def num_steps(self) -> int:
        """Optimizer steps: warm-up, the measured ones, then the profiled ones."""
        return self.warmup + self.steps + self.profile_steps

    @property
    def name(self) -> str:
        cut = f", {self.layers} layers" if self.layers else ""
        return f"{self.shape}{cut}, {self.variant}, {self.stage}"

    @property
    def student_key(self) -> str:
        """Names the student's files: cases that differ only in other settings share them."""
        options = json.dumps([self.options, self.attention_layers], sort_keys=True)
        safe = "".join(letter if letter.isalnum() else "-" for letter in options)[:80]
        return f"{self.shape}-{self.depth}-{self.variant}-{safe}"

    def section(self) -> Training:
        """The training section. Raises pydantic's ValidationError for sizes that exclude one another."""
        given: dict[str, Any] = {
            "tokens": self.num_steps * self.batch * self.context,
            "context": self.context,
            "batch": self.batch,
            "micro_batch": self.micro_batch,
            "gradient_checkpointing": self.gradient_checkpointing,
            "sequence_parallel": self.sequence_parallel,
            "freeze": self.freeze,
            "decay_dtype": self.decay_dtype,
            "checkpoint_every": self.num_steps if self.checkpoint else self.num_steps + 1,
            "heldout_tokens": self.context,
        }
        if self.stage == "align":
            given |= {"loss": self.loss, "freeze": ()}
        return SECTIONS[self.stage].model_validate(given)

    def resources(self, threads: int) -> JobResources:
        """Of the training job. Raises pydantic's ValidationError for a ZeRO stage that there is not."""
        return JobResources(
            device=self.device,
            processes=self.gpus,
            zero_stage=self.zero,
            threads=threads,
            offload_optimizer=self.offload,
            cuda_graphs=self.cuda_graphs,
        )

    def check(self) -> None:
        """Raises UserError, one line, for a case that cannot be run, before anything is made."""
        if self.shape not in SHAPES:
            raise UserError(f"no shape '{self.shape}'; there are {', '.join(SHAPES)}")
        if self.gpus % self.sequence_parallel:
            raise UserError(f"--sequence-parallel {self.sequence_parallel} does not divide --gpus {self.gpus}")
        if self.batch * self.sequence_parallel % (self.micro_batch * self.gpus):
            raise UserError(
                f"--batch {self.batch} is not a multiple of --micro-batch {self.micro_batch} × --gpus {self.gpus}"
            )
        if any(layer >= self.depth for layer in self.attention_layers):
            raise UserError(f"--attention-layers names a layer that a model of {self.depth} layers does not have")
        find_variant(self.variant)
        self.resources(threads=1)
        self.section()
        if self.engine != "product" and (self.zero != 2 or self.offload):
            raise UserError(f"--engine {self.engine} is a form of ZeRO-2: give --zero 2, without --offload")
        if self.mlp_bits == 8 and not freezes_mlp(self.stage, self.section()):
            raise UserError("--mlp-bits 8 needs --freeze mlp: only frozen weights can be held in 8 bit")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def read(cls, path: Path) -> Case:
        """The case in a case.json, which also holds the time when its job was launched."""
        given = {k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if k != "launched"}
        tuples = {name: tuple(given[name]) for name in ("attention_layers", "freeze")}
        return cls(**given | tuples)


def recipe_settings(name: str, stage: str, layers: int | None, shape: str | None = None) -> dict[str, Any]:
    """The fields of a Case that a shipped recipe gives for a stage. Raises UserError.

    shape: another one than its teacher's. Of phases the first counts. Layers to be chosen after align are spread evenly
    here, named ones that a cut model does not have are left out.
    """
    known = dict(large_recipes())
    if name not in known:
        raise UserError(f"no shipped recipe '{name}'; there are {', '.join(sorted(known))}")
    raw = known[name]
    if stage not in raw:
        raise UserError(f"the recipe '{name}' has no section `{stage}`")
    section, student = dict(raw[stage]), raw["student"]
    section |= {k: v for k, v in (section.get("phases") or [{}])[0].items() if k in ("context", "batch", "micro_batch")}
    own_shape = SHAPE_OF_TEACHER[raw["teacher"]["path"]]
    shape = shape or own_shape
    depth = layers or SHAPES[shape]["num_hidden_layers"]
    kept = student.get("attention_layers", ())
    if isinstance(kept, dict):
        count = max(1, kept["count"] * depth // SHAPES[own_shape]["num_hidden_layers"])
        kept = [depth * (i + 1) // (count + 1) for i in range(count)]
    frozen = tuple(section.get("freeze", ()))
    micro = min(section.get("micro_batch", 1), section["batch"])
    return {
        "shape": shape,
        "variant": student.get("variant", "rad_rwkv7"),
        "options": student.get("options", {}),
        "attention_layers": () if stage == "align" else tuple(layer for layer in kept if layer < depth),
        "context": section["context"],
        "micro_batch": micro,
        "batch": section["batch"],
        "gradient_checkpointing": section.get("gradient_checkpointing", False),
        "mlp_bits": student.get("mlp_bits", 16) if "mlp" in frozen else 16,
        "teacher_bits": raw["teacher"].get("bits", 16) if stage != "finetune" else 16,
        "freeze": frozen,
        "loss": section.get("loss", "l2"),
        "zero": raw.get("resources", {}).get("zero_stage", 2),
    }
