"""A proxy before an S3 endpoint that simulates faults of networks and gateways: cut, alter, lose, delay, forget.

A rule applies to the first `times` requests that match it, after `skip` others. The tests of the store and the drill
share it.
"""

from __future__ import annotations

import http.client
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_REFUSALS = {"missing": (404, "NoSuchKey"), "busy": (503, "SlowDown")}
_ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "proxy-connection"}


@dataclass
class Rule:
    """A fault for requests of a method whose path, with its query, matches a pattern.

    act: `flip-request`, `flip-answer` (one byte of the body), `short` (half of the body, presented as complete), `cut`
    (the connection ends in the middle of the body), `missing` (404), `busy` (503), `drop` (no answer, nothing done),
    `lose` (done, and no answer), `late` (no answer; done after `delay` seconds), `slow` (done after `delay` seconds),
    `call` (`hook` is called first, then the request is served).
    """

    method: str
    pattern: str
    act: str
    times: int = 1
    skip: int = 0
    delay: float = 0.0
    hook: Callable[[], None] | None = None
    seen: int = field(default=0, init=False)
    hits: int = field(default=0, init=False)

    def takes(self, method: str, path: str) -> bool:
        """Count this request; returns whether the rule applies to it."""
        if method not in self.method.split("|") or not re.search(self.pattern, path):
            return False
        self.seen += 1
        taken = self.skip < self.seen <= self.skip + self.times
        self.hits += taken
        return taken


class FaultProxy:
    """A context manager; `endpoint` is its address, `rules` may be changed at any time."""

    def __init__(self, target: str, rules: list[Rule] | None = None) -> None:
        parts = urlsplit(target)
        self.target, self.rules = (parts.hostname or "127.0.0.1", parts.port or 80), rules or []
        self.lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def rule(self, method: str, path: str) -> Rule | None:
        """The rule for a request; every matching rule counts it."""
        with self.lock:
            return next((rule for rule in self.rules if rule.takes(method, path)), None)

    def forward(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, list[Any], bytes]:
        """(status, headers, body) of the endpoint's answer."""
        connection = http.client.HTTPConnection(*self.target, timeout=60)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors of a client that was killed during a request; report all others."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    owner: FaultProxy
    protocol_version = "HTTP/1.1"
    timeout = 60

    def log_message(self, *_: Any) -> None:
        """Silence."""

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        rule = self.owner.rule(self.command, self.path) or Rule("", "", "")
        if rule.hook is not None:
            rule.hook()
        if rule.act in ("drop", "late"):
            if rule.act == "late":
                later = (self.command, self.path, headers, body)
                threading.Timer(rule.delay, self.owner.forward, later).start()
            self._hang_up()
        elif rule.act in _REFUSALS:
            status, code = _REFUSALS[rule.act]
            self._answer(status, [("Content-Type", "application/xml")], _ERROR.format(code=code).encode())
        else:
            self._pass_on(rule, headers, body)

    def _pass_on(self, rule: Rule, headers: dict[str, str], body: bytes) -> None:
        time.sleep(rule.delay if rule.act == "slow" else 0.0)
        sent = _flip(body) if rule.act == "flip-request" else body
        status, given, data = self.owner.forward(self.command, self.path, headers, sent)
        if rule.act == "lose":
            self._hang_up()
            return
        if rule.act == "flip-answer":
            data = _flip(data)
        if rule.act == "short":
            data = data[: len(data) // 2]
        self._answer(status, given, data, cut=rule.act == "cut")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815 - names that http.server requires

    def _answer(self, status: int, headers: list[Any], data: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        length = str(len(data))
        for name, value in headers:
            if name.lower() == "content-length":
                length = value if self.command == "HEAD" else length
            elif name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        try:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other side was faster
            return


def _flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else data
