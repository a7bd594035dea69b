"""The open generator: rows are submitted, extended, parked and released while others decode."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx

from grpo.backend import blas
from grpo.backend.random import derive_key
from grpo.generation.batching import Run
from grpo.generation.decoding import Decoding
from grpo.generation.events import Events
from grpo.generation.parking import Parking
from grpo.generation.rows import Row, SharedPrompt, Submission
from grpo.generation.sampling import Sampling
from grpo.generation.stopping import Stopping

SMALL_PRODUCT = 64 * 2**20
"""Multiplications in a step's largest product, below which a second BLAS thread on a CPU costs more than it gives."""


class Engine:
    """Decodes whatever rows there are, one step at a time.

    What is sampled depends neither on the number of slots nor on the other rows, nor on when a row was submitted,
    parked or extended. The model may be updated while no row decodes; a row that waits meanwhile goes on from the keys
    and values of the former weights.

    `slots` rows decode at once at the most. Rows that are out of their slots keep at most `kept_bytes` of keys and
    values (None: no bound): the oldest are dropped first, and computed again when the row goes on.
    """

    def __init__(
        self,
        find_decoding: Callable[[], Decoding],
        rules: Callable[[Sampling], Stopping],
        slots: int,
        stream: mx.Stream,
        largest_product: int,
        kept_bytes: int | None = None,
    ) -> None:
        """`rules` says when rows of a sampling end; `largest_product` is the size of the model's largest layer."""
        self._rules, self._stream, self._largest_product = rules, stream, largest_product
        self._run = Run(find_decoding, slots, Parking(kept_bytes))
        self._events: deque[Events] = deque()

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return self._run.busy or bool(self._events)

    def submit(self, submission: Submission) -> tuple[Row, ...]:
        """Let a prompt's rows wait for slots. Returns a handle for each, by sample."""
        _check(submission)
        stopping, prompt = self._rules(submission.sampling), SharedPrompt(submission.prompt_ids, submission.n)
        keys = [derive_key(submission.seed, "row", *submission.path, sample) for sample in range(submission.n)]
        wants, keep = submission.logprobs, submission.keep
        rows = tuple(Row(prompt, key=key, stopping=stopping, wants_logprobs=wants, keep=keep) for key in keys)
        for row in rows:
            self._run.begin(row)
        return rows

    def step(self) -> Events:
        """Decode one more token for each row that has a slot. No events where `busy` is false."""
        if self._events:
            return self._events.popleft()
        with self._at_work():
            return self._run.step()

    def extend(self, row: Row, token_ids: Sequence[int]) -> None:
        """Append tokens that were not sampled, and let sampling go on after them.

        Only these tokens go through the model. A row that was parked while it decoded may go on without any. Raises
        ValueError if the row still decodes, or cannot go on.
        """
        if row.state in ("queued", "decoding"):
            raise ValueError("this row still decodes, so it cannot be extended: wait until it has ended, or park it")
        _check_alive(row, "extended")
        if row.state == "waiting" and not token_ids:
            raise ValueError("a row that has ended needs at least one token more to go on from")
        if len(token_ids) > row.room:
            raise ValueError(
                f"this row has {len(row.token_ids)} tokens after its prompt and may have {row.longest}, one of them "
                f"still to be sampled: {len(token_ids)} more do not fit, {row.room} would"
            )
        row.inject([int(token) for token in token_ids])
        row.finish_reason = None
        self._run.go_on(row)

    def park(self, row: Row) -> None:
        """Let a row give up its slot, or its place in the queue, until it is extended. A row that waits does already.

        Raises ValueError if the row has ended for good or was released.
        """
        if row.state == "decoding":
            with self._at_work():
                self._events.append(self._run.drain())
        if row.state in ("waiting", "parked"):
            return
        _check_alive(row, "parked")
        self._run.park(row)

    def release(self, row: Row) -> None:
        """Free what a row holds, whatever it does. To release a row that has nothing is allowed."""
        if row.state in ("done", "released"):
            row.state = "released"
            return
        with self._at_work():
            self._run.release(row)

    def close(self) -> None:
        """Release all rows. They have the tokens that they had."""
        with self._at_work():
            self._run.close()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """On the engine's own stream, with the threads that its products are worth."""
        small = self._run.seats.count * self._largest_product < SMALL_PRODUCT
        with mx.stream(self._stream), blas.one_thread(small):
            yield


def _check(submission: Submission) -> None:
    if not submission.prompt_ids:
        raise ValueError("a prompt needs at least one token")
    if submission.sampling.max_tokens < 1:
        raise ValueError(f"max_tokens is {submission.sampling.max_tokens}: a row needs room for at least one token")


def _check_alive(row: Row, what: str) -> None:
    if row.state == "released":
        raise ValueError(f"this row was released, so it cannot be {what}")
    if row.state == "done" and not row.keep:
        raise ValueError(f"this row has ended and was not kept, so it cannot be {what}: submit it with keep=True")
    if row.state == "done":
        raise ValueError(f"this row has ended with all its {row.longest} tokens, so it cannot be {what}")
