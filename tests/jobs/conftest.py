"""Tiny models, a tiny tokenizer, and jobs that run in this process on a LocalStore."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from radlads.model.convert.transplant import transplant
from radlads.model.student.export import export_student
from radlads.model.student.load import build_student
from radlads.model.teacher.load import load_teacher
from radlads.tasks.contracts.identity import readings
from radlads.tasks.contracts.job import InputRef, JobResources, JobSpec, Manifest, Stage, StoreRef
from radlads.tasks.contracts.pins.content import ContentHashes
from radlads.tasks.contracts.pins.pins import pin_place, pin_teacher
from radlads.tasks.contracts.specs import StageSpec, TeacherRef, TrainSpec, section_class, spec_digest
from radlads.tasks.contracts.store.open import open_store
from radlads.tasks.jobs.code_version import code_version
from radlads.tasks.jobs.common import Job, execute
from radlads.tasks.jobs.origin import write_origin

STORY = (
    "Once upon a time there was a little dog named Tim. Tim liked to play in the park with his red ball. "
    "One day the ball rolled away, and Tim was sad. A kind girl found it — «voilà!», she said — and they were happy. "
)


@pytest.fixture(scope="session")
def stories() -> list[str]:
    """200 different short documents, with characters of several bytes."""
    words = STORY.split()
    return [f"Story {i}: " + " ".join(words[i % 17 :] + words[: i % 13]) for i in range(200)]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, stories: list[str]) -> Path:
    """A byte-level BPE tokenizer of 400 tokens with EOS, BOS, PAD and a chat template without markers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*stories, "The magic number of the red dog is 0123456789. What?"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>")
    fast.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


def _sizes(vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


@pytest.fixture(scope="session", params=["qwen3"])
def teacher_folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> Path:
    """A Hugging Face folder with a tiny random teacher and the tiny tokenizer."""
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    sizes = _sizes(len(tokenizer))
    model = (
        LlamaForCausalLM(LlamaConfig(**sizes)) if request.param == "llama" else Qwen3ForCausalLM(Qwen3Config(**sizes))
    )
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def lively_student(teacher_folder: Path) -> Callable[..., Any]:
    """lively_student(variant, kept layers) → a student of the tiny teacher whose likeliest text is no single token
    again and again, as that of small random weights is."""

    def make(variant: str, kept: tuple[int, ...] = ()) -> Any:
        teacher = load_teacher(str(teacher_folder))
        torch.manual_seed(0)
        student = build_student(
            teacher.config, variant=variant, options={}, attention_layers=kept, attention_rope=bool(kept)
        )
        transplant(teacher, student)
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if parameter.ndim == 2 and "proj" in name:
                    parameter.mul_(8)
        return student.eval()

    return make


def pinned(spec: StageSpec) -> StageSpec:
    """The spec with everything that it reads pinned as it is now, as a plan would have done."""
    if "pins" not in type(spec).model_fields:
        return spec
    hashes = ContentHashes()
    pins = {reading.location: pin_place(reading, hashes) for reading in readings(spec)}
    return spec.model_copy(update={"pins": pins | spec.pins})


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Job]:
    """make_job(stage, typed spec, {name: InputRef}) → a Job whose scratch and store are in tmp_path."""

    def make(
        stage: Stage,
        spec: StageSpec,
        inputs: dict[str, InputRef] | None = None,
        *,
        scratch: str | None = None,
        threads: int = 1,
        resources: dict[str, Any] | None = None,
    ) -> Job:
        inputs, spec = inputs or {}, pinned(spec)
        store = StoreRef(uri=str(tmp_path / "store"))
        digest = spec_digest(stage, spec, inputs)
        name = f"{stage}-{digest[:12]}"
        job = JobSpec(
            stage=stage,
            run="test",
            recipe="tiny",
            digest=digest,
            spec=spec.model_dump(mode="json"),
            inputs=inputs,
            output_uri=f"{store.uri}/runs/test/{name}",
            store=store,
            resources=JobResources(**{"device": "cpu", "processes": 1, "threads": threads, **(resources or {})}),
            scratch=str(tmp_path / "scratch" / (scratch or name)),
        )
        Path(job.scratch).mkdir(parents=True, exist_ok=True)
        (Path(job.scratch) / "job.json").write_text(job.model_dump_json(), encoding="utf-8")
        return Job(spec=job)

    return make


@pytest.fixture
def run_main() -> Callable[[Callable[[Job], Any], Job], Manifest]:
    """Run a job's main in this process and return what it committed; fails with the job's own message."""

    def run(main: Callable[[Job], Any], job: Job) -> Manifest:
        reason = execute(main, job)
        said = json.loads((job.scratch / "exit.json").read_text(encoding="utf-8"))
        assert reason == "done", said
        manifest = job.store.read_manifest(job.output_prefix)
        assert manifest is not None
        return manifest

    return run


@pytest.fixture(scope="session")
def job_python(warm_python: Callable[..., Any]) -> Any:
    """A Python that has imported what jobs import, for programs whose start is not what a test is about."""
    return warm_python("deepspeed", "radlads.tasks.jobs.train.engines.engine", "radlads.model.training.objectives")


@pytest.fixture
def run_ranks(job_python: Any) -> Callable[..., None]:
    """run_ranks(program, job, count): a job's program (module or text) in `count` processes that form a group; all end
    with `code`."""

    def run(program: str, job: Job, count: int, code: int = 0) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [
            job_python.start(
                "-c" if "\n" in program else "-m", program, str(job.scratch / "job.json"),
                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=job.scratch,
            )
            for rank in range(count)
        ]  # fmt: skip
        codes = [rank.wait() for rank in ranks]
        assert codes == [code] * count, [rank.output for rank in ranks]

    return run


