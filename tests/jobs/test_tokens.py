"""tokenize: same spec, same bytes; what the index says is what the shards hold; a crash costs only unfinished parts."""

from __future__ import annotations

import gzip
import hashlib
import json
import resource
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.recipe.sections import Dataset, FilesSource, RecallSource
from radlads.tasks.contracts.specs import FileRef, TokenizeSpec
from radlads.tasks.jobs.common import Job, execute
from radlads.tasks.jobs.data import encoded_documents, tokens
from radlads.tasks.jobs.data.encode import Encoder
from radlads.tasks.jobs.data.loader import open_dataset
from radlads.tasks.jobs.data.prompts import read_prompts
from radlads.tasks.jobs.data.text.chat import Rendered, open_chat_template
from radlads.tasks.jobs.data.text.documents import Document, iterate_documents
from radlads.tasks.jobs.data.text.token_encoder import TokenEncoder
from radlads.tasks.jobs.sources import (
    load_tokenizer,
    pin_teacher,
    resolve_file,
    resolve_teacher_path,
    tokenizer_fingerprint,
)

MakeJob = Callable[..., Job]


@pytest.fixture
def corpus(tmp_path: Path, stories: list[str]) -> Path:
    path = tmp_path / "stories.txt.gz"
    path.write_bytes(gzip.compress("\n<|endoftext|>\n".join(stories).encode()))
    return path


@pytest.fixture
def tokenize(make_job: MakeJob, run_main: Any, tokenizer_folder: Path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """tokenize(sources, **dataset options) → (committed folder, index)."""

    def run(sources: list[dict[str, Any]], *, job: dict[str, Any] | None = None, **options: Any) -> Any:
        spec = spec_of(sources, tokenizer_folder, **options)
        made = make_job("tokenize", spec, **(job or {}))
        run_main(tokens.main, made)
        folder = Path(made.spec.output_uri)
        return folder, json.loads((folder / "index.json").read_text())

    return run


def spec_of(sources: list[dict[str, Any]], tokenizer: Path, teacher: Any = None, **options: Any) -> TokenizeSpec:
    dataset = Dataset.model_validate({"sources": sources, **options})
    return TokenizeSpec(
        name="train",
        dataset=dataset,
        tokenizer=str(tokenizer),
        tokenizer_fingerprint=tokenizer_fingerprint(str(tokenizer)),
        teacher=teacher,
    )


def text_source(path: Path) -> dict[str, Any]:
    return {"kind": "files", "paths": [str(path)], "separator": "<|endoftext|>"}


def render_chat(tokenizer: Any, messages: list[dict[str, Any]]) -> Rendered:
    return open_chat_template(TokenEncoder(tokenizer), None).render(messages)


def stream(folder: Path, index: dict[str, Any], split: str) -> np.ndarray:
    shards = index["splits"][split]["shards"]
    arrays = [np.fromfile(folder / s["file"], index["dtype"]) for s in shards]
    assert [len(a) for a in arrays] == [s["tokens"] for s in shards]
    return np.concatenate(arrays)


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != "manifest.json"}


