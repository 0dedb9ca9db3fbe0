"""Mixtures by weight: exact in tokens after any number of documents, the same on every machine, repeats counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radlads.tasks.contracts.identity import identity
from radlads.tasks.contracts.recipe.sections import Dataset
from radlads.tasks.contracts.specs import TokenizeSpec
from radlads.tasks.jobs.common import Job, execute
from radlads.tasks.jobs.data import tokens
from radlads.tasks.jobs.data.encode import Encoder, Part
from radlads.tasks.jobs.data.loader import open_dataset
from radlads.tasks.jobs.data.mixture import Mixture, mix
from radlads.tasks.jobs.plan.checks import Findings, check_dataset
from radlads.tasks.jobs.sources import load_tokenizer, tokenizer_fingerprint

SHARES = (0.5, 0.3, 0.2)


def part(seed: int, documents: int, longest: int, *, heldout: float = 0.1) -> Part:
    """Documents of random lengths; every token says its source and its document."""
    random = np.random.Generator(np.random.PCG64(seed))
    lengths = random.integers(1, longest, documents)
    held = random.random(documents) < heldout
    ids = np.repeat(np.arange(documents) + 1000 * seed, lengths).astype(np.uint32)
    return Part(
        ids=ids, lengths=lengths, num_bytes=lengths * 2,
        hashes=random.integers(1, 1 << 62, documents).astype(np.uint64), heldout=held,
        mask=np.zeros(0, np.uint8), token_bytes=np.full(int(lengths[held].sum()), 2, np.uint32), state={},
    )  # fmt: skip


def cut(whole: Part, documents: int) -> Part:
    """The first documents alone, as after another number of encoded parts."""
    fields = {name: getattr(whole, name)[:documents] for name in ("lengths", "num_bytes", "hashes", "heldout")}
    total = int(fields["lengths"].sum())
    return Part(ids=whole.ids[:total], mask=whole.mask, token_bytes=whole.token_bytes, state={}, **fields)


def same(one: Mixture, other: Mixture) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("source", "document", "heldout"))


def test_every_prefix_follows_the_weights() -> None:
    parts = [part(1, 900, 40), part(2, 300, 90), part(3, 100, 20)]
    mixture = mix(parts, SHARES, (1, 3, 30), max_tokens=20_000, seed=7)
    assert mixture.ended is None
    lengths = np.array([len(mixture.ids(number)) for number in range(mixture.count)])
    train = lengths * ~mixture.heldout
    so_far = np.stack([np.cumsum(train * (mixture.source == index)) for index in range(3)])
    off = np.abs(so_far - np.array(SHARES)[:, None] * so_far.sum(0)).max()
    assert off <= 2 * 90, "two sources may be ahead, each by its longest document"
    assert 20_000 - 90 < lengths.sum() <= 20_000
    assert mixture.tokens == tuple(so_far[:, -1])
    assert mixture.total == lengths.sum()
    for index, (read, whole) in enumerate(zip(mixture.passes, parts, strict=True)):
        times = np.bincount(mixture.document[(mixture.source == index) & ~mixture.heldout])
        assert times.max() == np.ceil(read), index
        assert not np.asarray(whole.heldout)[mixture.document[(mixture.source == index) & ~mixture.heldout]].any()
    held = [(s, d) for s, d, h in zip(mixture.source, mixture.document, mixture.heldout, strict=True) if h]
    assert len(held) == len(set(held)) > 0
    assert mixture.passes[2] > 2
    assert set(mixture.ids(0)) == {1000 * (mixture.source[0] + 1) + mixture.document[0]}


def test_it_depends_on_the_seed_and_not_on_how_much_was_encoded() -> None:
    parts = [part(1, 900, 40), part(2, 300, 90), part(3, 400, 20)]
    one = mix(parts, SHARES, (1, 1, 1), max_tokens=9_000, seed=7)
    assert same(one, mix(parts, SHARES, (1, 1, 1), max_tokens=9_000, seed=7))
    assert not same(one, mix(parts, SHARES, (1, 1, 1), max_tokens=9_000, seed=8))
    assert same(one, mix([cut(p, n) for p, n in zip(parts, (400, 150, 350), strict=True)], SHARES, (1, 1, 1),
                         max_tokens=9_000, seed=7))  # fmt: skip


def test_without_a_limit_it_ends_with_the_first_source() -> None:
    parts = [part(1, 100, 40), part(2, 300, 90)]
    mixture = mix(parts, (0.5, 0.5), (1, 1), max_tokens=None, seed=0)
    assert mixture.ended == 0
    assert mixture.passes[0] == 1.0
    assert mix(parts, (0.5, 0.5), (2, 1), max_tokens=None, seed=0).tokens[0] == 2 * mixture.tokens[0]


def test_something_is_held_out_once_where_the_hash_selects_nothing() -> None:
    mixture = mix([part(1, 5, 9, heldout=0.0), part(2, 5, 9, heldout=0.0)], (0.5, 0.5), (9, 9), max_tokens=150, seed=0)
    assert mixture.heldout.sum() == 1
    (held,) = np.flatnonzero(mixture.heldout)
    pairs = list(zip(mixture.source, mixture.document, strict=True))
    assert pairs.count(pairs[held]) == 1
    assert mixture.token_bytes(held).sum() == mixture.num_bytes[held]
    empty = mix([part(1, 3, 9, heldout=1.0), part(2, 5, 9)], (0.5, 0.5), (9, 9), max_tokens=None, seed=0)
    assert empty.ended == 0, "a source of held-out documents alone is read once"


@pytest.fixture
def sources(tmp_path: Path, stories: list[str]) -> list[dict[str, Any]]:
    """Stories, three parts in four, and numbers, which are too few."""
    numbers = [f"The number {n} is followed by {n + 1}." for n in range(30)]
    for name, texts in (("stories", stories), ("numbers", numbers)):
        (tmp_path / f"{name}.txt").write_text("\n---\n".join(texts), encoding="utf-8")
    paths = [[str(tmp_path / f"{name}.txt")] for name in ("stories", "numbers")]
    files = [{"kind": "files", "paths": path, "separator": "\n---\n"} for path in paths]
    return [files[0] | {"weight": 3}, files[1] | {"weight": 1, "repeats": 20}]


@pytest.fixture
def spec(sources: list[dict[str, Any]], tokenizer_folder: Path) -> Callable[..., TokenizeSpec]:
    def make(**options: Any) -> TokenizeSpec:
        dataset = Dataset.model_validate({"sources": sources, "heldout_fraction": 0.1} | options)
        folder = str(tokenizer_folder)
        return TokenizeSpec(
            name="mix", dataset=dataset, tokenizer=folder, tokenizer_fingerprint=tokenizer_fingerprint(folder),
            teacher=None,
        )  # fmt: skip

    return make


def shards(job: Job) -> dict[str, bytes]:
    folder = Path(job.spec.output_uri)
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def test_a_dataset_of_two_files_and_a_restart(spec, make_job, run_main, monkeypatch) -> None:
    job = make_job("tokenize", spec(max_tokens=8000), scratch="whole")
    metrics = run_main(tokens.main, job).metrics
    read = metrics["source_tokens"]
    assert sum(read) == metrics["train_tokens"]
    assert abs(read[0] / sum(read) - 0.75) < 0.02
    assert metrics["source_passes"][0] < 1 < 2 < metrics["source_passes"][1]
    assert open_dataset(Path(job.spec.output_uri)).split("train").tokens == metrics["train_tokens"]
    expected = shards(job)
    (Path(job.spec.output_uri) / "manifest.json").unlink()
    monkeypatch.setattr(tokens, "_PART_BYTES", 2000)
    encode, calls = Encoder.encode, []

    def failing(self: Encoder, documents: Any, state: Any) -> Part:
        calls.append(len(documents))
        if len(calls) == 4:
            raise RuntimeError("power cut")
        return encode(self, documents, state)

    monkeypatch.setattr(Encoder, "encode", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        tokens.main(make_job("tokenize", spec(max_tokens=8000), scratch="again"))
    again = make_job("tokenize", spec(max_tokens=8000), scratch="again")
    run_main(tokens.main, again)
    assert shards(again) == expected, "neither the size of parts nor a restart changes a byte"


def test_a_source_that_is_too_small_is_said_in_one_line(spec, sources, make_job, tokenizer_folder) -> None:
    sources[1]["repeats"] = 2
    job = make_job("tokenize", spec(max_tokens=8000))
    assert execute(tokens.main, job) == "config"
    said = json.loads((job.scratch / "exit.json").read_text(encoding="utf-8"))["message"]
    assert "source 1 of data.mix ends after" in said
    assert "(repeats: 2), but its weight asks for about 2000 of max_tokens; raise its repeats" in said
    assert "\n" not in said
    tokenizer, findings = load_tokenizer(str(tokenizer_folder)), Findings()
    found = check_dataset("mix", spec(max_tokens=8000).dataset, tokenizer, findings)
    assert found["tokens"] < 8000
    assert any("sources.1 would be read about" in line and "repeats allows 2" in line for line in findings.warnings)
    sources[1]["repeats"] = 20
    found = check_dataset("mix", spec(max_tokens=8000).dataset, tokenizer, findings := Findings())
    assert (found["tokens"], len(found["passes"])) == (8000, 2)
    assert found["passes"][1] > 2
    assert [line for line in findings.warnings if "sources.1 is read about" in line]


def test_a_document_longer_than_the_limit_is_said_in_one_line(spec, sources, make_job, stories, tmp_path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(stories), encoding="utf-8")
    sources[1] = {"kind": "files", "paths": [str(book)], "weight": 1}
    job = make_job("tokenize", spec(max_tokens=3000))
    assert execute(tokens.main, job) == "config"
    said = json.loads((job.scratch / "exit.json").read_text(encoding="utf-8"))["message"]
    assert "the next document, of source 1, is too long for what remains of max_tokens (3000)" in said
    assert "\n" not in said


def test_weights_are_of_all_sources_and_younger_than_datasets_without_them(spec, sources) -> None:
    plain = [{key: value for key, value in source.items() if key not in ("weight", "repeats")} for source in sources]
    with pytest.raises(ValueError, match="give all sources a weight, or none; without one: 1"):
        spec(sources=[sources[0], plain[1]])
    with pytest.raises(ValueError, match="repeats is for mixtures; give every source a weight"):
        spec(sources=[plain[0], plain[1] | {"repeats": 2}])
    assert spec().dataset.shares == (0.75, 0.25)
    assert spec(sources=plain).dataset.shares is None
    assert not {"weight", "repeats"} & set(identity(spec(sources=plain).dataset, None)["sources"][0])
    assert {"weight", "repeats"} <= set(identity(spec().dataset, None)["sources"][1])
