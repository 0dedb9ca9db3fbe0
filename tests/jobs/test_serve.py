"""The server of `radlads serve` with OpenAI's own client: answers, streams, several clients at once, refusals."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from radlads.flows.cli import app
from radlads.model.student.export import export_student
from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.requests.serve import ServeRequest, ServingLimits
from radlads.tasks.contracts.requests.talk import Talker
from radlads.tasks.jobs.serve import application, worker
from radlads.tasks.jobs.serve.server import ModelServer, bind, build
from radlads.tasks.jobs.serve.writer import Writer
from radlads.tasks.jobs.sources import load_tokenizer
from radlads.tasks.jobs.talk.opening import OpenedModels, open_models

openai = pytest.importorskip("openai", reason="the client `openai` is not installed")

KEY = "a-key-of-clients"
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)
PROMPTS = ("Once upon a time", "Tim", "The red ball rolled away, and", "A kind girl found it.", "Why?")


@pytest.fixture(scope="module")
def folder(teacher_folder: Path, lively_student: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    student = lively_student("rad_rwkv7", (1,))
    return export_student(student, load_tokenizer(str(teacher_folder)), tmp_path_factory.mktemp("student") / "small")


@pytest.fixture(scope="module")
def request_(folder: Path) -> ServeRequest:
    talker = Talker(name="student", path=str(folder), is_student=True)
    limits = ServingLimits(max_batch=4, max_waiting=16, max_prompt_tokens=200, max_new_tokens=64)
    return ServeRequest(talkers=(talker,), tokenizer=str(folder), device="cpu", name="small", port=0, limits=limits)


@pytest.fixture(scope="module")
def opened(request_: ServeRequest) -> OpenedModels:
    return open_models(request_)


@contextmanager
def serving(request: ServeRequest, opened: OpenedModels, key: str | None = None) -> Iterator[tuple[ModelServer, int]]:
    """A server in a thread, and its port."""
    listener = bind(request.host, request.port)
    server = build(request, opened, key, listener.getsockname()[1])
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield server, listener.getsockname()[1]
    finally:
        server.worker.stop()
        server.should_exit = True
        thread.join(60)
        server.worker.join()


@pytest.fixture(scope="module")
def server(request_: ServeRequest, opened: OpenedModels) -> Iterator[tuple[ModelServer, int]]:
    with serving(request_, opened) as running:
        yield running


@pytest.fixture
def client(server: tuple[ModelServer, int]) -> Any:
    return client_of(server[1])


def client_of(port: int, key: str = "none") -> Any:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=60)


def wait_until(done: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def asked(client: Any, text: str, **more: Any) -> Any:
    given = {"model": "small", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12}
    return client.chat.completions.create(**given | more)


def alone(opened: OpenedModels, text: str, tokens: int = 12) -> tuple[str, int]:
    """What generate() answers, and its number of tokens."""
    model, template = opened.models["student"], opened.template
    assert template is not None
    ids = template.conversation_ids([{"role": "user", "content": text}])
    made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=tokens)[0, len(ids) :].tolist()
    writer = Writer(opened.tokenizer)
    return "".join(writer.add(token) for token in made if token != 2) + writer.end(), len(made)


def test_a_chat_is_answered_as_by_generate(client: Any, opened: OpenedModels) -> None:
    found = asked(client, PROMPTS[0])
    text, tokens = alone(opened, PROMPTS[0])
    assert found.object == "chat.completion"
    assert found.model == "small"
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].message.content == text
    assert found.choices[0].finish_reason == "length"
    assert found.usage.completion_tokens == tokens == 12
    assert found.usage.total_tokens == found.usage.prompt_tokens + tokens


def test_a_text_is_continued(client: Any, opened: OpenedModels) -> None:
    found = client.completions.create(model="small", prompt="Once upon", temperature=0)
    ids = opened.tokenizer("Once upon").input_ids
    assert found.object == "text_completion"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(ids), 16)
    for same in (ids, [ids], ["Once upon"]):
        again = client.completions.create(model="small", prompt=same, temperature=0)
        assert again.choices[0].text == found.choices[0].text != ""


def test_streams_are_the_same_answers_in_parts(client: Any, opened: OpenedModels) -> None:
    chunks = list(asked(client, PROMPTS[2], stream=True, stream_options={"include_usage": True}, max_tokens=40))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].object == "chat.completion.chunk"
    *parts, usage = chunks
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == alone(opened, PROMPTS[2], 40)[0]
    assert len(parts) > 5
    assert [part.choices[0].finish_reason for part in parts][-2:] == [None, "length"]
    assert usage.choices == []
    assert usage.usage.completion_tokens == 40
    pieces = list(client.completions.create(model="small", prompt="Tim", temperature=0, stream=True))
    whole = client.completions.create(model="small", prompt="Tim", temperature=0)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert all(piece.usage is None for piece in pieces)


def test_clients_at_once_get_what_they_get_alone(
    server: tuple[ModelServer, int], opened: OpenedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More clients than rows of the batch, with answers of different lengths."""
    sizes: list[int] = []
    states, port = server[0].worker._states, server[1]
    advance = states.advance
    monkeypatch.setattr(states, "advance", lambda tokens: sizes.append(len(tokens)) or advance(tokens))
    asks = [(text, 8 + 5 * number) for number, text in enumerate(PROMPTS * 2)]
    with ThreadPoolExecutor(len(asks)) as pool:
        found = list(pool.map(lambda ask: asked(client_of(port), ask[0], max_tokens=ask[1]), asks))
    assert [one.choices[0].message.content for one in found] == [alone(opened, *ask)[0] for ask in asks]
    assert max(sizes) == 4
    assert server[0].worker.numbers() == {"running": 0, "waiting": 0}