def test_the_stream_holds_every_document_once(tokenize: Any, corpus: Path, stories: list[str], tokenizer_folder: Path):
    folder, index = tokenize([text_source(corpus)], shard_tokens=1000, heldout_fraction=0.1)
    tokenizer = load_tokenizer(str(tokenizer_folder))
    found = []
    for split in ("train", "heldout"):
        sheet = index["splits"][split]
        flat = stream(folder, index, split)
        starts = np.fromfile(folder / sheet["boundaries_file"], "<u8")
        assert len(starts) == sheet["documents"]
        assert len(flat) == sheet["tokens"]
        texts = [tokenizer.decode(piece[:-1]) for piece in np.split(flat, starts[1:])]
        assert all(piece[-1] == index["eos_id"] for piece in np.split(flat, starts[1:]))
        assert sheet["bytes"] == sum(len(t.encode()) for t in texts)
        assert all(s["tokens"] == 1000 for s in sheet["shards"][:-1])
        found += texts
    assert sorted(found) == sorted(stories)
    assert found[: len(stories) // 2] != stories[: len(stories) // 2]
    assert 5 <= index["splits"]["heldout"]["documents"] <= 40


def test_bytes_of_heldout_tokens_add_up(tokenize: Any, corpus: Path, tokenizer_folder: Path):
    folder, index = tokenize([text_source(corpus)], heldout_fraction=0.1, add_bos=True)
    sheet = index["splits"]["heldout"]
    sizes = np.concatenate([np.fromfile(folder / f, "<u4") for f in sheet["token_bytes_files"]])
    flat = stream(folder, index, "heldout")
    assert len(sizes) == len(flat)
    assert sizes.sum() == sheet["bytes"]
    assert set(sizes[(flat == index["eos_id"]) | (flat == index["bos_id"])]) == {0}
    # Away from characters of several tokens, a token's bytes are the bytes of its text.
    tokenizer = load_tokenizer(str(tokenizer_folder))
    plain = [(len(tokenizer.decode([t]).encode()), s) for t, s in zip(flat, sizes, strict=True) if s]
    assert np.mean([a == b for a, b in plain]) > 0.95


@pytest.mark.slow
def test_same_bytes_with_more_processes(tokenize: Any, corpus: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokens, "_PART_BYTES", 4000)
    one, _ = tokenize([text_source(corpus)], job={"scratch": "one"})
    before = hashes(one)
    (one / "manifest.json").unlink()
    monkeypatch.setattr(tokens, "_POOL_FROM_BYTES", 0)
    two, _ = tokenize([text_source(corpus)], job={"scratch": "two", "threads": 2})
    assert hashes(two) == before


@pytest.mark.parametrize(("max_tokens", "pool"), [(None, True), (200, False)])
def test_what_text_is_read_decides_on_worker_processes(
    make_job: MakeJob,
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    max_tokens: int | None,
    pool: bool,
):
    """Not how small a compressed file is, nor how much more there is than max_tokens."""
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress("\n".join(f"{i * 7919 % 9973} cats" for i in range(900)).encode()))
    monkeypatch.setattr(tokens, "_POOL_FROM_BYTES", 2 * path.stat().st_size)
    opened: list[int] = []

    def executor(count: int, *_: Any) -> Any:
        opened.append(count)
        raise RuntimeError("enough seen")

    monkeypatch.setattr(tokens, "ProcessPoolExecutor", executor)
    lines = [{"kind": "files", "paths": [str(path)], "separator": "\n"}]
    spec = spec_of(lines, tokenizer_folder, max_tokens=max_tokens)
    file = FileRef(path=str(path), size=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    job = make_job("tokenize", spec.model_copy(update={"files": (file,)}), threads=2)
    with pytest.raises(RuntimeError, match="enough seen") if pool else nullcontext():
        tokens.main(job)
    assert opened == [2] * pool


def test_a_restart_reuses_finished_parts(
    make_job: MakeJob, run_main: Any, corpus: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tokens, "_PART_BYTES", 4000)
    spec = spec_of([text_source(corpus)], tokenizer_folder)
    encode = Encoder.encode
    encoded: list[int] = []

    def failing(self: Encoder, documents: list[Document], state: dict[str, Any]) -> Any:
        if len(encoded) == 3:
            raise RuntimeError("power cut")
        encoded.append(len(documents))
        return encode(self, documents, state)

    monkeypatch.setattr(Encoder, "encode", failing)
    broken = make_job("tokenize", spec, scratch="same")
    with pytest.raises(RuntimeError, match="power cut"):
        tokens.main(broken)
    calls: list[int] = []
    monkeypatch.setattr(Encoder, "encode", lambda self, d, s: calls.append(len(d)) or encode(self, d, s))
    run_main(tokens.main, make_job("tokenize", spec, scratch="same"))
    assert sum(calls) + sum(encoded) == 200

    resumed = hashes(Path(broken.spec.output_uri))
    (Path(broken.spec.output_uri) / "manifest.json").unlink()
    fresh = make_job("tokenize", spec, scratch="fresh")
    run_main(tokens.main, fresh)
    assert hashes(Path(fresh.spec.output_uri)) == resumed


def test_a_part_that_was_not_finished_is_forgotten(
    make_job: MakeJob, run_main: Any, corpus: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tokens, "_PART_BYTES", 4000)
    spec = spec_of([text_source(corpus)], tokenizer_folder)
    whole = make_job("tokenize", spec, scratch="whole")
    run_main(tokens.main, whole)
    expected = hashes(Path(whole.spec.output_uri))
    (Path(whole.spec.output_uri) / "manifest.json").unlink()
    torn = make_job("tokenize", spec, scratch="torn")
    write_sheet, written = encoded_documents.write_json, []

    def failing(path: Path, value: Any) -> None:
        if len(written) == 2:
            raise OSError("no space left on device")
        written.append(value["parts"])
        write_sheet(path, value)

    monkeypatch.setattr(encoded_documents, "write_json", failing)
    with pytest.raises(OSError, match="no space"):
        tokens.main(torn)
    monkeypatch.setattr(encoded_documents, "write_json", write_sheet)
    (folder,) = (torn.scratch / "encoded").iterdir()
    assert (folder / "ids.bin").stat().st_size > 4 * json.loads((folder / "spool.json").read_text())["sizes"]["ids"]
    run_main(tokens.main, make_job("tokenize", spec, scratch="torn"))
    assert hashes(Path(torn.spec.output_uri)) == expected


def test_any_number_of_parts_takes_a_few_maps_and_handles(
    make_job: MakeJob, run_main: Any, corpus: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tokens, "_PART_BYTES", 1)
    monkeypatch.setattr(encoded_documents.os, "fsync", lambda _: None)
    write = tokens.write_dataset
    maps: list[int] = []

    def counting(*arguments: Any) -> Any:
        index = write(*arguments)
        maps.append(Path("/proc/self/maps").read_text().count(str(job.scratch)))
        return index

    monkeypatch.setattr(tokens, "write_dataset", counting)
    spec = spec_of([text_source(corpus)], tokenizer_folder, shard_tokens=100)
    job = make_job("tokenize", spec)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 24, hard))
    try:
        run_main(tokens.main, job)
        split = open_dataset(Path(job.spec.output_uri)).split("train")
        assert len(split.shard_files) > 100
        assert len(split.read(0, split.tokens)) == split.tokens  # reading them takes no handle a shard either
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert json.loads(next(job.scratch.glob("encoded/*/spool.json")).read_text())["parts"] == 200
    assert 0 < maps[0] <= 7


