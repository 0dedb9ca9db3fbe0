"""Inputs of a training job, made without a network: a random teacher, its student, and random tokens as a dataset.

The student is made by the product's own transplant job; teacher and student are kept in the work folder and shared by
the cases that differ only in other settings.
"""

from __future__ import annotations

import json
import logging
import struct
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from radlads.model.student.load import build_student
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import InputRef, JobResources, JobSpec, Manifest
from radlads.tasks.contracts.pins.content import ContentHashes
from radlads.tasks.contracts.pins.pins import pin_teacher
from radlads.tasks.contracts.recipe.sections import Student
from radlads.tasks.contracts.specs import StageSpec, TeacherRef, TrainSpec, TransplantSpec, spec_digest
from radlads.tasks.contracts.store.local import LocalStore, StoreRef
from radlads.tasks.jobs import transplant
from radlads.tasks.jobs.code_version import code_version
from radlads.tasks.jobs.common import Job, execute
from training_bench.case import Case
from training_bench.shapes import SHAPES, CaseFlops, count_flops

logger = logging.getLogger("training")

_SHARD_BYTES = 2 << 30  # several files, as published models have
_POOL = 1 << 24  # random numbers that all tensors are cut from
_MOST_TOKENS = 1 << 24
_HELDOUT_ROWS = 4


