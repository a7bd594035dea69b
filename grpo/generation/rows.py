"""What is asked of the engine, and the rows that are sampled for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import mlx.core as mx

from grpo.generation.sampling import Sampling
from grpo.generation.stopping import Stopping
from grpo.types import FinishReason

State = Literal["queued", "decoding", "waiting", "parked", "done", "released"]


@dataclass(frozen=True, slots=True)
class Submission:
    """A prompt (at least one token), how many rows of it are sampled, and how.

    What is drawn for row i at position t depends on (`seed`, `path`, i, t) alone. Positions count the tokens after the
    prompt from 0, sampled or not. Without `logprobs` none are computed. With `keep` a row that has ended waits to be
    extended, until it is released; without, it is freed at its end. `sampling.max_tokens` bounds all that comes after
    the prompt.
    """

    prompt_ids: Sequence[int]
    sampling: Sampling
    seed: int
    path: tuple[int, ...] = ()
    n: int = 1
    logprobs: bool = True
    keep: bool = False


@dataclass(slots=True, eq=False)
class SharedPrompt:
    """A prompt that `n` rows share: how many of them may still decode, and how many have not begun."""

    ids: Sequence[int]
    n: int = 1
    left: int = field(init=False)
    unstarted: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.unstarted = self.n


@dataclass(frozen=True, slots=True)
class Kept:
    """The keys and values of a row that is out of its slot.

    `fed` counts the tokens that they are of: the prompt's last, which decoding feeds first, and those after it. What
    `state` is, the way of decoding knows.
    """

    fed: int
    state: Any
    nbytes: int


@dataclass(slots=True, eq=False)
class Line:
    """Tokens after a prompt, and what was kept of their keys and values: all that a session knows of a row."""

    prompt: SharedPrompt
    token_ids: list[int] = field(default_factory=list)
    kept: Kept | None = None

    @property
    def last(self) -> int:
        """The token that is fed next."""
        return self.token_ids[-1] if self.token_ids else self.prompt.ids[-1]

    @property
    def pending(self) -> list[int]:
        """Tokens before the one that is fed next, of which there are no keys and values outside the prompt's."""
        own = [self.prompt.ids[-1], *self.token_ids]
        return own[self.kept.fed if self.kept else 0 : -1]


@dataclass(slots=True, eq=False, kw_only=True)
class Row(Line):
    """One completion in the making, and the handle by which it is extended, parked and released.

    `token_ids` are all tokens after the prompt; `logprobs` and `sampler_logprobs` have an entry for each of them where
    they were asked for, 0 for those that were not sampled. `injected` are the ranges of those. `finish_reason` is why
    the row has ended, None while it goes on. The rest is for the engine alone: `launched` counts the tokens whose
    steps have begun.
    """

    key: mx.array
    stopping: Stopping
    wants_logprobs: bool = True
    keep: bool = False
    state: State = "queued"
    logprobs: list[float] = field(default_factory=list)
    sampler_logprobs: list[float] = field(default_factory=list)
    injected: list[range] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    launched: int = 0
    longest: int = field(init=False)
    wants_sampler_logprobs: bool = field(init=False)

    def __post_init__(self) -> None:
        self.longest = self.stopping.sampling.max_tokens
        self.wants_sampler_logprobs = self.wants_logprobs and self.stopping.sampling.reshaped

    @property
    def room(self) -> int:
        """How many tokens `extend` may add, so that one can still be sampled."""
        return max(0, self.longest - len(self.token_ids) - 1)

    @property
    def trained(self) -> list[bool]:
        """Of each token, whether it was sampled."""
        sampled = [True] * len(self.token_ids)
        for span in self.injected:
            sampled[span.start : span.stop] = [False] * len(span)
        return sampled

    def inject(self, token_ids: Sequence[int]) -> None:
        """Append tokens that were not sampled, and begin a new turn."""
        if not token_ids:
            return
        begin, end = len(self.token_ids), len(self.token_ids) + len(token_ids)
        self.token_ids.extend(token_ids)
        self.logprobs.extend([0.0] * len(token_ids) if self.wants_logprobs else ())
        self.sampler_logprobs.extend([0.0] * len(token_ids) if self.wants_sampler_logprobs else ())
        self.injected.append(range(begin, end))
        self.stopping = self.stopping.from_token(end)