SPECIAL = ["One <eos> two.", "<bos>Three.", "Four <|user|> and <pad>."]


@pytest.fixture
def special_corpus(tmp_path: Path) -> Path:
    path = tmp_path / "special.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*SPECIAL, *map(str, range(40))]))
    return path


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("special_tokens", ["text", "parse"])
def test_the_text_of_a_special_token_is_text_unless_asked(
    tokenizer_folder: Path, special_corpus: Path, special_tokens: str, add_bos: bool
):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    source = FilesSource(kind="files", paths=(str(special_corpus),), special_tokens=special_tokens)
    part = Encoder(tokenizer, add_bos, 1.0, with_mask=True, sources=(source,)).encode(
        list(iterate_documents(source, tokenizer=tokenizer)), {}
    )
    documents = np.split(part.ids, np.cumsum(part.lengths)[:-1])
    for text, ids, kept in zip(SPECIAL, documents, np.split(part.mask, np.cumsum(part.lengths)[:-1]), strict=False):
        inner = tokenizer(text, add_special_tokens=False, split_special_tokens=special_tokens == "text")["input_ids"]
        begins = add_bos and inner[0] != tokenizer.bos_token_id
        assert ids.tolist() == [*[tokenizer.bos_token_id] * begins, *inner, tokenizer.eos_token_id]
        assert kept.tolist() == [*[0] * begins, *[1] * (len(inner) + 1)]
    special = [int(np.isin(ids, [*tokenizer.all_special_ids, 3, 4]).sum()) - 1 - add_bos for ids in documents[:3]]
    assert special == ([0, 0, 0] if special_tokens == "text" else [1, 1 - add_bos, 2])
    assert part.counts == {"special_tokens_as_text" if special_tokens == "text" else "special_tokens_parsed": 4}
    assert part.token_bytes.sum() == part.num_bytes.sum() == sum(len(t) for t in [*SPECIAL, *map(str, range(40))])


