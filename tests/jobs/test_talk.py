"""Talking with models: turns continue from what was read, commands, interruption, and the program at a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from radlads.flows.cli import app
from radlads.model.convert.transplant import transplant
from radlads.model.student.export import export_student
from radlads.model.student.load import build_student
from radlads.model.teacher.load import load_teacher
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.requests.talk import Drawing, Talker, TalkRequest
from radlads.tasks.jobs.sources import load_tokenizer
from radlads.tasks.jobs.talk import chat
from radlads.tasks.jobs.talk.chat import Conversation, describe, open_conversation, run

LIKELIEST = Drawing(temperature=0, max_new_tokens=6)
TALKER = Talker(name="student", path="x", is_student=True)


@pytest.fixture
def request_of_both(teacher_folder: Path, student_folder: Path) -> TalkRequest:
    talkers = (
        Talker(name="teacher", path=str(teacher_folder), is_student=False),
        Talker(name="student", path=str(student_folder), is_student=True),
    )
    return TalkRequest(talkers=talkers, tokenizer=str(student_folder), sampling=LIKELIEST, device="cpu")


@pytest.fixture(scope="module")
def student_folder(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    teacher = load_teacher(str(teacher_folder))
    student = build_student(teacher.config, variant="rad_rwkv7", options={}, attention_layers=(), attention_rope=False)
    transplant(teacher, student)
    return export_student(student, load_tokenizer(str(teacher_folder)), tmp_path_factory.mktemp("student"))


@pytest.fixture
def conversation(request_of_both: TalkRequest) -> Conversation:
    return open_conversation(request_of_both)


def talk(conversation: Conversation, *lines: str) -> str:
    out = io.StringIO()
    run(conversation, iter(lines), out)
    return out.getvalue()


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_turns_continue_from_what_was_read(conversation: Conversation, request_of_both: TalkRequest, name: str) -> None:
    """The same answers as a conversation that is read anew each time."""
    speaker, sizes = conversation.speakers[name], []
    hook = speaker.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    answers = [conversation.ask(name, text, lambda part: None).text for text in ("Once upon", "And then?")]
    hook.remove()
    turns = [size for size in sizes if size > 1]
    assert turns[0] + 5 + turns[1] + 5 == len(speaker.heard) - 1, "each token is read once"
    fresh = open_conversation(request_of_both).speakers[name]
    again = fresh.answer(speaker.heard[:-6], LIKELIEST, lambda part: None, lambda: False)
    assert fresh.heard == speaker.heard
    assert again.text == answers[1]


def test_after_a_failure_the_conversation_is_read_anew(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model remembers is then not what was said."""
    conversation.ask("student", "Once upon", lambda part: None)
    speaker = conversation.speakers["student"]

    def fail(part: str) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(speaker.tokenizer, "decode", lambda *a, **k: "x ")
    said = talk_to(conversation, "student", fail)
    assert "there is not enough memory for this conversation; /reset begins a new one" in said
    assert speaker.heard == []
    assert len(conversation.messages["student"]) == 2


def talk_to(conversation: Conversation, name: str, on_text: Any) -> str:
    """What is said of a message to one model whose text goes to `on_text`."""

    class Out(io.StringIO):
        def write(self, text: str) -> int:
            if text.startswith("x"):
                on_text(text)
            return super().write(text)

    conversation.speakers = {name: conversation.speakers[name]}
    out = Out()
    run(conversation, iter(["And then?"]), out)
    return out.getvalue()


def test_a_conversation_that_is_rewritten_is_read_anew(conversation: Conversation) -> None:
    conversation.ask("student", "Once upon", lambda part: None)
    speaker = conversation.speakers["student"]
    first = list(speaker.heard)
    conversation.ask("student", "And then?", lambda part: None)
    speaker.answer([*first[:4], 9, 9, 9], LIKELIEST, lambda part: None, lambda: False)
    after = speaker.heard
    speaker.reset()
    speaker.answer([*first[:4], 9, 9, 9], LIKELIEST, lambda part: None, lambda: False)
    assert speaker.heard == after


def test_answers_are_streamed_and_counted(conversation: Conversation) -> None:
    parts: list[str] = []
    answer = conversation.ask("student", "Once upon a time", parts.append)
    assert "".join(parts).strip() == answer.text.strip()
    assert answer.tokens == 6
    assert answer.memory > 0
    assert answer.rate is not None
    assert "6 tokens, first after" in describe(answer)
    assert "MiB" in describe(answer)


def test_side_by_side_and_commands(conversation: Conversation, tmp_path: Path) -> None:
    said = talk(
        conversation, "Tim was", "/set max_new_tokens 3", "/set temperature hot", "/set nothing 1", "/what", "",
        f"/save {tmp_path / 'talk.json'}", "/save", "/help", "/set", "/system Be brief.", "/reset", "/exit", "unread",
    )  # fmt: skip
    assert said.count("[teacher]") == said.count("[student]") == 1
    assert "max_new_tokens 3" in said
    assert "/set temperature: Input should be a valid number" in said
    assert "choose from temperature, top_p" in said
    assert "there is no command /what" in said
    assert "/save needs the name of a file" in said
    assert "with this system prompt" in said
    assert "Ctrl-C ends an answer" in said
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [m["role"] for m in saved["models"]["student"]["messages"]] == ["user", "assistant"]
    assert saved["models"]["teacher"]["answers"][0]["tokens"] == 6
    assert conversation.messages["student"] == [{"role": "system", "content": "Be brief."}]


