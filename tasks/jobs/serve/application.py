"""The HTTP application: routes of OpenAI's API, their checks, and what becomes of errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse

from radlads.tasks.contracts.parsing.document import one_line
from radlads.tasks.contracts.requests.serve import ServingLimits
from radlads.tasks.jobs.serve.access import Access
from radlads.tasks.jobs.serve.parameters import read_json, read_request
from radlads.tasks.jobs.serve.prompts import PromptReader
from radlads.tasks.jobs.serve.refusal import ApiError
from radlads.tasks.jobs.serve.replies import ReplyForm, event
from radlads.tasks.jobs.serve.ticket import AnswerPart, Ticket
from radlads.tasks.jobs.serve.worker import Worker

_BODY_SECONDS = 60
_CLIENT_GONE = 499


class Api:
    """The server of one model, as methods that answer requests."""

    def __init__(self, name: str, worker: Worker, prompts: PromptReader, access: Access, limits: ServingLimits) -> None:
        """name: by which clients ask for the model."""
        self._name, self._worker, self._prompts, self._access, self._limits = name, worker, prompts, access, limits
        self._began = int(time.time())
        self._encoding = ThreadPoolExecutor(1, "prompts")  # one thread: see PromptReader

    def application(self) -> FastAPI:
        """The ASGI application."""
        app = FastAPI(openapi_url=None)
        app.add_api_route("/health", self._answered(self.health, is_open=True), methods=["GET"])
        app.add_api_route("/v1/models", self._answered(self.models), methods=["GET"])
        app.add_api_route("/v1/models/{name:path}", self._answered(self.model), methods=["GET"])
        app.add_api_route("/v1/chat/completions", self._answered(self.chat), methods=["POST"])
        app.add_api_route("/v1/completions", self._answered(self.complete), methods=["POST"])
        app.add_exception_handler(HTTPException, _no_such_route)
        return app

    def _answered(
        self, answer: Callable[[Request], Awaitable[Response]], *, is_open: bool = False
    ) -> Callable[[Request], Awaitable[Response]]:
        """A route that checks who asks, and whose refusals are answers. is_open: needs no key."""

        async def route(request: Request) -> Response:
            try:
                self._access.check_host(request.headers)
                if not is_open:
                    self._access.check_key(request.headers)
                return await answer(request)
            except ApiError as error:
                return _refused(error)
            except ClientDisconnect:  # amid its request
                return Response(status_code=_CLIENT_GONE)

        return route

    async def health(self, request: Request) -> Response:
        """Whether it answers, and how many requests it has."""
        return JSONResponse({"status": "ok", **self._worker.numbers()})

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, request: Request) -> Response:
        """The model, by its name."""
        self._check_name(request.path_params["name"])
        return JSONResponse(self._described())

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._reply(request, is_chat=True)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._reply(request, is_chat=False)

    async def _reply(self, request: Request, *, is_chat: bool) -> Response:
        asked = read_request(read_json(await self._body(request)), self._limits, is_chat=is_chat)
        self._check_name(asked.model)
        ids = await asyncio.get_running_loop().run_in_executor(self._encoding, self._prompts.ids, asked)
        ticket = Ticket(ids, asked.drawing, asked.stops, continues=not is_chat)
        form = ReplyForm(self._name, len(ids), is_chat=is_chat, tells_usage=asked.tells_usage)
        self._worker.submit(ticket)
        parts = self._parts(ticket, request)
        first = await anext(parts, None)  # before the status is sent, so that a failure has its own
        if first is None:
            return Response(status_code=_CLIENT_GONE)
        if not asked.streams:
            whole = [first] + [part async for part in parts]
            gone = whole[-1].finish is None
            return Response(status_code=_CLIENT_GONE) if gone else JSONResponse(form.whole(whole))
        return StreamingResponse(
            _events(form, first, parts),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache"},
            background=BackgroundTask(self._cancel, ticket),
        )

    async def _parts(self, ticket: Ticket, request: Request) -> AsyncIterator[AnswerPart]:
        """The parts of an answer; it ends early, without the last one, where the client has gone. However it ends,
        nothing more is computed for it."""
        gone, coming = asyncio.ensure_future(_is_gone(request)), None
        try:
            while True:
                coming = asyncio.ensure_future(ticket.next_part())
                await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    return
                part = coming.result()
                yield part
                if part.finish is not None:
                    return
        finally:
            gone.cancel()
            if coming is not None:
                coming.cancel()
            self._cancel(ticket)

    def _cancel(self, ticket: Ticket) -> None:
        ticket.cancel()
        self._worker.wake()

    async def _body(self, request: Request) -> bytes:
        """Raises ApiError for one that is too long, comes too slowly, or is not declared as JSON."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "send the request as JSON, with Content-Type: application/json")
        most, body = self._limits.max_body_bytes, bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for piece in request.stream():
                    body += piece
                    if len(body) > most:
                        raise ApiError(413, f"the request is longer than {most:,} bytes")
        except TimeoutError:
            raise ApiError(408, f"the request did not arrive within {_BODY_SECONDS} seconds") from None
        return bytes(body)

    def _check_name(self, name: str) -> None:
        if name != self._name:
            said = f"there is no model '{one_line(name, 80)}' here; this server has '{self._name}'"
            raise ApiError(404, said, param="model", code="model_not_found")

    def _described(self) -> dict[str, Any]:
        return {"id": self._name, "object": "model", "created": self._began, "owned_by": "radlads"}


async def _is_gone(request: Request) -> None:
    """Returns when the client has closed the connection. The body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def _events(form: ReplyForm, first: AnswerPart, parts: AsyncIterator[AnswerPart]) -> AsyncIterator[str]:
    """A stream of the parts; a failure is its last event."""
    yield form.begin() + form.part(first)
    try:
        async for part in parts:
            yield form.part(part)
    except ApiError as error:
        yield event(error.body())


def _refused(error: ApiError) -> Response:
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body(), error.status, headers)


async def _no_such_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    said = f"{request.method} {one_line(request.url.path, 80)} is not supported: there are /v1/chat/completions, "
    return _refused(ApiError(status, said + "/v1/completions, /v1/models and /health"))
