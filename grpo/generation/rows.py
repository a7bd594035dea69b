"""Submissions to the engine, and the rows that it samples for them."""

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
    """A prompt of at least one token, and how to sample `n` rows for it.

    The draw of row i, counted from `first`, at position t depends only on (`seed`, `path`, i, t). Positions count all
    tokens after the prompt from 0, sampled or not, and `sampling.max_tokens` limits all of them. `logprobs`: whether
    logprobs are computed. With `keep`, a row that ends its turn waits until it is extended or released; otherwise it is
    freed.

    `openings` are, for each row, the tokens of its prompt after the shared `prompt_ids`; they may be empty, and limits
    do not count them. By default, all rows begin after `prompt_ids`. `beside` is a row with the same `prompt_ids`: the
    new rows share the keys and values of its prompt.

    `known` has keys and values from before; the part that matches the beginning of the prompt is reused. With
    `remember`, a row that has ended leaves its keys and values in `Row.computed`.
    """

    prompt_ids: Sequence[int]
    sampling: Sampling
    seed: int
    path: tuple[int, ...] = ()
    n: int = 1
    logprobs: bool = True
    keep: bool = False
    known: Computed | None = None
    remember: bool = False
    openings: Sequence[Sequence[int]] = ()
    beside: Row | None = None
    first: int = 0


@dataclass(frozen=True, slots=True)
class Computed:
    """Keys and values of all `token_ids`, outside the buffers, for a later prompt with the same beginning.

    They are valid only for the weights that computed them. The form of `state` depends on the type of session that made
    it, `by`. `cuts`: whether a part of `state` can be used; if not, a prompt must begin with all `token_ids`.
    """

    token_ids: Sequence[int]
    state: Any
    nbytes: int
    by: type
    cuts: bool

    def usable(self, prompt_ids: Sequence[int]) -> int:
        """The number of tokens of a prompt that need no prefill: at most all but the last."""
        shared = self.shared(prompt_ids[:-1])
        return shared if self.cuts or shared == len(self.token_ids) else 0

    def shared(self, token_ids: Sequence[int]) -> int:
        """The length of the common prefix."""
        pairs = zip(self.token_ids, token_ids, strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(self.token_ids), len(token_ids)))


@dataclass(slots=True, eq=False, weakref_slot=True)
class SharedPrompt:
    """A prompt that `n` rows share: `left` rows may still decode, and `unstarted` rows have not begun. `known` has keys
    and values that need not be computed again."""

    ids: Sequence[int]
    n: int = 1
    known: Computed | None = None
    left: int = field(init=False)
    unstarted: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = self.unstarted = self.n

    def join(self, n: int) -> None:
        """Let `n` more rows share the prompt."""
        self.n, self.left, self.unstarted = self.n + n, self.left + n, self.unstarted + n


@dataclass(frozen=True, slots=True)
class Kept:
    """The keys and values of a row outside its slot.

    They belong to `fed` tokens: the last token of the prompt, which decoding feeds first, and the tokens after it. The
    form of `state` depends on the session.
    """

    fed: int
    state: Any
    nbytes: int


@dataclass(slots=True, eq=False)
class Line:
    """The part of a row that a session sees: its prompt, the tokens after it, and the keys and values that it kept.

    The first `opening` tokens belong to the row's own prompt.
    """

    prompt: SharedPrompt
    token_ids: list[int] = field(default_factory=list)
    kept: Kept | None = None
    opening: int = 0

    @property
    def begun(self) -> bool:
        """Whether the row has tokens after its own prompt."""
        return len(self.token_ids) > self.opening

    @property
    def last(self) -> int:
        """The token to feed next."""
        return self.token_ids[-1] if self.token_ids else self.prompt.ids[-1]

    @property
    def pending(self) -> list[int]:
        """The tokens before `last` whose keys and values are neither in the prompt's nor in `kept`."""
        tokens = [self.prompt.ids[-1], *self.token_ids]
        return tokens[self.kept.fed if self.kept else 0 : -1]


@dataclass(slots=True, eq=False, kw_only=True, weakref_slot=True)
class Row(Line):
    """A completion in progress, and the handle to extend, park and release it.

    `token_ids` are all tokens after the prompt, at most `longest` including the opening. `logprobs` and
    `sampler_logprobs`, if requested, have one entry per token, 0 for tokens that were not sampled; `injected` has the
    ranges of these tokens. `finish_reason` is None until the row ends. With `remember`, `computed` is set at most one
    step after the end. The other fields are the engine's: `launched` counts the tokens whose steps have been launched,
    and `queued_at` is the time (`time.perf_counter`) at which the row was queued.
    """

    key: mx.array
    stopping: Stopping
    wants_logprobs: bool = True
    keep: bool = False
    remember: bool = False
    computed: Computed | None = None
    state: State = "queued"
    logprobs: list[float] = field(default_factory=list)
    sampler_logprobs: list[float] = field(default_factory=list)
    injected: list[range] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    launched: int = 0
    queued_at: float = 0.0
    longest: int = field(init=False)
    wants_sampler_logprobs: bool = field(init=False)

    def __post_init__(self) -> None:
        self.longest = self.stopping.sampling.max_tokens
        self.wants_sampler_logprobs = self.wants_logprobs and self.stopping.sampling.reshaped

    @property
    def room(self) -> int:
        """The largest number of tokens that `extend` can add, with room left to sample one token."""
        return max(0, self.longest - len(self.token_ids) - 1)

    @property
    def turn(self) -> list[int]:
        """The tokens sampled since the last injected tokens."""
        return self.token_ids[self.injected[-1].stop if self.injected else 0 :]

    @property
    def trained(self) -> list[bool]:
        """For each token, whether it was sampled."""
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

    def open(self, token_ids: Sequence[int]) -> None:
        """Add tokens to the row's own prompt, after the shared prompt. Call this before the row begins."""
        self.inject(token_ids)
        self.opening = len(token_ids)
        self.longest += self.opening
        self.stopping = self.stopping.after_opening(self.opening)
