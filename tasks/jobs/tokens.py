"""tokenize: documents → one flat stream of tokens with boundaries, cut into shards of equal width.

The same spec gives the same bytes, however many processes or restarts it took. Finished parts are kept in the job's
scratch folder, and a restarted job goes on after them.
"""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from radlads.tasks.job import UserError
from radlads.tasks.jobs.common import Job, run_job
from radlads.tasks.jobs.documents import Document
from radlads.tasks.jobs.encode import Encoder, Part
from radlads.tasks.jobs.reader import Reader
from radlads.tasks.jobs.sampling import sample_sources
from radlads.tasks.jobs.shards import Layout, write_dataset
from radlads.tasks.jobs.sources import load_tokenizer, pinned_commit
from radlads.tasks.pins import check_pins
from radlads.tasks.recipe import FilesSource, HubSource, SampleSource
from radlads.tasks.specs import TokenizeSpec

logger = logging.getLogger("radlads")

_PART_BYTES = 4 << 20
# Below this a second process costs more than it saves: each imports its libraries anew.
_POOL_FROM_BYTES = 64 << 20


def main(job: Job) -> dict[str, Any] | None:
    """Fill job.output with shards and index.json. Under several ranks all of them sample, one of them tokenizes."""
    spec: TokenizeSpec = job.typed
    started = time.monotonic()
    tokenizer = open_tokenizer(spec)
    wanted = {i: s for i, s in enumerate(spec.dataset.sources) if isinstance(s, SampleSource)}
    if wanted and spec.teacher is None:
        raise UserError("a `sample` source needs a teacher, and this recipe has none")
    samples = sample_sources(job, wanted, spec.teacher, tokenizer) if spec.teacher else {}
    if job.rank != 0:
        return None

    reader = Reader(spec.dataset.sources, tokenizer, samples)
    with_mask = any(isinstance(s, HubSource | FilesSource) and s.messages_field for s in spec.dataset.sources)
    parts = list(_encode_parts(job, spec, reader, Encoder(tokenizer, *_encoder_options(spec, with_mask))))
    check_pins(spec, job.hashes)  # reading took long: what was read must be what was pinned
    if not parts:
        raise UserError(f"dataset '{spec.name}' has no documents")
    shutil.rmtree(job.output)
    index = write_dataset(
        parts,
        job.output,
        Layout(
            shard_tokens=spec.dataset.shard_tokens,
            max_tokens=spec.dataset.max_tokens,
            seed=spec.dataset.seed,
            eos_id=tokenizer.eos_token_id,
            bos_id=tokenizer.bos_token_id,
            add_bos=spec.dataset.add_bos,
            vocab_size=len(tokenizer),
            tokenizer_fingerprint=spec.tokenizer_fingerprint,
            with_mask=with_mask,
        ),
    )
    for number, path in samples.items():
        shutil.copyfile(path, job.output / f"samples-{number}.jsonl")
    return _metrics(index, time.monotonic() - started)


def open_tokenizer(spec: TokenizeSpec) -> PreTrainedTokenizerBase:
    """The tokenizer that the plan pinned. Raises UserError."""
    revision = pinned_commit(spec.tokenizer_fingerprint)
    tokenizer = load_tokenizer(spec.tokenizer, revision=revision, trust_remote_code=spec.trust_remote_code)
    if spec.dataset.add_bos and tokenizer.bos_token_id is None:
        raise UserError(f"data.{spec.name}.add_bos is on, but the tokenizer has no BOS token")
    return tokenizer


def _encoder_options(spec: TokenizeSpec, with_mask: bool) -> tuple[bool, float, bool]:
    return spec.dataset.add_bos, spec.dataset.heldout_fraction, with_mask