def test_special_tokens_in_text_are_counted_and_told(tokenize: Any, special_corpus: Path, caplog: Any, make_job: Any):
    source = {"kind": "files", "paths": [str(special_corpus)]}
    folder, _ = tokenize([source], heldout_fraction=0.2)
    metrics = json.loads((folder / "manifest.json").read_text())["metrics"]
    assert metrics["special_tokens_as_text"] == 4
    assert "the text of special tokens 4 times" in caplog.text


def test_a_separator_is_no_part_of_a_document_whatever_it_is(tokenize: Any, corpus: Path, tokenizer_folder: Path):
    folder, index = tokenize([text_source(corpus)])
    tokenizer = load_tokenizer(str(tokenizer_folder))
    assert "endoftext" not in tokenizer.decode(stream(folder, index, "train"))
    metrics = json.loads((folder / "manifest.json").read_text())["metrics"]
    assert "special_tokens_as_text" not in metrics


def test_a_tokenizer_that_makes_control_tokens_out_of_text_is_told():
    words = models.WordLevel({"<unk>": 0, "<eos>": 1, "one": 2}, unk_token="<unk>")
    backend = Tokenizer(words)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    encoder = TokenEncoder(tokenizer)
    assert encoder.encode_texts(["one two"])[0][0] == [2, 0]
    with pytest.raises(UserError, match="encodes the plain text of the control token '<eos>' as that token"):
        encoder.encode_texts(["one <eos>"])
    assert encoder.encode_texts(["one <eos>"], parse=True)[0][0] == [2, 1]


def test_a_chat_template_is_pinned_by_its_content(tmp_path: Path, make_job: MakeJob, tokenizer_folder: Path):
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"m": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}\n')

    def digest(template: str | None) -> str:
        source = {"kind": "files", "paths": [str(chats)], "messages_field": "m", "chat_template": template}
        return make_job("tokenize", spec_of([source], tokenizer_folder)).spec.digest

    own = []
    for place, text in (("a", "{{ messages }}"), ("b", "{{ messages }}"), ("c", "{{ messages }}!")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "mine.jinja").write_text(text)
        own.append(digest(str(tmp_path / place / "mine.jinja")))
    assert own[0] == own[1] != own[2]
    assert len({*own, digest(None), digest("chatml"), digest("qwen3")}) == 5
    spec = spec_of(
        [{"kind": "files", "paths": [str(chats)], "messages_field": "m", "chat_template": "qwen3"}], tokenizer_folder
    )
    assert {file.path for file in make_job("tokenize", spec).typed.files} == {"template:qwen3", str(chats)}


def test_max_tokens_takes_from_every_source(tokenize: Any, corpus: Path, tmp_path: Path, tokenizer_folder: Path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"Zebra number {i} runs."}) + "\n" for i in range(500)))
    folder, index = tokenize(
        [text_source(corpus), {"kind": "files", "paths": [str(other)]}], max_tokens=6000, heldout_fraction=0.1
    )
    total = sum(s["tokens"] for s in index["splits"].values())
    assert 5500 < total <= 6000
    tokenizer = load_tokenizer(str(tokenizer_folder))
    text = tokenizer.decode(stream(folder, index, "train")) + tokenizer.decode(stream(folder, index, "heldout"))
    zebras = sum(len(d.encode()) for d in text.split("<eos>") if d.startswith("Zebra"))
    assert 0.4 < zebras / len(text.encode()) < 0.6


