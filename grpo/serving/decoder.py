"""The decoding thread: the only thread that uses the model, the generator and MLX."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from types import TracebackType

import mlx.core as mx

from grpo.backend.device import out_of_memory
from grpo.backend.hub import one_line
from grpo.errors import UserError
from grpo.generation.engine import Engine
from grpo.generation.events import Events
from grpo.generation.generator import Generator
from grpo.generation.rows import Row, Submission
from grpo.serving.asks import Ask, Piece, Ticket, Told
from grpo.serving.recall import Recall
from grpo.serving.refusals import ENDED, Refusal
from grpo.serving.shelf import Shelf

log = logging.getLogger("grpo")

KEPT_BYTES = 2**30
"""Default limit on the bytes of keys and values that sessions keep."""
PATIENCE = 1.0
"""After requests for another adapter have waited this many seconds, no more requests for the current one may enter."""

PIECES = 500
"""Limit on reports of new tokens per second, over all streams: each takes about 0.2 ms of a core. A single stream gets
a report for each token."""


class DecodingLoop:
    """Answers requests in turns, one adapter per turn. Within a turn, rows enter while other rows decode.

    `submit`, `cancel` and `close` may be called from any thread; `run` only in the thread that created the generator.
    """

    def __init__(
        self, generator: Generator, shelf: Shelf, patience: float = PATIENCE, kept_bytes: int = KEPT_BYTES
    ) -> None:
        """`kept_bytes`: limit on the keys and values that are kept for sessions."""
        self._generator, self._shelf, self._patience = generator, shelf, patience
        self._inbox: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._waiting: dict[str, deque[Ticket]] = {}
        self._live: dict[Row, Ticket] = {}
        self._recall = Recall(kept_bytes)
        self._engine: Engine | None = None
        self._closed = False
        self.ended = False
        """Whether decoding has ended: all requests are refused."""
        self._entered = 0.0  # the time at which the last request entered

    def submit(self, ask: Ask, tell: Callable[[Told], object]) -> Ticket:
        """Queue a request. See `Answerer.submit`."""
        ticket = Ticket(ask, tell)
        self._inbox.put(lambda: self._enqueue(ticket))
        if self.ended:  # `run` may not read the inbox any more
            tell(ENDED)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Stop answering a request. Does nothing if the request is over."""
        self._inbox.put(lambda: self._drop(ticket))

    def close(self) -> None:
        """Let `run` return. Requests in progress are refused."""
        self._inbox.put(self._end)

    def run(self) -> None:
        """Answer requests until `close`."""
        try:
            while not self._closed:
                self._take_in(wait=not self._waiting)
                if self._waiting and not self._closed:
                    self._serve(min(self._waiting, key=lambda name: self._waiting[name][0].arrived))
        finally:
            self.ended = True
            self._take_in()
            for ticket in [*self._live.values(), *(ticket for queue in self._waiting.values() for ticket in queue)]:
                self._refuse(ticket, ENDED)

    def _take_in(self, wait: bool = False) -> None:
        """Run the calls that other threads have put into the inbox. With `wait`, block until there is one."""
        try:
            while True:
                self._inbox.get(block=wait)()
                wait = False
        except Empty:
            return

    def _enqueue(self, ticket: Ticket) -> None:
        if not ticket.over:
            self._waiting.setdefault(ticket.ask.model, deque()).append(ticket)

    def _drop(self, ticket: Ticket) -> None:
        ticket.over = True
        queue = self._waiting.get(ticket.ask.model, deque())
        if ticket in queue:
            queue.remove(ticket)
            self._tidy(ticket.ask.model)
        for row in ticket.rows:
            self._live.pop(row, None)
            if self._engine is not None:
                self._engine.release(row)
        ticket.rows.clear()

    def _end(self) -> None:
        self._closed = True

    def _tidy(self, name: str) -> None:
        if not self._waiting[name]:
            del self._waiting[name]

    def _serve(self, name: str) -> None:
        """One turn of an adapter: it ends when no request for the adapter is decoding."""
        try:
            with self._shelf.use(name), self._generator.open() as self._engine:
                self._decode(self._engine, name)
            self._recall.collect()
        except Exception as error:  # from the model's own code, a missing file, or too little memory
            self._failed(name, error)
        finally:
            self._engine = None

    def _decode(self, engine: Engine, name: str) -> None:
        began = time.monotonic()
        while not self._closed:
            self._admit(engine, name, began)
            if not engine.busy:
                return
            self._tell(engine.step())
            self._recall.collect()
            self._take_in()

    def _admit(self, engine: Engine, name: str, began: float) -> None:
        """Let waiting requests enter while there are slots, unless requests for other adapters have waited too long."""
        while queue := self._waiting.get(name):
            ask = queue[0].ask
            full = self._live and len(self._live) + ask.n > self._generator.slots
            if full or (self._served_since(began) and self._others_wait(name, began)):
                return
            ticket = queue.popleft()
            self._tidy(name)
            submission = Submission(
                ask.prompt_ids, ask.sampling, ask.seed, n=ask.n, logprobs=ask.logprobs,
                known=self._recall.find(ask), remember=ask.session is not None,
            )  # fmt: skip
            try:
                rows = engine.submit(submission)
            except ValueError as error:
                self._refuse(ticket, Refusal(400, one_line(error)))
                continue
            ticket.order, ticket.rows = list(rows), dict.fromkeys(rows, 0)
            self._live |= dict.fromkeys(rows, ticket)
            self._entered = time.monotonic()

    def _served_since(self, began: float) -> bool:
        """Whether a request has entered since the turn began: each turn serves at least one request."""
        return self._entered >= began

    def _others_wait(self, name: str, began: float) -> bool:
        late = time.monotonic() - self._patience
        return began < late and any(queue[0].arrived < late for other, queue in self._waiting.items() if other != name)

    def _tell(self, events: Events) -> None:
        """Report new tokens of streams, and completions that have ended."""
        rows = [row for row in events.rows if row in self._live]
        ending = {self._live[row]: None for row in rows if row in events.ended}
        streams = {self._live[row]: None for row in rows if self._live[row].ask.gradually}
        now = time.monotonic()
        late = now - (len(streams) - 1) / PIECES
        for ticket in ending | {ticket: None for ticket in streams if ticket.told <= late}:
            ticket.told = now
            pieces = [piece for row in list(ticket.rows) if (piece := self._piece(ticket, row)) is not None]
            if not ticket.rows:
                ticket.over = True
            if pieces:
                ticket.tell(pieces)

    def _piece(self, ticket: Ticket, row: Row) -> Piece | None:
        """A row's unreported tokens; None if there is nothing to report yet."""
        reported, ended = ticket.rows[row], row.finish_reason
        if ended is None and (not ticket.ask.gradually or reported == len(row.token_ids)):
            return None
        ticket.rows[row] = len(row.token_ids)
        if ended is not None:
            del ticket.rows[row], self._live[row]
            self._recall.expect(ticket.ask, row)
        index = ticket.order.index(row)
        return Piece(index, tuple(row.token_ids[reported:]), tuple(row.logprobs[reported:]), ended)

    def _refuse(self, ticket: Ticket, refusal: Refusal) -> None:
        if not ticket.over:
            ticket.over = True
            ticket.rows.clear()
            ticket.tell(refusal)

    def _failed(self, name: str, error: Exception) -> None:
        """Refuse the requests that were decoding or, if there were none, those that wait for this adapter."""
        refusal = _refusal_of(error)
        self._recall.clear()  # frees memory, which may have been the problem; rows of a failed turn leave nothing
        if refusal.status == 500:
            log.exception("decoding failed")
        tickets = list(dict.fromkeys(self._live.values())) or list(self._waiting.pop(name, ()))
        self._live.clear()
        for ticket in tickets:
            self._refuse(ticket, refusal)


