"""The tokenize job: documents → one flat token stream with document boundaries, in shards of equal length.

The output bytes depend on the spec alone, not on the number of processes or restarts. Finished parts are kept in the
job's scratch folder; a restarted job continues after them.
"""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.pins.pins import check_pins
from radlads.tasks.contracts.recipe.recipe import HubSource, SampleSource
from radlads.tasks.contracts.specs import TokenizeSpec
from radlads.tasks.jobs.common import Job, run_job
from radlads.tasks.jobs.data.encode import Encoder, Part
from radlads.tasks.jobs.data.encoded_documents import Spool
from radlads.tasks.jobs.data.mixture import Mixture, mix
from radlads.tasks.jobs.data.reader import Reader
from radlads.tasks.jobs.data.sampling import sample_sources
from radlads.tasks.jobs.data.shards import Layout, write_dataset, write_documents
from radlads.tasks.jobs.data.text.documents import Document
from radlads.tasks.jobs.data.text.text_files import EXPANSION
from radlads.tasks.jobs.sources import load_tokenizer, pinned_commit
from radlads.tasks.jobs.teacher.place import TEACHER_INPUT

logger = logging.getLogger("radlads")

Encode = Callable[[list[Document], dict[str, Any]], "Future[Part]"]

_PART_BYTES = 4 << 20
# Less text is encoded in this process, at 0.7 MB/s: to start workers, which import all libraries, takes longer.
_POOL_FROM_BYTES = 24 << 20
_TOKEN_BYTES = 6  # of text, at most: what a dataset with max_tokens reads
# Share of max_tokens that a mixture has at least: it ends where a document would exceed them.
_LEAST_FILLED = 0.9


def main(job: Job) -> dict[str, Any] | None:
    """Write shards and index.json to job.output. All ranks sample; rank 0 tokenizes."""
    spec: TokenizeSpec = job.typed
    started = time.monotonic()
    # Of a GGUF teacher it is read from the folder that was made of it.
    folder = str(job.input(TEACHER_INPUT) / "model") if TEACHER_INPUT in job.spec.inputs else spec.tokenizer
    tokenizer = open_tokenizer(spec, folder)
    to_sample = {i: s for i, s in enumerate(spec.dataset.sources) if isinstance(s, SampleSource)}
    if to_sample and spec.teacher is None:
        raise UserError("a `sample` source needs a teacher, and this recipe has none")
    samples = sample_sources(job, to_sample, spec.teacher, tokenizer) if spec.teacher else {}
    if job.rank != 0:
        return None

    reader = Reader(spec.dataset.sources, tokenizer, samples)
    spools = _encode_all(job, spec, reader, folder, _make_encoder(spec, tokenizer))
    check_pins(spec, job.hashes)  # the files may have changed while they were read
    if not any(spool.tokens for spool in spools):
        raise UserError(f"dataset '{spec.name}' has no documents")
    counts = sum((spool.counts for spool in spools), Counter[str]())
    _warn_of(counts)
    shutil.rmtree(job.output)
    layout = Layout(
        shard_tokens=spec.dataset.shard_tokens,
        max_tokens=spec.dataset.max_tokens,
        seed=spec.dataset.seed,
        eos_id=tokenizer.eos_token_id,
        bos_id=tokenizer.bos_token_id,
        add_bos=spec.dataset.add_bos,
        vocab_size=len(tokenizer),
        tokenizer_fingerprint=spec.tokenizer_fingerprint,
        with_mask=_has_chats(spec),
    )
    if spec.dataset.shares is None:
        index, mixed = write_dataset(spools[0].read(), job.output, layout), dict[str, Any]()
    else:
        mixture = _mix(spec, [spool.read() for spool in spools])
        mixed = {"source_tokens": mixture.tokens, "source_passes": mixture.passes}
        index = write_documents(mixture, np.arange(mixture.count), mixture.heldout, job.output, layout)
    for number, path in samples.items():
        shutil.copyfile(path, job.output / f"samples-{number}.jsonl")
    return _metrics(index, time.monotonic() - started) | mixed | dict(counts)