def test_every_kind_of_file_gives_the_same_documents(tokenize: Any, tmp_path: Path, stories: list[str]):
    rows = [{"body": s} for s in stories]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("\n---\n".join(stories), encoding="utf-8")
    seen = set()
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.txt"):
        source = {"kind": "files", "paths": [str(tmp_path / name)], "text_field": "body", "separator": "\n---\n"}
        folder, index = tokenize([source])
        seen.add(hashlib.sha256(stream(folder, index, "train").tobytes()).hexdigest())
    assert len(seen) == 1


def test_chats_are_masked_to_the_assistant(tokenize: Any, tmp_path: Path, tokenizer_folder: Path):
    chats = [
        {
            "m": [
                {"role": "user", "content": f"Where is ball {i}?"},
                {"role": "assistant", "content": f"In park {i}."},
                {"role": "user", "content": "Thanks"},
                {"role": "assistant", "content": "Bye!"},
            ]
        }
        for i in range(60)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(c) + "\n" for c in chats))
    folder, index = tokenize([{"kind": "files", "paths": [str(path)], "messages_field": "m"}], heldout_fraction=0.2)
    assert index["has_mask"]
    for split in ("train", "heldout"):
        sheet = index["splits"][split]
        mask = np.concatenate([np.fromfile(folder / f, "u1") for f in sheet["mask_files"]])
        flat = stream(folder, index, split)
        starts = np.fromfile(folder / sheet["boundaries_file"], "<u8")
        tokenizer = load_tokenizer(str(tokenizer_folder))
        for ids, kept in zip(np.split(flat, starts[1:]), np.split(mask, starts[1:]), strict=True):
            number = tokenizer.decode(ids).split("ball ")[1].split("?")[0]
            assert tokenizer.decode(ids[kept == 1]) == f"In park {number}.<eos>Bye!<eos>"


def test_template_with_markers_agrees_with_prefixes(tokenizer_folder: Path):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    plain = render_chat(tokenizer, messages)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }}<eos>{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    assert render_chat(tokenizer, messages) == plain
    assert [plain.text[a:b] for a, b in plain.assistant_spans] == ["Yo<eos>"]


def test_a_template_that_rewrites_history_is_refused(tokenizer_folder: Path):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    with pytest.raises(UserError, match="generation"):
        render_chat(tokenizer, turns)


def test_recall_documents_are_made_one_by_one(tokenize: Any, tokenizer_folder: Path):
    raw = {"kind": "recall", "documents": 30, "lengths": [200, 300]}
    folder, index = tokenize([raw], heldout_fraction=0.2)
    tokenizer = load_tokenizer(str(tokenizer_folder))
    found = []
    for split in ("train", "heldout"):
        starts = np.fromfile(folder / index["splits"][split]["boundaries_file"], "<u8")
        found += [tokenizer.decode(ids[:-1]) for ids in np.split(stream(folder, index, split), starts[1:])]
    source = RecallSource.model_validate(raw)
    texts = [document.text for document in iterate_documents(source, tokenizer=tokenizer)]
    assert sorted(found) == sorted(texts)
    skipped = [document.text for document in iterate_documents(source, tokenizer=tokenizer, skip=20)]
    assert skipped == texts[20:]


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ([{"kind": "files", "paths": ["nowhere/*.txt"]}], {}, "no file matches"),
        ([{"kind": "files", "paths": ["{corpus}"], "max_documents": 1}], {}, "split would be empty"),
        ([{"kind": "files", "paths": ["{corpus}"], "messages_field": "m"}], {}, "no field 'm'"),
        ([{"kind": "files", "paths": ["{corpus}"], "separator": "<|endoftext|>"}], {"max_tokens": 3}, "first document"),
        ([{"kind": "sample", "tokens": 100}], {}, "needs a teacher"),
    ],
)
def test_bad_input_is_one_clear_line(
    make_job: MakeJob, corpus: Path, tokenizer_folder: Path, sources: Any, options: Any, message: str
):
    sources = json.loads(json.dumps(sources).replace("{corpus}", str(corpus)))
    with pytest.raises(UserError, match=message):
        tokens.main(make_job("tokenize", spec_of(sources, tokenizer_folder, **options)))