def _refusal_of(error: Exception) -> Refusal:
    if isinstance(error, UserError):
        return Refusal(503, str(error), "model_not_loaded")
    if isinstance(error, RuntimeError) and out_of_memory(error):
        what = "out of memory: serve with fewer --slots or a smaller --max-length, or request fewer tokens"
        return Refusal(503, what, "out_of_memory")
    return Refusal(500, f"decoding failed: {type(error).__name__} (see the server's log)", "decoding_failed")


class DecodingThread:
    """A thread that creates a decoder and runs it until the `with` block ends.

    The model is loaded in this thread, because MLX does not let other threads evaluate a thread's arrays.
    """

    def __init__(self, make: Callable[[], DecodingLoop]) -> None:
        self._make = make
        self._made: Future[DecodingLoop] = Future()
        self._thread = Thread(target=self._run, name="decoding", daemon=True)

    def __enter__(self) -> DecodingLoop:
        """Wait for the decoder and return it. Raises the exception that creating it raised."""
        self._thread.start()
        if self._made.exception() is not None:  # the process may end now, and MLX must not be running in a thread then
            self._thread.join()
        return self._made.result()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._made.result().close()
        self._thread.join()

    def _run(self) -> None:
        try:
            decoder = self._make()
        except BaseException as error:  # raised again in `__enter__`
            self._made.set_exception(error)
        else:
            self._made.set_result(decoder)
            decoder.run()
            del decoder
        mx.clear_streams()  # a stream that still exists when the process ends may abort it