def open_tokenizer(spec: TokenizeSpec, folder: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer from a folder, or at its pinned commit. Raises UserError."""
    revision = pinned_commit(spec.tokenizer_fingerprint)
    tokenizer = load_tokenizer(folder, revision=revision, trust_remote_code=spec.trust_remote_code)
    if spec.dataset.add_bos and tokenizer.bos_token_id is None:
        raise UserError(f"data.{spec.name}.add_bos is on, but the tokenizer has no BOS token")
    return tokenizer


def _has_chats(spec: TokenizeSpec) -> bool:
    return any(source.has_chats for source in spec.dataset.sources)


def _make_encoder(spec: TokenizeSpec, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    dataset = spec.dataset
    return Encoder(tokenizer, dataset.add_bos, dataset.heldout_fraction, _has_chats(spec), dataset.sources)


def _encode_all(job: Job, spec: TokenizeSpec, reader: Reader, folder: str, encoder: Encoder) -> list[Spool]:
    """All sources interleaved in one spool, up to max_tokens; or, with weights, each source in its own, as far as its
    share needs."""
    dataset, place = spec.dataset, job.scratch / "encoded"
    limit, digest = dataset.max_tokens or float("inf"), job.spec.digest[:16]
    total_bytes = max(1, sum(file.size for file in spec.files))
    found = sum(file.size * EXPANSION.get(Path(file.path).suffix, 1.0) for file in spec.files)
    text_bytes = min(found, limit * _TOKEN_BYTES)
    with _encoding(spec, folder, encoder, job.spec.resources.threads, text_bytes) as encode:
        if dataset.shares is None:
            spools = [Spool(place / digest)]
            _encode(job, encode, reader, spools[0], limit, total_bytes)
        else:
            spools = [Spool(place / f"{digest}-{index}") for index in range(len(dataset.sources))]
            for index, (spool, share) in enumerate(zip(spools, dataset.shares, strict=True)):
                _encode(job, encode, reader, spool, limit * share, total_bytes, only=index)
    return spools


def _encode(
    job: Job, encode: Encode, reader: Reader, spool: Spool, limit: float, total_bytes: int, *, only: int | None = None
) -> None:
    """Append parts to the spool in reading order, after those it holds, until it has the tokens. only: the source that
    is read alone; then training tokens count, and there is one document more."""
    tokens = spool.tokens if only is None else spool.train_tokens
    if spool.parts:
        logger.info("reusing %d finished parts, %d tokens", spool.parts, spool.tokens)

    def is_enough() -> bool:
        return tokens >= limit if only is None else tokens > limit

    if is_enough():
        return
    for part in _in_order(encode, reader.batches(_PART_BYTES, spool.state, only)):
        spool.append(part)
        tokens += part.tokens if only is None else part.train_tokens
        _report(job, tokens, limit, sum(part.state["bytes"]), total_bytes)
        if is_enough():
            break


def _mix(spec: TokenizeSpec, parts: list[Part]) -> Mixture:
    """Raises UserError where a source has less than its share of max_tokens, or a long document keeps all from it."""
    dataset = spec.dataset
    assert dataset.shares is not None
    repeats = [source.repeats for source in dataset.sources]
    mixture = mix(parts, dataset.shares, repeats, max_tokens=dataset.max_tokens, seed=dataset.seed)
    for index, (tokens, passes) in enumerate(zip(mixture.tokens, mixture.passes, strict=True)):
        share = tokens / max(1, sum(mixture.tokens))
        logger.info("source %d: %d training tokens, %.2f %%, read %.2f times", index, tokens, 100 * share, passes)
    ended = mixture.ended
    if ended is None:
        assert dataset.max_tokens is not None  # else a mixture goes on until a source ends
        if mixture.total < _LEAST_FILLED * dataset.max_tokens:
            raise UserError(
                f"data.{spec.name} ends after {mixture.total} tokens: the next document, of source {mixture.turn}, "
                f"is too long for what remains of max_tokens ({dataset.max_tokens}); raise it, or split long documents"
            )
        return mixture
    have = f"source {ended} of data.{spec.name} ends after {mixture.tokens[ended]} training tokens"
    if dataset.max_tokens is not None:
        needed = dataset.shares[ended] * dataset.max_tokens
        raise UserError(
            f"{have} (repeats: {repeats[ended]}), but its weight asks for about {needed:.0f} of max_tokens; raise its "
            "repeats, or lower its weight or max_tokens"
        )
    logger.info("%s, and with it the mixture", have)
    return mixture


def _warn_of(counts: Mapping[str, int]) -> None:
    if count := counts.get("special_tokens_as_text"):
        logger.warning(
            "the documents contain the text of special tokens %d times; it is encoded as plain text. Set "
            "`special_tokens: parse` on the source to encode the tokens, or `separator` to split text files at it",
            count,
        )
    if count := counts.get("replaced_characters"):
        logger.warning("%d invalid characters were replaced by U+FFFD", count)
    if count := counts.get("chats_without_assistant"):
        logger.warning("%d chats contain no assistant text", count)


def _report(job: Job, tokens: int, limit: float, read_bytes: int, total_bytes: int) -> None:
    if limit != float("inf"):
        job.progress(min(tokens, limit), limit, "tokens")
    else:  # compressed files contain more text than their size
        job.progress(min(read_bytes, total_bytes), total_bytes, "bytes")
    logger.info("tokenized %d tokens of %.1f MB", tokens, read_bytes / 1e6)


def _in_order(encode: Encode, batches: Iterator[tuple[list[Document], dict[str, Any]]]) -> Iterator[Part]:
    """Yield encoded parts in order, with a bounded number of batches encoding ahead."""
    ahead: deque[Future[Part]] = deque()
    for documents, state in batches:
        ahead.append(encode(documents, state))
        if len(ahead) >= 2 * (multiprocessing.cpu_count() + 1) or ahead[0].done():
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


@contextmanager
def _encoding(spec: TokenizeSpec, folder: str, encoder: Encoder, threads: int, text_bytes: float) -> Iterator[Encode]:
    """Yield a function that encodes a batch: in this process, or in worker processes for a large corpus."""
    hub = any(isinstance(source, HubSource) for source in spec.dataset.sources)
    if threads == 1 or not (hub or text_bytes >= _POOL_FROM_BYTES):

        def encode_here(documents: list[Document], state: dict[str, Any]) -> Future[Part]:
            future: Future[Part] = Future()
            future.set_result(encoder.encode(documents, state))
            return future

        yield encode_here
        return
    # Spawn, not fork: the threads of the tokenizer and of torch do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(threads, context, _open_worker, (spec.model_dump_json(), folder))
    try:
        yield lambda documents, state: pool.submit(_encode_in_worker, documents, state)
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: list[Encoder] = []


def _open_worker(spec_json: str, folder: str) -> None:
    spec = TokenizeSpec.model_validate_json(spec_json)
    _worker_encoder.append(_make_encoder(spec, open_tokenizer(spec, folder)))


def _encode_in_worker(documents: list[Document], state: dict[str, Any]) -> Part:
    return _worker_encoder[0].encode(documents, state)


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