def test_a_changed_corpus_is_noticed(make_job: MakeJob, corpus: Path, tokenizer_folder: Path):
    job = make_job("tokenize", spec_of([text_source(corpus)], tokenizer_folder))
    corpus.write_bytes(gzip.compress(b"another text"))
    assert execute(tokens.main, job) == "config"
    said = json.loads((job.scratch / "exit.json").read_text())["message"]
    assert said.startswith(f"{corpus} changed since the run was planned")
    assert len(said.splitlines()) == 1


def test_a_corpus_that_changes_while_it_is_read_is_noticed(
    make_job: MakeJob, corpus: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    job = make_job("tokenize", spec_of([text_source(corpus)], tokenizer_folder))
    encode = tokens._encode_all

    def encode_and_change(*arguments: Any) -> Any:
        spools = encode(*arguments)
        corpus.write_bytes(gzip.compress(b"another text"))
        return spools

    monkeypatch.setattr(tokens, "_encode_all", encode_and_change)
    assert execute(tokens.main, job) == "config"
    assert "changed since the run was planned" in json.loads((job.scratch / "exit.json").read_text())["message"]
    assert job.store.read_manifest(job.output_prefix) is None


def test_sampling_does_not_depend_on_restarts(make_job: MakeJob, run_main: Any, teacher_folder: Path):
    sources = [{"kind": "sample", "tokens": 900, "context": 24, "seed": 5}]
    spec = spec_of(sources, teacher_folder, teacher=pin_teacher(str(teacher_folder)), heldout_fraction=0.3)
    job = make_job("tokenize", spec, scratch="a")
    run_main(tokens.main, job)
    folder = Path(job.spec.output_uri)
    first = hashes(folder)
    rows = [json.loads(line) for line in (folder / "samples-0.jsonl").read_text().splitlines()]
    assert len(rows) > 16
    assert len({row["text"] for row in rows}) > 16
    (folder / "manifest.json").unlink()
    again = make_job("tokenize", spec, scratch="b")
    run_main(tokens.main, again)
    assert hashes(folder) == first


def test_prompts_are_continued_and_a_cache_of_fixed_length_says_the_same(
    make_job: MakeJob, run_main: Any, teacher_folder: Path, tmp_path: Path, stories: list[str]
):
    (tmp_path / "prompts.txt").write_text("\n---\n".join([*stories[:5], "No."]), encoding="utf-8")
    prompts = {"prompts": [str(tmp_path / "prompts.txt")], "prompts_separator": "\n---\n", "prompt_tokens": 6}
    source = {"kind": "sample", "tokens": 300, "context": 16, "batch": 4, "seed": 5} | prompts
    tokenizer, texts, folders = load_tokenizer(str(teacher_folder)), [], []
    for static in (False, True):
        sources = [source | {"static_cache": static}]
        spec = spec_of(sources, teacher_folder, teacher=pin_teacher(str(teacher_folder)), heldout_fraction=0.3)
        job = make_job("tokenize", spec, scratch=f"static-{static}")
        run_main(tokens.main, job)
        folders.append(Path(job.spec.output_uri))
        rows = (folders[-1] / "samples-0.jsonl").read_text(encoding="utf-8").splitlines()
        texts.append([json.loads(row)["text"] for row in rows])
    assert folders[0] != folders[1]
    assert texts[0] == texts[1]
    begun = [tokenizer.decode(tokenizer(text)["input_ids"][:6]).strip() for text in [*stories[:5], "No."]]
    assert all(text.startswith(begun[number % 6]) for number, text in enumerate(texts[0]))
    assert len({*texts[0]}) == len(texts[0]) > 12, "the same prompt goes on differently"
    gone = Dataset.model_validate({"sources": [source | {"prompts": [str(tmp_path / "gone.txt")]}]}).sources[0]
    with pytest.raises(UserError, match="no file matches"):
        read_prompts(gone, tokenizer)
    with pytest.raises(ValueError, match="context must exceed prompt_tokens by 2"):
        spec_of([source | {"prompt_tokens": 15}], teacher_folder)


@pytest.mark.slow
def test_sampling_does_not_depend_on_the_number_of_ranks(
    make_job: MakeJob, run_main: Any, run_ranks: Any, teacher_folder: Path
):
    sources = [{"kind": "sample", "tokens": 600, "context": 24, "seed": 5}]
    spec = spec_of(sources, teacher_folder, teacher=pin_teacher(str(teacher_folder)), heldout_fraction=0.3)
    one = make_job("tokenize", spec, scratch="one")
    run_main(tokens.main, one)
    folder = Path(one.spec.output_uri)
    alone = hashes(folder)
    (folder / "manifest.json").unlink()
    run_ranks("radlads.tasks.jobs.data.tokens", make_job("tokenize", spec, scratch="two"), 2)
    assert hashes(folder) == alone


def test_hub_datasets_are_streamed(tokenize: Any, stories: list[str], monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []

    def load_dataset(path: str, subset: str | None, **options: Any) -> list[dict[str, str]]:
        asked.append((path, subset, options))
        return [{"content": story} for story in stories]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = {"kind": "hub", "path": "org/stories", "revision": "a" * 40, "text_field": "content", "max_documents": 50}
    _, index = tokenize([source], heldout_fraction=0.2)
    assert asked == [("org/stories", None, {"split": "train", "revision": "a" * 40, "streaming": True})]
    assert sum(split["documents"] for split in index["splits"].values()) == 50


def test_a_real_chat_template_is_masked(shared_data: Path):
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "qwen2"))
    turns = [
        {"role": "user", "content": "Où est Léo ?"},
        {"role": "assistant", "content": "Au parc 🙂."},
        {"role": "user", "content": "Merci"},
        {"role": "assistant", "content": "De rien."},
    ]
    chat = Document(messages=tuple(turns))
    part = Encoder(tokenizer, add_bos=False, heldout_fraction=1.0, with_mask=True).encode([chat], {})
    assert "system" in tokenizer.decode(part.ids)
    kept = tokenizer.decode(part.ids[part.mask == 1])
    assert kept.replace("\n", "") == "Au parc 🙂.<|im_end|>De rien.<|im_end|>"
    assert part.token_bytes.sum() == part.num_bytes[0]


def test_fingerprints_follow_content_not_place(teacher_folder: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in teacher_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert pin_teacher(str(copy)).fingerprint == pin_teacher(str(teacher_folder)).fingerprint
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert pin_teacher(str(copy)).fingerprint != pin_teacher(str(teacher_folder)).fingerprint


def test_places_are_told_apart(tmp_path: Path):
    assert resolve_teacher_path(str(tmp_path)) == str(tmp_path.resolve())
    assert resolve_teacher_path("org/model") == "org/model"
    with pytest.raises(UserError, match="no teacher folder"):
        resolve_teacher_path(str(tmp_path / "gone"))
    assert resolve_file("demo:corpus.txt.gz").name == "corpus.txt.gz"


def test_real_stories_are_fast_enough(tokenize: Any, shared_data: Path, make_job: MakeJob, run_main: Any):
    folder = shared_data / "teachers" / "stories260K"
    spec = spec_of([text_source(shared_data / "text" / "tinystories_valid.txt.gz")], folder, add_bos=True)
    job = make_job("tokenize", spec)
    manifest = run_main(tokens.main, job)
    assert manifest.metrics["documents"] == 3117
    assert manifest.metrics["seconds"] < 60