def test_seeds_repeat_answers_whoever_is_there(server: tuple[ModelServer, int]) -> None:
    drawn = {"temperature": 1.2, "top_p": 0.9, "seed": 5, "max_tokens": 20}
    first = asked(client_of(server[1]), "Tim", **drawn).choices[0].message.content
    with ThreadPoolExecutor(4) as pool:
        seeds = (5, 6, 7, 5)
        found = list(pool.map(lambda seed: asked(client_of(server[1]), "Tim", **drawn | {"seed": seed}), seeds))
    texts = [one.choices[0].message.content for one in found]
    assert texts[0] == texts[3] == first
    assert len(set(texts)) == 3


def test_stop_texts_and_the_end_token(client: Any, opened: OpenedModels, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = asked(client, "Tim", max_tokens=30).choices[0].message.content
    stop = whole[7:10]
    found = asked(client, "Tim", max_tokens=30, stop=["never in it", stop])
    assert found.choices[0].message.content == whole[: whole.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens < 30
    parts = list(asked(client, "Tim", max_tokens=30, stop=stop, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole[: whole.index(stop)]


def test_the_end_token_ends_an_answer(server: tuple[ModelServer, int], client: Any, opened: OpenedModels,
                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    model, template = opened.models["student"], opened.template
    assert template is not None
    ids = template.conversation_ids([{"role": "user", "content": "Tim"}])
    made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=9)[0, len(ids) :].tolist()
    monkeypatch.setattr(server[0].worker, "_ends", [made[4]])
    found = asked(client, "Tim")
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens == made.index(made[4]) + 1


def test_models_and_health(server: tuple[ModelServer, int], client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "radlads"
    with pytest.raises(openai.NotFoundError, match="there is no model 'large' here; this server has 'small'"):
        client.models.retrieve("large")
    status, told = raw(server[1], "GET", "/health")
    assert (status, json.loads(told)["status"]) == (200, "ok")


# Clients that go, and those that have to wait


def test_a_client_that_goes_frees_its_row(server: tuple[ModelServer, int], client: Any, monkeypatch: Any) -> None:
    numbers, slow = server[0].worker.numbers, threading.Event()
    step = server[0].worker._step
    monkeypatch.setattr(server[0].worker, "_step", lambda: (slow.wait(1), step()))
    stream = asked(client, "Tim", stream=True, max_tokens=64)
    parts = iter(stream)
    next(parts)
    wait_until(lambda: numbers()["running"] == 1)  # the first event may come before
    stream.close()
    wait_until(lambda: numbers()["running"] == 0)
    with socket.create_connection(("127.0.0.1", server[1])) as connection:  # one that waits for a whole answer
        body = json.dumps({"model": "small", "prompt": "Tim", "max_tokens": 64}).encode()
        connection.sendall(HEAD % len(body) + body)
        wait_until(lambda: numbers()["running"] == 1)
    wait_until(lambda: numbers()["running"] == 0)
    slow.set()


def test_a_client_that_goes_amid_its_request_is_no_failure(
    server: tuple[ModelServer, int], client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_connection(("127.0.0.1", server[1])) as connection:
        connection.sendall(HEAD % 100 + b'{"model": ')
    asked(client, "Tim", max_tokens=1)  # by now the loop has seen it
    assert not [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


def test_the_place_of_an_answer_that_ended_is_free(request_: ServeRequest, opened: OpenedModels) -> None:
    """With no room to wait, a client that asks again at once is not refused."""
    limits = request_.limits.model_copy(update={"max_batch": 1, "max_waiting": 0})
    with serving(request_.model_copy(update={"limits": limits}), opened) as (server, port):
        keep = server.worker._keep_running
        server.worker._keep_running = lambda: (time.sleep(0.05), keep())  # type: ignore[method-assign]
        for _ in range(4):
            assert asked(client_of(port), "Tim", max_tokens=2).usage.completion_tokens == 2


def test_too_many_at_once_are_refused(request_: ServeRequest, opened: OpenedModels, monkeypatch: Any) -> None:
    limits = request_.limits.model_copy(update={"max_batch": 1, "max_waiting": 1})
    with serving(request_.model_copy(update={"limits": limits}), opened) as (server, port):
        go, step = threading.Event(), server.worker._step
        monkeypatch.setattr(server.worker, "_step", lambda: (go.wait(60), step()))
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(asked, client_of(port), "Tim")
            wait_until(lambda: server.worker.numbers() == {"running": 1, "waiting": 0})
            second = pool.submit(asked, client_of(port), "Why?")
            wait_until(lambda: server.worker.numbers() == {"running": 1, "waiting": 1})
            with pytest.raises(openai.RateLimitError, match="1 requests wait already; try again later"):
                asked(client_of(port), "A third")
            go.set()
            assert first.result().usage.completion_tokens == second.result().usage.completion_tokens == 12


def test_a_server_that_stops_ends_its_answers(request_: ServeRequest, opened: OpenedModels, monkeypatch: Any) -> None:
    with serving(request_, opened) as (server, port):
        step = server.worker._step
        monkeypatch.setattr(server.worker, "_step", lambda: (time.sleep(0.05), step()))
        stream = iter(asked(client_of(port), "Tim", stream=True, max_tokens=64))
        next(stream)
        server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(stream)
        wait_until(lambda: not server.worker._thread.is_alive())
        assert not server.worker.failed


@pytest.mark.parametrize("place", ["read", "advance"])
def test_too_little_memory_ends_the_answer_alone(
    server: tuple[ModelServer, int], client: Any, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(server[0].worker._states, place, lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
        with pytest.raises(openai.InternalServerError, match="there is not enough memory") as refused:
            asked(client, "Tim")
        assert refused.value.status_code == 503
    assert asked(client, "Tim").usage.completion_tokens == 12


def test_scores_that_are_no_numbers_end_the_answer_alone(
    server: tuple[ModelServer, int], client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = server[0].worker._states
    advance = states.advance
    with monkeypatch.context() as patch:
        patch.setattr(states, "advance", lambda tokens: advance(tokens) * torch.nan)
        with pytest.raises(openai.InternalServerError, match="the model's scores are not numbers here"):
            asked(client, "Tim")
    assert asked(client, "Tim").usage.completion_tokens == 12


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_ends_the_server(request_: ServeRequest, opened: OpenedModels, monkeypatch: Any) -> None:
    with serving(request_, opened) as (server, port):
        monkeypatch.setattr(server.worker._states, "advance", lambda tokens: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="the server failed at work; its log says why"):
            asked(client_of(port), "Tim")
        wait_until(lambda: server.should_exit)
        assert server.worker.failed


def test_long_prompts_are_read_in_pieces_between_steps(
    server: tuple[ModelServer, int], opened: OpenedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_PIECE", 8)
    sizes, read = [], server[0].worker._states.read
    monkeypatch.setattr(
        server[0].worker._states, "read", lambda cache, ids: (sizes.append(len(ids)), read(cache, ids))[1]
    )
    text = "Once upon a time there was a little dog named Tim. " * 3
    assert asked(client_of(server[1]), text).choices[0].message.content == alone(opened, text)[0]
    assert len(sizes) > 3
    assert max(sizes) == 8


# Refusals


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 2}, "n=2 is not supported by this server; leave it out"),
    ({"logprobs": True}, "logprobs=True is not supported"),
    ({"tools": [{"type": "function"}]}, "tools=.* is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format=.* is not supported"),
    ({"frequency_penalty": 0.5}, "frequency_penalty=0.5 is not supported"),
    ({"logit_bias": {"5": 1}}, "logit_bias=.* is not supported"),
    ({"temprature": 1}, "there is no parameter 'temprature'; did you mean 'temperature'"),
    ({"temperature": -1}, "temperature: input should be greater than or equal to 0"),
    ({"temperature": 1e-9}, "temperature: must be 0, for the likeliest token, or at least 0.001"),
    ({"temperature": "hot"}, "temperature: input should be a valid number"),
    ({"top_p": 0}, "top_p: input should be greater than 0"),
    ({"seed": -1}, "seed: input should be greater than or equal to 0"),
    ({"max_tokens": 0}, "max_tokens: input should be greater than or equal to 1"),
    ({"max_tokens": 10**300}, "max_tokens is too large; this server writes at most 64 tokens"),
    ({"max_tokens": 65}, "max_tokens is 65; this server writes at most 64 tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, "give max_completion_tokens or max_tokens, not both"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop: at most 4 texts"),
    ({"stop": ""}, "stop: texts of 1 to 256 characters"),
    ({"stream_options": {"include_usage": True}}, "stream_options is for stream=true"),
    ({"messages": []}, "messages: list should have at least 1 item"),
    ({"messages": [{"role": "user"}]}, "messages, message 1: the user message has no content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages, message 1: the role 'tool' is not supported"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "a part of its content is 'image_url', but only text is supported",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "a text part of its content has no text"),
    ({"messages": [{"role": "user", "content": "a dog " * 200}]}, "tokens; this server reads at most 200"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED, ids=lambda one: str(one)[:40])
def test_what_is_not_supported_is_said_in_a_line(client: Any, given: dict[str, Any], said: str) -> None:
    given = {"max_tokens": 3} | given
    extra = {"temprature"} & given.keys()
    more = {"extra_body": {name: given.pop(name) for name in extra}} if extra else {}
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        asked(client, "Tim", **given, **more)
    body = refused.value.body
    assert body["type"] == "invalid_request_error"
    assert "\n" not in body["message"]
    assert body["param"] in {*given, *extra}


@pytest.mark.parametrize(
    "given",
    [
        {"n": 1, "logprobs": False, "frequency_penalty": 0, "presence_penalty": 0.0, "tools": [], "user": "me"},
        {"response_format": {"type": "text"}, "store": False, "metadata": {"a": "b"}, "logit_bias": {}},
        {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Tim"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Tim"}]}]},
        {"max_tokens": None, "max_completion_tokens": 2, "stop": None, "seed": None, "stream": False},
    ],
    ids=str,
)
def test_what_changes_nothing_is_accepted(client: Any, given: dict[str, Any]) -> None:
    assert asked(client, "Tim", **{"max_tokens": 2} | given).usage.completion_tokens == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt": ["a", "b"]}, "several prompts in one request are not supported"),
        ({"prompt": [1, 10**6]}, "prompt: ids of tokens are whole numbers from 0 to"),
        ({"prompt": ""}, "prompt is no text at all"),
        ({"prompt": []}, "prompt is no text at all"),
        ({"prompt": "a", "echo": True}, "echo=True is not supported"),
        ({"prompt": "a", "logprobs": 0}, "logprobs=0 is not supported"),
        ({"prompt": "a", "suffix": "b"}, "suffix='b' is not supported"),
        ({"prompt": "a", "best_of": 3}, "best_of=3 is not supported"),
    ],
    ids=str,
)
def test_what_is_not_supported_of_texts(client: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        client.completions.create(model="small", **given)


def test_other_models_and_routes_are_not_there(server: tuple[ModelServer, int], client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt' here; this server has 'small'") as refused:
        asked(client, "Tim", model="gpt")
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings is not supported: there are"):
        client.embeddings.create(model="small", input="x")
    assert raw(server[1], "GET", "/v1/chat/completions")[0] == 405


def raw(port: int, method: str, path: str, body: bytes | str | None = None, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


JSON = "application/json"


@pytest.mark.parametrize(
    ("status", "body", "headers", "said"),
    [
        (400, "{", {}, "the request is no JSON"),
        (400, "[1]", {}, "the request must be a JSON object"),
        (400, '{"temperature": NaN}', {}, "NaN is no number of JSON"),
        (400, '{"prompt": "\\ud800", "model": "small"}', {}, "half of a surrogate pair"),
        (400, "[" * 100_000, {}, "the request is no JSON"),
        (400, "{}", {}, "model: field required"),
        (413, " " * (5 << 20), {}, "the request is longer than 4,194,304 bytes"),
        (415, "{}", {"Content_Type": "text/plain"}, "with Content-Type: application/json"),
        (403, "{}", {"Host": "127.evil.example"}, "answers to the names of loopback only"),
    ],
)
def test_requests_that_are_none(
    server: tuple[ModelServer, int], status: int, body: str, headers: dict[str, str], said: str
) -> None:
    found, told = raw(server[1], "POST", "/v1/completions", body, **{"Content_Type": JSON} | headers)
    assert (found, said in json.loads(told)["error"]["message"]) == (status, True), told


def test_slow_bodies_are_given_up(server: tuple[ModelServer, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(application, "_BODY_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", server[1]), timeout=30) as connection:
        connection.sendall(HEAD % 9)
        assert b" 408 " in connection.recv(1000)


def test_the_key_is_asked_for(request_: ServeRequest, opened: OpenedModels) -> None:
    with serving(request_.model_copy(update={"has_key": True}), opened, KEY) as (_, port):
        assert asked(client_of(port, KEY), "Tim").usage.completion_tokens == 12
        for wrong in ("none", KEY[:-1], KEY + "x", "ключ"):
            status, told = raw(port, "GET", "/v1/models", Authorization=f"Bearer {wrong}".encode().decode("latin-1"))
            assert status == 401
            assert "this server needs its key" in told
            assert KEY not in told
        assert raw(port, "GET", "/v1/models")[0] == 401
        assert raw(port, "GET", "/health")[0] == 200


def test_without_a_template_there_are_texts_alone(request_: ServeRequest, opened: OpenedModels) -> None:
    bare = OpenedModels(opened.models, opened.tokenizer, None)
    with serving(request_, bare) as (_, port):
        with pytest.raises(openai.BadRequestError, match="has no chat template: use /v1/completions, or start"):
            asked(client_of(port), "Tim")
        assert client_of(port).completions.create(model="small", prompt="Tim").usage.completion_tokens == 16


# The command


def test_mistakes_of_the_command_are_one_line(
    folder: Path, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RADLADS_API_KEY", raising=False)
    monkeypatch.setenv("SHORT", "abc")
    monkeypatch.setenv("RADLADS_STORE", str(tmp_path / "store"))
    cases = {
        ("no-such-run",): "no finished model|no run|is empty|there is no store",
        ("./nowhere",): "there is no folder ./nowhere",
        (str(teacher_folder),): "is no converted model; `transformers serve` and vLLM serve others",
        (str(folder), "--device", "tpu"): "choose auto, cpu or cuda",
        (
            str(folder),
            "--host",
            "0.0.0.0",
        ): "0.0.0.0 is reached from other machines, so clients need a key: set RADLADS",
        (str(folder), "--host", "0.0.0.0", "--api-key", "MISSING"): "there is no such variable",
        (str(folder), "--api-key", "SHORT"): "SHORT: a key has 8 or more letters",
        (str(folder), "--port", "70000"): "--port: Input should be less than 65536",
        (str(folder), "--max-batch", "0"): "--max-batch: Input should be greater than or equal to 1",
        (str(folder), "--stage", "align"): "--stage is for a run",
    }
    for arguments, said in cases.items():
        found = CliRunner().invoke(app, ["serve", *arguments])
        assert isinstance(found.exception, UserError), (arguments, found.output, found.exception)
        assert any(one in str(found.exception) for one in said.split("|")), (arguments, str(found.exception))
        assert "\n" not in str(found.exception)


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="choose another --port"):
        bind("127.0.0.1", taken.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_a_signal(folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Signals go to the terminal's whole group. The key is neither in its output nor in its command lines."""
    command = [sys.executable, "-m", "radlads.flows.cli", "serve", str(folder), "--port", "0", "--device", "cpu"]
    env = {**os.environ, "RADLADS_HOME": str(tmp_path), "RADLADS_API_KEY": KEY}
    log = (tmp_path / "log.txt").open("w+")
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"small at http://127\.0\.0\.1:(\d+)/v1; Ctrl-C stops it\n", line)
        assert found is not None, (line, Path(log.name).read_text())
        client = client_of(int(found[1]), KEY)
        stream = iter(asked(client, "Tim", stream=True, max_tokens=4000))
        next(stream)
        os.killpg(process.pid, number)
        with pytest.raises(openai.APIError):
            list(stream)
        assert process.wait(timeout=60) in (128 + number, -number)
        said = process.stdout.read() + Path(log.name).read_text()
        assert KEY not in said
        assert "Traceback" not in said
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()
