"""`radlads export`: a folder, an S3 prefix, a repository of the hub."""

from __future__ import annotations

import json
import string
from pathlib import Path

import boto3
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalTokenNotFoundError
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from radlads.flows.cli import app
from radlads.model.student.export import export_student
from radlads.model.student.load import load_student
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.launchers.launcher import JobFailed

CARD = "---\nlicense: apache-2.0\nbase_model: some/teacher\n---\n\n# A student\n"


def typed(*words: str | Path) -> str:
    """What the command says; raises what it raises."""
    done = CliRunner().invoke(app, ["export", *map(str, words)])
    if done.exception is not None:
        raise done.exception
    return done.output


@pytest.fixture
def carded(exported, tmp_path: Path) -> Path:
    folder = tmp_path / "carded"
    folder.mkdir()
    for path in exported["hybrid"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "README.md").write_text(CARD)
    return folder


@torch.no_grad()
def test_a_folder_is_copied_or_written_anew(carded: Path, tokens, tmp_path: Path) -> None:
    assert str(tmp_path / "same") in typed(carded, "--to", tmp_path / "same")
    assert {p.name: p.read_bytes() for p in carded.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "same").iterdir()
    }
    typed(carded, "--to", tmp_path / "small", "--dtype", "bfloat16", "--max-shard", "20KB")
    parts = sorted((tmp_path / "small").glob("*.safetensors"))
    assert len(parts) > 1
    assert not (tmp_path / "small/model.safetensors").exists()
    with safe_open(parts[0], framework="pt") as file:
        assert file.get_tensor(next(iter(file.keys()))).dtype == torch.bfloat16
    assert json.loads((tmp_path / "small/config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "small/README.md").read_text() == CARD
    whole = load_student(carded)(tokens).logits
    rounded = load_student(tmp_path / "small")(tokens).logits.float()
    assert ((rounded - whole).norm() / whole.norm()).item() < 0.05


def test_a_gguf_file(make_teacher, make_student, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(["<s>", "</s>", *string.ascii_letters])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    teacher = make_teacher("llama", hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    folder = export_student(make_student(teacher, variant="rwkv7"), tokenizer, tmp_path / "student")
    (folder / "README.md").write_text(CARD)
    target = tmp_path / "new" / "model.gguf"
    assert str(target) in typed(folder, "--to", target, "--dtype", "f16")
    said = {name: field.contents() for name, field in gguf.GGUFReader(target).fields.items()}
    assert (said["general.architecture"], said["general.name"]) == ("arwkv7", "A student")
    assert (said["general.license"], said["general.base_model.0.name"]) == ("apache-2.0", "teacher")
    assert said["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    (folder / "README.md").unlink()
    typed(folder, "--to", tmp_path / "other.gguf")
    assert gguf.GGUFReader(tmp_path / "other.gguf").fields["general.name"].contents() == "student"
    for words, said in (
        ((folder, "--to", target), "exists already; name a new file"),
        ((folder, "--to", "s3://bucket/model.gguf"), "is written on this machine"),
        ((folder, "--to", tmp_path / "a.gguf", "--max-shard", "1GB"), "not for a GGUF file"),
        ((folder, "--to", tmp_path / "a.gguf", "--dtype", "q8_0"), "choose bfloat16"),
    ):
        with pytest.raises(UserError, match=said):
            typed(*words)


def test_what_llama_cpp_lacks_is_one_line(carded: Path, tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match=r"llama.cpp's graph arwkv7 lacks softmax attention, .* keeps in layers 1$"):
        typed(carded, "--to", tmp_path / "a.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_an_s3_prefix(carded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        for name, value in (("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test")):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("RADLADS_S3_ENDPOINT", endpoint)
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        client.create_bucket(Bucket="exports")  # moto keeps one set of buckets a process: a name of its own
        assert "s3://exports/mine" in typed(carded, "--to", "s3://exports/mine")
        keys = {one["Key"] for one in client.list_objects_v2(Bucket="exports")["Contents"]}
        assert keys == {f"mine/{path.name}" for path in carded.iterdir()}
        with pytest.raises(UserError, match="there are files under s3://exports/mine already"):
            typed(carded, "--to", "s3://exports/mine")
    finally:
        server.stop()


def test_a_repository_of_the_hub(carded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, bool]] = []

    class Api:
        def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
            calls.append((name, private))

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str):
            assert (folder_path / "config.json").is_file()
            return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert "https://hub/me/mine/commit/1" in typed(carded, "--to", "hub:me/mine")
    typed(carded, "--to", "hub:me/mine", "--public")
    assert calls == [("me/mine", True), ("me/mine", False)]

    def unknown(self: Api, name: str, *, private: bool, exist_ok: bool) -> None:
        raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr(Api, "create_repo", unknown)
    with pytest.raises(UserError, match="set HF_TOKEN"):
        typed(carded, "--to", "hub:me/mine")
    (carded / "README.md").write_text("# No license\n")
    with pytest.raises(UserError, match="names no license"):
        typed(carded, "--to", "hub:me/mine")
    (carded / "README.md").unlink()
    with pytest.raises(UserError, match="has no card"):
        typed(carded, "--to", "hub:me/mine")


def test_mistakes_are_one_line(carded: Path, exported, tmp_path: Path) -> None:
    for words, said in (
        ((carded, "--to", tmp_path), "exists already"),
        ((carded, "--to", tmp_path / "a", "--dtype", "int8"), "choose bfloat16"),
        ((carded, "--to", tmp_path / "a", "--max-shard", "big"), "write it as 2GB"),
        ((carded, "--to", "hub:mine"), "hub:OWNER/NAME"),
        ((carded, "--to", "s3://bucket"), "name a prefix"),
        ((carded, "--to", tmp_path / "a", "--public"), "--public is for hub"),
        ((exported["teacher"], "--to", tmp_path / "a"), "is no converted model"),
        ((tmp_path / "nowhere", "--to", tmp_path / "a"), "there is no folder"),
    ):
        with pytest.raises(UserError, match=said):
            typed(*words)
    assert not (tmp_path / "a").exists()