class Inputs:
    """The files of a case, under a work folder."""

    def __init__(self, work: Path, case: Case) -> None:
        self.work, self.case = work, case
        self.teacher = work / f"teacher-{case.shape}-{case.depth}"
        self.store = LocalStore(StoreRef(uri=str(work / "store")))
        self.content_cache = work / "content-hashes.json"
        self._teacher_ref: TeacherRef | None = None

    def make(self, name: str, threads: int) -> JobSpec:
        """Make all inputs of the case's training job, and the job. name: of the job, unique."""
        write_teacher(self.case, self.teacher)
        self._teacher_ref = pin_teacher(str(self.teacher), hashes=ContentHashes(self.content_cache))
        inputs = {"student": self._student(threads), "data": self._dataset(name)}
        return self._job(self.case.stage, self._train_spec(), inputs, name, self.case.resources(threads))

    def _train_spec(self) -> TrainSpec:
        case = self.case
        return TrainSpec(
            objective=case.stage,
            section=case.section(),
            teacher=self._teacher_ref if case.stage != "finetune" else None,
            teacher_bits=case.teacher_bits if case.stage != "finetune" else 16,
            mlp_bits=case.mlp_bits if case.stage != "align" else 16,
        )

    def _job(
        self, stage: Any, spec: StageSpec, inputs: dict[str, InputRef], name: str, resources: JobResources
    ) -> JobSpec:
        return JobSpec(
            stage=stage,
            run="benchmark",
            recipe="benchmark",
            digest=spec_digest(stage, spec, inputs),
            spec=spec.model_dump(mode="json"),
            inputs=inputs,
            output_uri=self.store.join(f"products/{name}"),
            store=self.store.ref,
            resources=resources,
            scratch=str(self.work / "scratch" / name),
            content_cache=str(self.content_cache),
        )

    def _student(self, threads: int) -> InputRef:
        case, name = self.case, f"student-{self.case.student_key}"
        began = time.monotonic()
        student = Student(variant=case.variant, options=case.options, attention_layers=case.attention_layers)
        spec = TransplantSpec(teacher=self._teacher_ref, student=student)
        job = self._job("transplant", spec, {}, name, JobResources(device="cpu", processes=1, threads=threads))
        if self.store.read_manifest(self.store.key(job.output_uri)) is None:
            if execute(transplant.main, Job(spec=job)) != "done":
                ending = json.loads((Path(job.scratch) / "exit.json").read_text(encoding="utf-8"))
                raise UserError(f"the student could not be made: {ending['message']}")
            logger.info("student made in %.0f s", time.monotonic() - began)
        _remove(Path(job.scratch) / "output")
        return InputRef(uri=job.output_uri, digest=job.digest)

    def _dataset(self, name: str) -> InputRef:
        case, folder, vocabulary = self.case, self.work / f"data-{name}", SHAPES[self.case.shape]["vocab_size"]
        folder.mkdir(parents=True, exist_ok=True)
        rows = max(case.batch, min(case.num_steps * case.batch, _MOST_TOKENS // case.context))
        generator = np.random.default_rng(0)
        splits = {}
        for split, count in (("train", rows), ("heldout", _HELDOUT_ROWS)):
            tokens = generator.integers(0, vocabulary, count * case.context + 1, dtype=np.uint32)
            tokens.tofile(folder / f"{split}.bin")
            np.zeros(1, np.uint64).tofile(folder / f"{split}-starts.bin")
            splits[split] = {
                "shards": [{"file": f"{split}.bin", "tokens": len(tokens)}],
                "boundaries_file": f"{split}-starts.bin",
                "tokens": len(tokens),
                "documents": 1,
                "bytes": len(tokens),
            }
        index = {
            "dtype": "uint32",
            "eos_id": 0,
            "vocab_size": vocabulary,
            "has_mask": False,
            "tokenizer_fingerprint": self._teacher_ref.tokenizer_fingerprint,
            "splits": splits,
        }
        (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
        digest = f"random-tokens-{name}"
        manifest = Manifest(
            stage="tokenize", digest=digest, spec={}, files=(), code=code_version(), created_at=datetime.now(UTC)
        )
        self.store.commit(f"products/data-{name}", folder, manifest)
        return InputRef(uri=self.store.join(f"products/data-{name}"), digest=digest)


def teacher_config(case: Case) -> PreTrainedConfig:
    """The shape's config, cut to the case's depth."""
    shape = SHAPES[case.shape] | {"num_hidden_layers": case.depth}
    return AutoConfig.for_model(**shape, bos_token_id=0, eos_token_id=0, dtype="bfloat16")


def case_flops(case: Case) -> tuple[CaseFlops, int]:
    """FLOP of a token of the case, and the teacher's parameters; nothing is allocated."""
    config = teacher_config(case)
    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(config)
        student = build_student(
            config,
            variant=case.variant,
            options=case.options,
            attention_layers=case.attention_layers,
            attention_rope=False,
        )
    flops = count_flops(case.section(), case.stage, teacher, student)
    return flops, sum(parameter.numel() for parameter in teacher.parameters())


def write_teacher(case: Case, folder: Path) -> None:
    """A Hugging Face folder of the shape with random bf16 weights, written straight to files: no model is in memory.

    All tensors are cut from one pool of random numbers, so neighbouring rows may repeat, which changes no time.
    """
    if (folder / "complete").is_file():
        return
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    config = teacher_config(case)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(Path(str(resources.files("radlads.deployments.demo"))) / "tokenizer")
    tokenizer.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(_POOL, generator=generator).mul_(0.02).to(torch.bfloat16).view(torch.uint8).numpy()
    ones = torch.ones(1 << 20, dtype=torch.bfloat16).view(torch.uint8).numpy()
    files = list(_shards(shapes))
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_shard(folder / file, {name: shapes[name] for name in names}, pool, ones)
        weight_map |= dict.fromkeys(names, file)
    total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "complete").touch()
    logger.info("random teacher of %.1f GB written in %.0f s", total / 1e9, time.monotonic() - began)


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterable[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        names.append(name)
        size += 2 * int(np.prod(shape))
        if size >= _SHARD_BYTES:
            yield names
            names, size = [], 0
    if names:
        yield names


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], pool: np.ndarray, ones: np.ndarray) -> None:
    """A safetensors file: 8 bytes of the header's length, the header, the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)))
        stream.write(text)
        for number, (name, shape) in enumerate(shapes.items()):
            left, start = 2 * int(np.prod(shape)), 2 * 7919 * number % len(pool)
            source = ones if "norm" in name else pool
            start = 0 if source is ones else start
            while left:
                piece = source[start : start + left]
                stream.write(piece)
                left, start = left - len(piece), 0


def _remove(folder: Path) -> None:
    """Delete the files of a job's output: the store has them."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
