"""The engine: continuous batching in which rows can be submitted, extended, parked and released at any step."""

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
from grpo.generation.lanes import Lanes
from grpo.generation.parking import Parking
from grpo.generation.rows import Row, SharedPrompt, Submission
from grpo.generation.sampling import Sampling
from grpo.generation.speculation import Speculation
from grpo.generation.stopping import Stopping

SMALL_PRODUCT = 64 * 2**20
"""On a CPU, a step whose largest matrix product has fewer multiplications than this is faster with one BLAS thread."""


class Engine:
    """Decodes rows one step at a time: submit prompts, call `step` while `busy`, and read the rows.

    At most `slots` rows decode simultaneously; the others wait in a queue. With `keep=True`, a row can have several
    turns: when a turn ends, the row waits until it is extended or released.

    A row's draws depend only on its seed, path, sample and position: not on the slots, the other rows, or the time at
    which it was submitted, parked or extended.

    Rows outside their slots keep their keys and values, up to `kept_bytes` in total (None: no limit). Above the limit,
    the keys and values of the row that has waited longest are dropped; they are computed again when it continues.

    The model may be updated while no row is decoding. Rows that have begun, and rows that share a prompt with them, may
    still use keys and values of the old weights.
    """

    def __init__(
        self,
        find_decoding: Callable[[], Decoding],
        rules: Callable[[Sampling], Stopping],
        slots: int,
        stream: mx.Stream,
        largest_product: int,
        kept_bytes: int | None = None,
        speculation: Speculation | None = None,
        lanes: int = 1,
    ) -> None:
        """`rules` returns the stop rules of a `Sampling`; `largest_product` is the number of elements of the model's
        largest weight. `lanes` is the number of threads that decode, each with its share of the slots.

        `find_decoding` returns the model's current `Decoding`. It is called when rows enter and all slots are free.
        """
        self._rules, self._stream, self._largest_product = rules, stream, largest_product
        self._run: Run | Lanes = (
            Lanes(lanes, find_decoding, slots, kept_bytes, speculation)
            if lanes > 1
            else Run(find_decoding, slots, Parking(kept_bytes), speculation)
        )
        self._events: deque[Events] = deque()

    @property
    def busy(self) -> bool:
        """Whether a row is decoding or queued, or some events have not been returned yet. Waiting rows do not count."""
        return self._run.busy or bool(self._events)

    @property
    def load(self) -> int:
        """The number of rows that are decoding or queued. Waiting and parked rows do not count."""
        return self._run.load

    def submit(self, submission: Submission) -> tuple[Row, ...]:
        """Queue `n` rows of a prompt and return them in the order of their samples: the handles for the other methods.

        Raises ValueError if the prompt is empty, if `max_tokens` is below 1, or if the number of openings is not `n`.
        """
        _check(submission)
        stopping = self._rules(submission.sampling)
        if submission.beside is None:
            prompt = SharedPrompt(submission.prompt_ids, submission.n, submission.known)
        else:
            prompt = submission.beside.prompt
            prompt.join(submission.n)
        samples = range(submission.first, submission.first + submission.n)
        keys = [derive_key(submission.seed, "row", *submission.path, sample) for sample in samples]
        wants, keep = submission.logprobs, submission.keep
        rows = tuple(Row(prompt, key=key, stopping=stopping, wants_logprobs=wants, keep=keep) for key in keys)
        for row, opening in zip(rows, submission.openings or [()] * len(rows), strict=True):
            row.open([int(token) for token in opening])
        for row in rows:
            row.remember = submission.remember
            self._run.begin(row)
        return rows

    def step(self) -> Events:
        """Decode one or more tokens for each row in a slot. The events are empty if the engine is not `busy`."""
        if self._events:
            return self._events.popleft()
        with self._at_work():
            return self._run.step()

    def extend(self, row: Row, token_ids: Sequence[int], sampling: Sampling | None = None) -> None:
        """Append tokens that were not sampled, and continue sampling after them in a new turn.

        The model computes only these tokens. A parked row may continue without new tokens: then it resumes its turn.
        The new turn uses the sampling of the previous turn, or else `sampling`, which may change only the rules for
        turns.

        Raises ValueError if the row is queued or decoding, has ended for good, or has no `room` for the tokens; or if
        `sampling` changes the limit on all tokens, or whether it reshapes the distribution.
        """
        if row.state in ("queued", "decoding"):
            raise ValueError(
                "this row is still queued or decoding, so it cannot be extended: wait until it ends, or park it"
            )
        _check_alive(row, "extended")
        if row.state == "waiting" and not token_ids:
            raise ValueError("this row has ended its turn: extend it by at least one token")
        if len(token_ids) > row.room:
            raise ValueError(
                f"this row has {len(row.token_ids)} tokens after its prompt, its limit is {row.longest}, and one token "
                f"must still be sampled: {len(token_ids)} more tokens do not fit, at most {row.room} do (row.room)"
            )
        if sampling is not None and token_ids:
            self._resample(row, sampling)
        row.inject([int(token) for token in token_ids])
        row.finish_reason = None
        self._run.resume(row)

    def _resample(self, row: Row, sampling: Sampling) -> None:
        """Use another sampling for the row's next turn. Raises ValueError if it changes more than a turn's rules."""
        if sampling.max_tokens != row.stopping.sampling.max_tokens:
            raise ValueError("max_tokens limits all turns of a row together, so it cannot change between turns")
        if row.wants_logprobs and sampling.reshaped is not row.wants_sampler_logprobs:
            raise ValueError("all turns of a row must reshape the distribution (filters or a penalty), or none of them")
        row.stopping = self._rules(sampling).after_opening(row.opening)

    def park(self, row: Row) -> None:
        """Take a row out of its slot or the queue until it is extended. Does nothing if the row is already waiting.

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
        """Stop a row in any state, and free its memory. Its tokens stay readable."""
        if row.state in ("done", "released"):
            row.state = "released"
            return
        with self._at_work():
            self._run.release(row)

    def close(self) -> None:
        """Release all rows. Their tokens stay readable."""
        lockstep = self._run.lockstep
        with self._at_work():
            self._run.close()
        if lockstep:  # an unread last step may still be running, and would mix with the processes' next exchange
            mx.synchronize(self._stream)

    def abandon(self) -> None:
        """Release all rows after an error, without reading the steps in flight, so that the error holds no buffers."""
        self._events.clear()
        with self._at_work():
            self._run.abandon()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Release all rows, whether or not the block raised an error."""
        if error is None:
            self.close()
        else:
            self.abandon()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Use the engine's own stream, and one BLAS thread if the products are small."""
        small = isinstance(self._run, Lanes) or self._run.seats.count * self._largest_product < SMALL_PRODUCT
        with mx.stream(self._stream), blas.one_thread(small):
            yield


def _check(submission: Submission) -> None:
    if not submission.prompt_ids:
        raise ValueError("a prompt needs at least one token")
    if submission.openings and len(submission.openings) != submission.n:
        raise ValueError(f"there are {len(submission.openings)} openings for {submission.n} rows: give each row one")
    if submission.sampling.max_tokens < 1:
        raise ValueError(f"max_tokens is {submission.sampling.max_tokens}: a row needs room for at least one token")


def _check_alive(row: Row, what: str) -> None:
    if row.state == "released":
        raise ValueError(f"this row was released, so it cannot be {what}")
    if row.state == "done" and not row.keep:
        raise ValueError(f"this row has ended and was not kept, so it cannot be {what}: submit it with keep=True")
    if row.state == "done":
        raise ValueError(f"this row has reached its limit of {row.longest} tokens, so it cannot be {what}")
