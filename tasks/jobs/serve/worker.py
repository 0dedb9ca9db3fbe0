"""The thread that has the model: it reads prompts and continues all running answers together, a token at a time.

Between two steps of the batch, prompts that arrived are read, a piece of so many tokens at the most, so that a long
prompt does not stop the others; a prompt that was read joins the batch. Answers that end leave it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from radlads.model.student.cache import RadladsCache
from radlads.model.student.decoding.generation_loop import prompt_piece
from radlads.model.student.modeling import RadladsForCausalLM
from radlads.tasks.contracts.requests.serve import ServingLimits
from radlads.tasks.jobs.serve.drawing import TokenDraw, choose_tokens
from radlads.tasks.jobs.serve.refusal import ApiError
from radlads.tasks.jobs.serve.states import RowStates
from radlads.tasks.jobs.serve.ticket import AnswerPart, Finish, Ticket
from radlads.tasks.jobs.serve.writer import Writer

_PIECE = 1024
"""Tokens of prompts that are read between two steps."""
_NO_MEMORY = "there is not enough memory for this request; send a shorter one, or fewer at once"
_NO_NUMBERS = "the model's scores are not numbers here, so there is no next token"
_ENDS = "the server is shutting down"
_FAILED = "the server failed at work; its log says why"


class _Row:
    """One request at work."""

    def __init__(self, ticket: Ticket, model: RadladsForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
        self.ticket = ticket
        self.draw = TokenDraw(ticket.drawing, model.device)
        self.writer = Writer(tokenizer, ticket.stops, ticket.ids if ticket.continues else ())
        self.cache: RadladsCache | None = RadladsCache(model.config)
        self.read = self.made = self.token = 0
        self.ended = False

    def give(self, token: int, ends: Sequence[int]) -> None:
        """Hand on what a new token says, and note whether the answer ends with it."""
        self.token, self.made = token, self.made + 1
        text = "" if token in ends else self.writer.add(token)
        finish: Finish | None = None
        if token in ends or self.writer.stopped:
            finish = "stop"
        elif self.made == self.ticket.drawing.max_new_tokens:
            finish = "length"
        if finish is not None:
            text += self.writer.end()
            finish = "stop" if self.writer.stopped else finish
        self.ended = finish is not None  # before the client knows, who may ask again at once
        if text or finish is not None:
            self.ticket.tell(AnswerPart(text, self.made, finish))


class Worker:
    """Answers tickets until it is stopped."""

    def __init__(
        self,
        model: RadladsForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        limits: ServingLimits,
        on_failure: Callable[[], None],
    ) -> None:
        """on_failure: called from its thread where it cannot go on."""
        self._model, self._tokenizer, self._limits, self._on_failure = model, tokenizer, limits, on_failure
        ends = model.generation_config.eos_token_id
        self._ends: list[int] = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self._states = RowStates(model)
        self._rows: list[_Row] = []  # as in the states
        self._reading: deque[_Row] = deque()
        self._read: list[_Row] = []
        """Rows whose prompts were read, and that join the batch before its next step."""
        self._waiting: deque[Ticket] = deque()
        self._change, self._stopping, self.failed = threading.Condition(), False, False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Let a ticket wait its turn. Raises ApiError where too many wait already."""
        with self._change:
            if self._stopping:
                raise ApiError(503, _FAILED if self.failed else _ENDS)
            self._waiting = deque(one for one in self._waiting if not one.is_cancelled)
            free = max(0, self._limits.max_batch - self._num_running())
            if len(self._waiting) >= self._limits.max_waiting + free:
                said = f"{self._limits.max_waiting:,} requests wait already; try again later"
                raise ApiError(429, said, code="rate_limit_exceeded")
            self._waiting.append(ticket)
            self._change.notify()

    def wake(self) -> None:
        """Let it see that a ticket was cancelled."""
        with self._change:
            self._change.notify()

    def stop(self) -> None:
        """End all answers and the thread, soon; may be called by a signal's handler."""
        with self._change:  # re-entrant: the handler may have interrupted this thread in `submit`
            self._stopping = True
            self._change.notify()

    def join(self) -> None:
        """Wait for the end of the thread."""
        self._thread.join()

    def numbers(self) -> dict[str, int]:
        """Requests in the batch or being read, and waiting ones."""
        return {"running": self._num_running(), "waiting": len(self._waiting)}

    def _num_running(self) -> int:
        return sum(not row.ended for row in self._rows) + len(self._reading) + len(self._read)

    @torch.no_grad()
    def _run(self) -> None:
        completed = False
        try:
            while self._has_work():
                self._forget_cancelled()
                self._read_prompts()
                self._step()
            completed = True
        finally:
            with self._change:
                self._stopping, self.failed = True, not completed
            self._fail([*self._rows, *self._reading, *self._read], ApiError(503, _ENDS if completed else _FAILED))
            for ticket in self._waiting:
                ticket.tell(ApiError(503, _ENDS if completed else _FAILED))
            if not completed:
                self._on_failure()

    def _has_work(self) -> bool:
        """Waits for it. False: the thread is to end."""
        with self._change:
            while not (self._stopping or self._rows or self._reading or self._waiting):
                self._change.wait()
            return not self._stopping

    def _forget_cancelled(self) -> None:
        for row in self._rows:
            row.ended |= row.ticket.is_cancelled
        self._keep_running()
        self._reading = deque(row for row in self._reading if not row.ticket.is_cancelled)

    def _keep_running(self) -> None:
        rows = [number for number, row in enumerate(self._rows) if not row.ended]
        self._states.keep(rows)
        self._rows = [self._rows[number] for number in rows]

    def _admit(self) -> bool:
        """Whether there is a prompt to read."""
        if self._reading:
            return True
        with self._change:
            while self._waiting and self._num_running() < self._limits.max_batch:
                ticket = self._waiting.popleft()
                if not ticket.is_cancelled:
                    self._reading.append(_Row(ticket, self._model, self._tokenizer))
        return bool(self._reading)

    def _read_prompts(self) -> None:
        left = _PIECE
        while left > 0 and self._admit():
            row = self._reading[0]
            piece = row.ticket.ids[row.read : row.read + self._piece(row, left)]
            is_last = row.read + len(piece) == len(row.ticket.ids)
            try:
                logits_1V = self._states.read(self._cache(row), piece)
                tokens = choose_tokens(logits_1V, [row.draw]) if is_last else []
            except torch.OutOfMemoryError:
                self._reading.popleft()
                self._fail([row], ApiError(503, _NO_MEMORY))
                continue
            left, row.read = left - len(piece), row.read + len(piece)
            if tokens:
                self._reading.popleft()
                self._give(row, tokens[0])
                self._read += [] if row.ended else [row]
        self._join()

    def _piece(self, row: _Row, left: int) -> int:
        return min(left, prompt_piece(self._model.config, 1, len(row.ticket.ids)))

    def _cache(self, row: _Row) -> RadladsCache:
        assert row.cache is not None
        return row.cache

    def _join(self) -> None:
        """What was read into the batch; its own caches are not needed any more."""
        try:
            self._states.add([self._cache(row) for row in self._read], [row.read for row in self._read])
            self._rows += self._read
        except torch.OutOfMemoryError:
            self._fail(self._read, ApiError(503, _NO_MEMORY))
        for row in self._read:
            row.cache = None
        self._read = []

    def _step(self) -> None:
        if not self._rows:
            return
        try:
            logits_BV: Tensor = self._states.advance([row.token for row in self._rows])
            tokens = choose_tokens(logits_BV, [row.draw for row in self._rows])
        except torch.OutOfMemoryError:  # a part of the layers may have read the tokens already
            self._fail(self._rows, ApiError(503, _NO_MEMORY))
        else:
            for row, token in zip(self._rows, tokens, strict=True):
                self._give(row, token)
        self._keep_running()

    def _give(self, row: _Row, token: int | None) -> None:
        if token is None:
            self._fail([row], ApiError(500, _NO_NUMBERS))
        else:
            row.give(token, self._ends)

    def _fail(self, rows: Any, error: ApiError) -> None:
        for row in rows:
            row.ended = True
            row.ticket.tell(error)