def test_an_interrupted_answer_ends_and_the_conversation_goes_on(conversation: Conversation) -> None:
    conversation.set("max_new_tokens", "100000")
    threading.Timer(0.5, lambda: setattr(conversation, "stop", True)).start()
    answer = conversation.ask("student", "Once upon a time there was", lambda part: None)
    assert answer.stopped
    assert answer.tokens < 100_000
    conversation.set("max_new_tokens", "4")
    conversation.stop = False
    assert not conversation.ask("student", "And then?", lambda part: None).stopped


def test_seeds_repeat_answers(conversation: Conversation) -> None:
    for key, value in (("temperature", "1.5"), ("max_new_tokens", "12"), ("seed", "3")):
        conversation.set(key, value)
    made = []
    for _ in range(2):
        conversation.reset()
        made.append(conversation.ask("student", "Tim", lambda part: None).text)
    conversation.set("seed", "4")
    conversation.reset()
    assert made[0] == made[1] != conversation.ask("student", "Tim", lambda part: None).text


def test_without_a_template_text_is_continued(request_of_both: TalkRequest, plain_tokenizer: Path) -> None:
    bare = request_of_both.model_copy(update={"tokenizer": str(plain_tokenizer)})
    assert open_conversation(bare).ask("student", "Once upon", lambda part: None).tokens == 6
    with pytest.raises(UserError, match="--system needs a chat template"):
        open_conversation(bare.model_copy(update={"system": "x"}))


@pytest.fixture
def plain_tokenizer(tokenizer_folder: Path, tmp_path: Path) -> Path:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def test_what_cannot_be_done_is_said_and_the_talk_goes_on(conversation: Conversation, tmp_path: Path) -> None:
    del conversation.speakers["teacher"]
    said = talk(
        conversation, "bytes \udcff, no text", "/save ~nobody-of-this-name/x", f"/save {tmp_path}", "/save a\0b",
        f"/set seed {2**64}", "/set temperature nan", "/set temperature 1e-30", "/set repetition_penalty 1e-30",
        "/set temperature 0.001", "/set repetition_penalty 0.01", "Tim", "Tim", "/help",
    )  # fmt: skip
    assert "this line is no UTF-8 text" in said
    assert "~nobody-of-this-name/x: not a usable path" in said
    assert str(tmp_path) in said
    assert "/set seed: Input should be less than" in said
    assert "/set temperature: Input should be" in said
    assert "/set temperature: Value error, must be 0, for the likeliest token, or at least 0.001" in said
    assert "/set repetition_penalty: Input should be greater than or equal to 0.01" in said
    assert said.count("tokens so far") == 2
    assert said.endswith("leave (also Ctrl-D); Ctrl-C ends an answer\n")


def test_a_template_that_writes_nothing(request_of_both: TalkRequest, tmp_path: Path) -> None:
    (tmp_path / "empty.jinja").write_text("{{ '' }}")
    conversation = open_conversation(
        request_of_both.model_copy(update={"chat_template": str(tmp_path / "empty.jinja")})
    )
    assert "the chat template writes nothing" in talk(conversation, "Tim")


def test_piped_bytes_are_refused_line_by_line(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "request.json").write_text(TalkRequest(talkers=(TALKER,), tokenizer="x").model_dump_json())
    monkeypatch.setattr(chat, "open_conversation", lambda request: conversation)
    monkeypatch.setattr(sys, "argv", ["chat", str(tmp_path / "request.json")])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\x00\n/set\n"), encoding="utf-8"))
    before = signal.getsignal(signal.SIGINT)
    try:
        assert chat.main() == 0
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().out
    assert "this line is no UTF-8 text" in said
    assert "max_new_tokens 6" in said


@pytest.mark.slow
def test_ctrl_c_at_a_terminal_ends_the_answer_alone(request_of_both: TalkRequest, tmp_path: Path) -> None:
    long = request_of_both.model_copy(update={"sampling": Drawing(temperature=0, max_new_tokens=100_000)})
    (tmp_path / "request.json").write_text(long.model_dump_json())
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "radlads.tasks.jobs.talk.chat", str(tmp_path / "request.json")],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    seen = b""

    def wait_for(text: bytes, seconds: float = 120) -> None:
        nonlocal seen
        end = time.monotonic() + seconds
        while text not in seen:
            assert time.monotonic() < end, seen.decode(errors="replace")
            seen += os.read(ours, 65536)

    try:
        wait_for(b"/help lists the commands")
        os.write(ours, b"Once upon a time\n")
        wait_for(b"[teacher]")
        time.sleep(2)
        os.kill(process.pid, signal.SIGINT)
        wait_for(b"stopped, first after")
        os.write(ours, b"/exit\n")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(ours)


def test_mistakes_of_the_command_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[1]")
    cases = {
        ("no-such-run",): "no finished model|no run|is empty|there is no store",
        ("./nowhere",): "there is no folder ./nowhere",
        ("empty",): "is no model",
        ("list",): "its config.json holds no object",
        ("empty", "--both", "--teacher"): "exclude each other",
        ("empty", "--device", "tpu"): "choose auto, cpu or cuda",
        ("empty", "--stage", "align"): "--stage is for a run",
        ("run", "--teacher-path", "x"): "--teacher-path is for a folder",
    }
    for arguments, said in cases.items():
        found = CliRunner().invoke(app, ["chat", *arguments, "--store", str(tmp_path / "store")])
        assert isinstance(found.exception, UserError), (arguments, found.output, found.exception)
        assert any(one in str(found.exception) for one in said.split("|")), (arguments, str(found.exception))
