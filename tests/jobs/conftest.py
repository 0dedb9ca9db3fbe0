"""Tiny models, a tiny tokenizer, and jobs that run in this process on a LocalStore."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from radlads.tasks.job import InputRef, JobResources, JobSpec, Manifest, Stage, StoreRef
from radlads.tasks.jobs.common import Job, execute
from radlads.tasks.specs import StageSpec, spec_digest

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
        inputs = inputs or {}
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


@pytest.fixture
def reference() -> Callable[[Job], InputRef]:
    """The InputRef under which a later job reads a job's product."""
    return lambda job: InputRef(uri=job.spec.output_uri, digest=job.spec.digest)
