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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.pins.pins import check_pins
from radlads.tasks.contracts.recipe.recipe import FilesSource, HubSource, SampleSource
from radlads.tasks.contracts.specs import TokenizeSpec
from radlads.tasks.jobs.common import Job, run_job
from radlads.tasks.jobs.data.encode import Encoder, Part
from radlads.tasks.jobs.data.encoded_documents import Spool
from radlads.tasks.jobs.data.reader import Reader
from radlads.tasks.jobs.data.sampling import sample_sources
from radlads.tasks.jobs.data.shards import Layout, write_dataset
from radlads.tasks.jobs.data.text.documents import Document
from radlads.tasks.jobs.sources import load_tokenizer, pinned_commit

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
    spool = Spool(job.scratch / "encoded" / job.spec.digest[:16])
    _encode(job, spec, reader, _make_encoder(spec, tokenizer), spool)
    check_pins(spec, job.hashes)  # reading took long: what was read must be what was pinned
    if not spool.tokens:
        raise UserError(f"dataset '{spec.name}' has no documents")
    _warn_of(spool.counts)
    shutil.rmtree(job.output)
    index = write_dataset(
        spool.read(),
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
            with_mask=_has_chats(spec),
        ),
    )
    for number, path in samples.items():
        shutil.copyfile(path, job.output / f"samples-{number}.jsonl")
    return _metrics(index, time.monotonic() - started) | dict(spool.counts)


def open_tokenizer(spec: TokenizeSpec) -> PreTrainedTokenizerBase:
    """The tokenizer that the plan pinned. Raises UserError."""
    revision = pinned_commit(spec.tokenizer_fingerprint)
    tokenizer = load_tokenizer(spec.tokenizer, revision=revision, trust_remote_code=spec.trust_remote_code)
    if spec.dataset.add_bos and tokenizer.bos_token_id is None:
        raise UserError(f"data.{spec.name}.add_bos is on, but the tokenizer has no BOS token")
    return tokenizer


def _has_chats(spec: TokenizeSpec) -> bool:
    return any(isinstance(s, HubSource | FilesSource) and s.messages_field for s in spec.dataset.sources)


def _make_encoder(spec: TokenizeSpec, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    dataset = spec.dataset
    return Encoder(tokenizer, dataset.add_bos, dataset.heldout_fraction, _has_chats(spec), dataset.sources)


def _encode(job: Job, spec: TokenizeSpec, reader: Reader, encoder: Encoder, spool: Spool) -> None:
    """Fill the spool in reading order, after what it holds, until there are enough tokens."""
    enough = spec.dataset.max_tokens or float("inf")
    total_bytes = max(1, sum(file.size for file in spec.files))
    if spool.parts:
        logger.info("reusing %d finished parts, %d tokens", spool.parts, spool.tokens)
    if spool.tokens >= enough:
        return
    batches = reader.batches(_PART_BYTES, spool.state)
    with _encoding(spec, encoder, job.spec.resources.threads, total_bytes) as encode:
        for part in _in_order(encode, batches):
            spool.append(part)
            _report(job, spool.tokens, enough, sum(part.state["bytes"]), total_bytes)
            if spool.tokens >= enough:
                break


def _warn_of(counts: Mapping[str, int]) -> None:
    if count := counts.get("special_tokens_as_text"):
        logger.warning(
            "the text of special tokens stands %d times in the documents, and is text; `special_tokens: parse` on the "
            "source takes it for the tokens, `separator` parts a text file's documents by it",
            count,
        )
    if count := counts.get("replaced_characters"):
        logger.warning("%d characters that are no text were replaced by U+FFFD", count)
    if count := counts.get("chats_without_assistant"):
        logger.warning("%d chats hold no word of an assistant", count)


def _report(job: Job, tokens: int, enough: float, read_bytes: int, total_bytes: int) -> None:
    if enough != float("inf"):
        job.progress(min(tokens, enough), enough, "tokens")
    else:  # compressed files hold more text than their size says
        job.progress(min(read_bytes, total_bytes), total_bytes, "bytes")
    logger.info("tokenized %d tokens of %.1f MB", tokens, read_bytes / 1e6)


Encode = Callable[[list[Document], dict[str, Any]], "Future[Part]"]


def _in_order(encode: Encode, batches: Iterator[tuple[list[Document], dict[str, Any]]]) -> Iterator[Part]:
    """Encoded parts in order, with a few batches under way ahead of the one that is waited for."""
    ahead: deque[Future[Part]] = deque()
    for documents, state in batches:
        ahead.append(encode(documents, state))
        if len(ahead) >= 2 * (multiprocessing.cpu_count() + 1) or ahead[0].done():
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


@contextmanager
def _encoding(spec: TokenizeSpec, encoder: Encoder, threads: int, total_bytes: int) -> Iterator[Encode]:
    """A function that encodes a batch: here, or in worker processes for a large corpus."""
    hub = any(isinstance(source, HubSource) for source in spec.dataset.sources)
    if threads == 1 or not (hub or total_bytes >= _POOL_FROM_BYTES):

        def encode_here(documents: list[Document], state: dict[str, Any]) -> Future[Part]:
            future: Future[Part] = Future()
            future.set_result(encoder.encode(documents, state))
            return future

        yield encode_here
        return
    # Spawned, not forked: the tokenizer's and torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(threads, context, _open_worker, (spec.model_dump_json(),))
    try:
        yield lambda documents, state: pool.submit(_encode_in_worker, documents, state)
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: list[Encoder] = []


def _open_worker(spec_json: str) -> None:
    spec = TokenizeSpec.model_validate_json(spec_json)
    _worker_encoder.append(_make_encoder(spec, open_tokenizer(spec)))


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
