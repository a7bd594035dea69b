"""What flows between the two sides: requests that the decoding thread is given, and what it tells about them."""

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
    """`n` completions of a prompt by the model with the adapter `model` (a name that `Models.find` gives).

    Completion i draws by (`seed`, i, position) alone, as `Request` says: the trainer's generator gives the same. With
    `gradually` tokens are told as they come, or else all of a completion's at its end. `session` is the id of the
    session that it belongs to, if it belongs to one.
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
    """New tokens of completion `index`, with as many logprobs, where they were asked for.

    logprobs are fp32, in nats, at the sampling temperature (of greedy choices at 1). `ended` is why it ended with the
    last of them, or None.
    """

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: FinishReason | None = None


Told = Sequence[Piece] | Refusal
"""New tokens, or why there will be none."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A request under way. `tell` is called in the decoding thread. `rows` are the completions that decode, with how
    many of their tokens have been told; `told` is the moment (`time.monotonic`) of that."""

    ask: Ask
    tell: Callable[[Told], object]
    arrived: float = field(default_factory=time.monotonic)
    rows: dict[Row, int] = field(default_factory=dict)
    order: list[Row] = field(default_factory=list)
    told: float = 0.0
    over: bool = False


class Answerer(Protocol):
    """Answers requests, in a thread of its own. Its methods may be called from any thread."""

    @property
    def ended(self) -> bool:
        """Whether nothing is decoded any more: all requests are refused."""
        ...

    def submit(self, ask: Ask, tell: Callable[[Told], object]) -> Ticket:
        """Have a request answered. `tell` is called in the decoding thread, or in this one for a refusal, and returns
        at once: with new tokens, until every completion has ended, or with a Refusal, which is the last that it is
        told."""
        ...

    def cancel(self, ticket: Ticket) -> None:
        """Answer a request no longer; nothing if it is over."""
        ...
