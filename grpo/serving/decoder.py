"""The thread that decodes. It alone touches the model, the generator and MLX."""

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
PATIENCE = 1.0
"""Seconds after which requests for another adapter keep those for the present one from entering."""

PIECES = 500
"""Times a second that new tokens are told, of all streams together: each takes a processor about 0.2 ms. A stream that
is alone is told each token."""


class DecodingLoop:
    """Answers requests in turns of one adapter each; within a turn rows enter while others decode.

    `submit`, `cancel` and `close` may be called from any thread; `run` belongs to the thread that made the generator.
    """

    def __init__(
        self, generator: Generator, shelf: Shelf, patience: float = PATIENCE, kept_bytes: int = KEPT_BYTES
    ) -> None:
        """`kept_bytes`: of keys and values of what sessions were answered, at most."""
        self._generator, self._shelf, self._patience = generator, shelf, patience
        self._inbox: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._waiting: dict[str, deque[Ticket]] = {}
        self._live: dict[Row, Ticket] = {}
        self._recall = Recall(kept_bytes)
        self._engine: Engine | None = None
        self._closed = False
        self.ended = False
        """Whether nothing is decoded any more: all requests are refused."""
        self._entered = 0.0  # the moment at which the last request entered

    def submit(self, ask: Ask, tell: Callable[[Told], object]) -> Ticket:
        """Have a request answered. `tell` is called in the decoding thread, and must return at once."""
        ticket = Ticket(ask, tell)
        self._inbox.put(lambda: self._enqueue(ticket))
        if self.ended:  # nobody may look into the inbox any more
            tell(ENDED)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Answer a request no longer; nothing if it is over."""
        self._inbox.put(lambda: self._drop(ticket))

    def close(self) -> None:
        """Let `run` return. Requests that are not over are refused."""
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
            for ticket in [*self._live.values(), *(one for queue in self._waiting.values() for one in queue)]:
                self._refuse(ticket, ENDED)

    def _take_in(self, wait: bool = False) -> None:
        """Do what other threads have asked for; `wait` for something if there is nothing."""
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
        """One turn of an adapter: until nothing of it decodes."""
        try:
            with self._shelf.use(name), self._generator.open() as self._engine:
                self._decode(self._engine, name)
            self._recall.collect()
        except Exception as error:  # whatever the model's own code raises, a file that is gone, or too little memory
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
        """Let waiting requests enter, as far as there are slots, and until others have waited long enough."""
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
        """Whether a request has entered in the turn that began then: each turn has one at least."""
        return self._entered >= began

    def _others_wait(self, name: str, began: float) -> bool:
        late = time.monotonic() - self._patience
        return began < late and any(queue[0].arrived < late for other, queue in self._waiting.items() if other != name)

    def _tell(self, events: Events) -> None:
        """Tell what the rows have come to."""
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
        """A row's tokens that have not been told; None where it is not time to."""
        told, ended = ticket.rows[row], row.finish_reason
        if ended is None and (not ticket.ask.gradually or told == len(row.token_ids)):
            return None
        ticket.rows[row] = len(row.token_ids)
        if ended is not None:
            del ticket.rows[row], self._live[row]
            self._recall.expect(ticket.ask, row)
        index = ticket.order.index(row)
        return Piece(index, tuple(row.token_ids[told:]), tuple(row.logprobs[told:]), ended)

    def _refuse(self, ticket: Ticket, refusal: Refusal) -> None:
        if not ticket.over:
            ticket.over = True
            ticket.rows.clear()
            ticket.tell(refusal)

    def _failed(self, name: str, error: Exception) -> None:
        """Refuse what was under way; what waits for this adapter, too, if nothing was."""
        refusal = _refusal_of(error)
        self._recall.clear()  # it may have been too little memory, and an unfinished turn leaves nothing
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
        said = "out of memory: serve with fewer --slots or a smaller --max-length, or ask for fewer tokens"
        return Refusal(503, said, "out_of_memory")
    return Refusal(500, f"decoding failed: {type(error).__name__} (the server's log has the rest)", "decoding_failed")


class DecodingThread:
    """A thread that makes a decoder and runs it, as long as the `with` block lasts.

    MLX lets no other thread evaluate what was begun there, so the model is loaded in this one.
    """

    def __init__(self, make: Callable[[], DecodingLoop]) -> None:
        self._make = make
        self._made: Future[DecodingLoop] = Future()
        self._thread = Thread(target=self._run, name="decoding", daemon=True)

    def __enter__(self) -> DecodingLoop:
        """The decoder, when it is made. Raises what making it raised."""
        self._thread.start()
        if self._made.exception() is not None:  # the process may end now, which MLX must not see in its thread
            self._thread.join()
        return self._made.result()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._made.result().close()
        self._thread.join()

    def _run(self) -> None:
        try:
            decoder = self._make()
        except BaseException as error:  # raised again where it is waited for
            self._made.set_exception(error)
        else:
            self._made.set_result(decoder)
            decoder.run()
            del decoder
        mx.clear_streams()  # one that MLX still finds when the process ends may abort it