def _encode_parts(job: Job, spec: TokenizeSpec, reader: Reader, encoder: Encoder) -> Iterator[Part]:
    """Parts in reading order, from the scratch folder where they are there, until there are enough tokens."""
    folder = job.scratch / "parts" / job.spec.digest[:16]
    folder.mkdir(parents=True, exist_ok=True)
    enough = spec.dataset.max_tokens or float("inf")
    total_bytes = max(1, sum(file.size for file in spec.files))
    tokens, number, state = 0, 0, None
    while tokens < enough and (done := folder / f"part-{number:06d}").exists():
        part = Part.load(done)
        tokens, number, state = tokens + len(part.ids), number + 1, part.state
        yield part
    if number:
        logger.info("reusing %d finished parts, %d tokens", number, tokens)
    batches = reader.batches(_PART_BYTES, state)
    with _encoding(spec, encoder, job.spec.resources.threads, total_bytes) as encode:
        for path in _in_order(encode, batches, folder, number) if tokens < enough else ():
            part = Part.load(path)
            tokens += len(part.ids)
            _report(job, tokens, enough, sum(part.state["bytes"]), total_bytes)
            yield part
            if tokens >= enough:
                break


def _report(job: Job, tokens: int, enough: float, read_bytes: int, total_bytes: int) -> None:
    if enough != float("inf"):
        job.progress(min(tokens, enough), enough, "tokens")
    else:  # compressed files hold more text than their size says
        job.progress(min(read_bytes, total_bytes), total_bytes, "bytes")
    logger.info("tokenized %d tokens of %.1f MB", tokens, read_bytes / 1e6)


Encode = Callable[[list[Document], dict[str, Any], Path], "Future[Path]"]


def _in_order(
    encode: Encode, batches: Iterator[tuple[list[Document], dict[str, Any]]], folder: Path, first: int
) -> Iterator[Path]:
    """Encoded parts in order, with a few batches under way ahead of the one that is waited for."""
    ahead: deque[Future[Path]] = deque()
    for number, (documents, state) in enumerate(batches, start=first):
        ahead.append(encode(documents, state, folder / f"part-{number:06d}"))
        if len(ahead) >= 2 * (multiprocessing.cpu_count() + 1) or ahead[0].done():
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


@contextmanager
def _encoding(spec: TokenizeSpec, encoder: Encoder, threads: int, total_bytes: int) -> Iterator[Encode]:
    """A function that encodes a batch into a part's folder: here, or in worker processes for a large corpus."""
    hub = any(isinstance(source, HubSource) for source in spec.dataset.sources)
    if threads == 1 or not (hub or total_bytes >= _POOL_FROM_BYTES):

        def encode_here(documents: list[Document], state: dict[str, Any], folder: Path) -> Future[Path]:
            future: Future[Path] = Future()
            future.set_result(_encode_to(encoder, documents, state, folder))
            return future

        yield encode_here
        return
    # Spawned, not forked: the tokenizer's and torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(threads, context, _open_worker, (spec.model_dump_json(), encoder.with_mask))
    try:
        yield lambda documents, state, folder: pool.submit(_encode_in_worker, documents, state, folder)
    finally:
        pool.shutdown(cancel_futures=True)


def _encode_to(encoder: Encoder, documents: Sequence[Document], state: dict[str, Any], folder: Path) -> Path:
    if not folder.exists():
        encoder.encode(documents, state).save(folder)
    return folder


_worker_encoder: list[Encoder] = []


def _open_worker(spec_json: str, with_mask: bool) -> None:
    spec = TokenizeSpec.model_validate_json(spec_json)
    _worker_encoder.append(Encoder(open_tokenizer(spec), *_encoder_options(spec, with_mask)))


def _encode_in_worker(documents: list[Document], state: dict[str, Any], folder: Path) -> Path:
    return _encode_to(_worker_encoder[0], documents, state, folder)


def _metrics(index: dict[str, Any], seconds: float) -> dict[str, Any]:
    train, heldout = index["splits"]["train"], index["splits"]["heldout"]
    tokens = train["tokens"] + heldout["tokens"]
    return {
        "train_tokens": train["tokens"],
        "heldout_tokens": heldout["tokens"],
        "documents": train["documents"] + heldout["documents"],
        "bytes": train["bytes"] + heldout["bytes"],
        "bytes_per_token": (train["bytes"] + heldout["bytes"]) / tokens,
        "seconds": seconds,
    }


if __name__ == "__main__":
    run_job(main)
