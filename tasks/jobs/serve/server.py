"""The program of `radlads serve`: an OpenAI-compatible server of one converted model.

`python -m radlads.tasks.jobs.serve.server request.json`. Ctrl-C and SIGTERM end it: answers at work end with an error,
and the exit codes are 130 and 143.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

import uvicorn

from radlads.model.student.modeling import RadladsForCausalLM
from radlads.tasks.contracts.errors import UserError, first_line
from radlads.tasks.contracts.requests.serve import ServeRequest, is_loopback
from radlads.tasks.contracts.settings import serving_key
from radlads.tasks.jobs.process_group import quiet_libraries
from radlads.tasks.jobs.serve.access import Access
from radlads.tasks.jobs.serve.application import Api
from radlads.tasks.jobs.serve.prompts import PromptReader
from radlads.tasks.jobs.serve.worker import Worker
from radlads.tasks.jobs.talk.opening import OpenedModels, open_models

_GRACE_SECONDS = 5
"""For connections to close, once all answers have ended."""


class ModelServer(uvicorn.Server):
    """A server that ends the answers at work when it is asked to stop, and does not wait for them."""

    def __init__(self, api: Api, worker: Worker, greeting: str) -> None:
        """greeting: a line for stdout, once it listens."""
        settings = uvicorn.Config(
            api.application(),
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        super().__init__(settings)
        self.worker, self._greeting = worker, greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        sys.stdout.write(self._greeting + "\n")
        sys.stdout.flush()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn."""
        self.worker.stop()
        super().handle_exit(sig, frame)


def bind(host: str, port: int) -> socket.socket:
    """A socket of this address, which does not listen yet. Raises UserError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(f"cannot serve at {host}, port {port}: {first_line(error)}; choose another --port") from error
    return listener


def build(request: ServeRequest, opened: OpenedModels, key: str | None, port: int) -> ModelServer:
    """The server, and its worker, which begins at once. port: where it will listen. Raises UserError."""
    model = next(iter(opened.models.values()))
    if not isinstance(model, RadladsForCausalLM):
        raise UserError("only converted models are served; use `transformers serve` or vLLM for others")
    server: ModelServer | None = None

    def on_failure() -> None:
        if server is not None:
            server.should_exit = True

    worker = Worker(model, opened.tokenizer, request.limits, on_failure)
    prompts = PromptReader(opened.tokenizer, opened.template, model.config.vocab_size, request.limits.max_prompt_tokens)
    access = Access(key, loopback_only=is_loopback(request.host))
    host = f"[{request.host}]" if ":" in request.host else request.host
    greeting = f"{request.name} at http://{host}:{port}/v1; Ctrl-C stops it"
    server = ModelServer(Api(request.name, worker, prompts, access, request.limits), worker, greeting)
    worker.start()
    return server


def serve(request: ServeRequest) -> int:
    """Serve until a signal, or a failure; the exit code of a failure. Raises UserError."""
    key = serving_key(None) if request.has_key else None
    if request.has_key and key is None:
        raise UserError("the key that clients must send did not reach the server; set RADLADS_API_KEY")
    listener = bind(request.host, request.port)
    server = build(request, open_models(request), key, listener.getsockname()[1])
    try:
        server.run(sockets=[listener])
    finally:
        server.worker.stop()
        server.worker.join()
    return 1 if server.worker.failed else 0


def main() -> int:
    """Serve; the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    quiet_libraries()
    request = ServeRequest.model_validate_json(Path(sys.argv[1]).read_bytes())
    try:
        return serve(request)
    except UserError as error:
        sys.stderr.write(f"radlads: {error}\n")
        return 2
    except KeyboardInterrupt:  # uvicorn raises it again, once it has stopped
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