@pytest.fixture
def reference() -> Callable[[Job], InputRef]:
    """The InputRef under which a later job reads a job's product."""
    return lambda job: InputRef(uri=job.spec.output_uri, digest=job.spec.digest)


# Training: one store with a tiny teacher, its transplanted student and a dataset, for every training test of a session.


@dataclass
class Training:
    """Makes training jobs; `teacher` is a folder, `store` holds `student`, `data` and `mixed_data`."""

    root: Path
    teacher: Path
    reference: TeacherRef
    store: StoreRef

    def job(self, stage: Stage, name: str, *, resources: dict[str, Any] | None = None, **section: Any) -> Job:
        """A job of 20 steps (4 sequences of 32 tokens, in 2 forward passes) whose output is runs/<name>/<stage>."""
        settings = {
            "tokens": 20 * 4 * 32,
            "context": 32,
            "batch": 4,
            "micro_batch": 2,
            "heldout_tokens": 320,
            "checkpoint_every": 6,
            **section,
        }
        if stage == "pretrain":
            settings |= {"tokenizer": str(self.teacher), "config": {"model_type": "qwen3", **_sizes(400)}}
        built = section_class(stage)(**settings)
        inputs = {name: self._input(name) for name in (*built.datasets, *(["student"] if stage != "pretrain" else []))}
        spec = pinned(TrainSpec(objective=stage, section=built, teacher=self.reference))
        job = JobSpec(
            stage=stage,
            run=name,
            recipe="tiny",
            digest=spec_digest(stage, spec, inputs),
            spec=spec.model_dump(mode="json"),
            inputs=inputs,
            output_uri=f"{self.store.uri}/runs/{name}/{stage}",
            store=self.store,
            resources=JobResources(**{"device": "cpu", "processes": 1, "threads": 1, **(resources or {})}),
            scratch=str(self.root / "scratch" / name / stage),
        )
        Path(job.scratch).mkdir(parents=True, exist_ok=True)
        (Path(job.scratch) / "job.json").write_text(job.model_dump_json(), encoding="utf-8")
        return Job(spec=job)

    def _input(self, name: str) -> InputRef:
        return InputRef(uri=f"{self.store.uri}/{name}", digest=name)

    @staticmethod
    def curve(job: Job) -> list[tuple[int, float]]:
        """(step, loss) as recorded."""
        rows = [json.loads(line) for line in (job.scratch / "metrics.jsonl").read_text().splitlines()]
        return [(row["step"], row["loss"]) for row in rows if "loss" in row]

    @staticmethod
    def ending(job: Job) -> dict[str, Any]:
        """exit.json."""
        return json.loads((job.scratch / "exit.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, stories: list[str]) -> Training:
    """A teacher with large random weights (so that there is something to learn), its student, and the stories."""
    root = tmp_path_factory.mktemp("training")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    teacher = Qwen3ForCausalLM(Qwen3Config(**_sizes(400), initializer_range=0.15))
    teacher.save_pretrained(root / "teacher")
    tokenizer.save_pretrained(root / "teacher")
    student = build_student(teacher.config, variant="rad_rwkv7", options={}, attention_layers=(), attention_rope=False)
    transplant(teacher, student)
    reference = pin_teacher(str(root / "teacher"))
    write_origin(student.config, reference)
    export_student(student, tokenizer, root / "student" / "model")
    _write_stories(root / "data", tokenizer, stories, reference.tokenizer_fingerprint)
    _write_stories(root / "mixed_data", tokenizer, _recall_documents(), reference.tokenizer_fingerprint)
    ref = StoreRef(uri=str(root / "store"))
    store = open_store(ref)
    for name in ("student", "data", "mixed_data"):
        manifest = Manifest(
            stage=name, digest=name, spec={}, files=(), code=code_version(), created_at=datetime.now(UTC)
        )
        store.commit(name, root / name, manifest)
    return Training(root, root / "teacher", reference, ref)


def _recall_documents() -> list[str]:
    """Short documents that are none of the stories."""
    return [" ".join(f"The red dog says {a} {b}." for b in range(a % 7 + 3)) for a in range(60)]


def _write_stories(folder: Path, tokenizer: PreTrainedTokenizerFast, stories: list[str], fingerprint: str) -> None:
    folder.mkdir()
    splits: dict[str, Any] = {}
    for split, texts in (("train", stories[20:]), ("heldout", stories[:20])):
        documents = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
        stream = np.concatenate([np.asarray(document, dtype="<u2") for document in documents])
        starts = np.cumsum([0, *(len(document) for document in documents[:-1])])
        stream.tofile(folder / f"{split}-00000.bin")
        starts.astype("<u8").tofile(folder / f"{split}-boundaries.bin")
        splits[split] = {
            "shards": [{"file": f"{split}-00000.bin", "tokens": len(stream)}],
            "mask_files": [],
            "tokens": len(stream),
            "documents": len(documents),
            "bytes": sum(len(text.encode()) for text in texts),
            "boundaries_file": f"{split}-boundaries.bin",
        }
    index = {"dtype": "uint16", "eos_id": 2, "bos_id": 1, "vocab_size": len(tokenizer), "has_mask": False}
    (folder / "index.json").write_text(json.dumps({**index, "splits": splits, "tokenizer_fingerprint": fingerprint}))
