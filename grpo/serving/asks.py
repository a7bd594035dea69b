"""The types that pass between the HTTP side and the decoding thread: requests, and their new tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from grpo.generation.rows import Row
from grpo.generation.sampling import Sampling
from grpo.serving.refusals import Refusal
from grpo.types import FinishReason


@dataclass(frozen=True, slots=True)
class Ask:
    """A request for `n` completions of a prompt, with the adapter `model` (a name that `Models.find` returns).

    The draws of completion i depend only on (`seed`, i, position), as in `grpo.generation.generator.Request`: the
    trainer's generator draws the same tokens. With `gradually`, tokens are reported as they come; otherwise all tokens
    of a completion are reported at its end. `session` is the id of the request's session, or None.
    """

    model: str
    prompt_ids: Sequence[int]
    sampling: Sampling
    n: int
    seed: int
    logprobs: bool
    gradually: bool = False
    session: str | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """New tokens of completion `index`, and their logprobs if requested.

    logprobs are fp32, in nats, at the sampling temperature (at 1 for greedy sampling). `ended` is the reason why the
    completion ended with the last of these tokens, or None.
    """

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: FinishReason | None = None


Told = Sequence[Piece] | Refusal
"""New tokens, or the reason why there will be no more."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A request in progress. `tell` is called in the decoding thread. `rows` maps each completion that is decoding to
    the number of its tokens that have been reported; `told` is the time (`time.monotonic`) of the last report."""

    ask: Ask
    tell: Callable[[Told], object]
    arrived: float = field(default_factory=time.monotonic)
    rows: dict[Row, int] = field(default_factory=dict)
    order: list[Row] = field(default_factory=list)
    told: float = 0.0
    over: bool = False


class Answerer(Protocol):
    """Answers requests in its own thread. Its methods may be called from any thread."""

    @property
    def ended(self) -> bool:
        """Whether decoding has ended: all requests are refused."""
        ...

    def submit(self, ask: Ask, tell: Callable[[Told], object]) -> Ticket:
        """Queue a request. `tell` is called with new tokens until every completion has ended, or with a Refusal, which
        is always the last call. The calls come from the decoding thread, or from the caller's thread for a refusal;
        `tell` must return immediately."""
        ...

    def cancel(self, ticket: Ticket) -> None:
        """Stop answering a request. Does nothing if the request is over."""
        ...
