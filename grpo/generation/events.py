"""The events of one engine step: the new tokens, and the rows that ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import NamedTuple

from grpo.generation.rows import Row
from grpo.types import FinishReason


class Token(NamedTuple):
    """A row's next token. `finish_reason` is set if the row ended with this token."""

    row: Row
    token_id: int
    logprob: float | None
    sampler_logprob: float | None
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Events:
    """The new tokens of each slot's row, and the rows that `ended`, with the reason. An empty slot has None in `rows`.

    A row has one or more new tokens, and a logprob for each. The tokens are already appended to the rows. Iterating
    yields each `Token`, row by row.
    """

    rows: Sequence[Row | None] = ()
    token_ids: Sequence[Sequence[int]] = ()
    logprobs: Sequence[Sequence[float]] | None = None
    sampler_logprobs: Sequence[Sequence[float]] | None = None
    ended: Mapping[Row, FinishReason] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Token]:
        nothing: Iterable[None] = repeat(None)
        for slot, row in enumerate(self.rows):
            if row is None:
                continue
            logprobs = self.logprobs[slot] if self.logprobs and row.wants_logprobs else nothing
            filtered = self.sampler_logprobs[slot] if self.sampler_logprobs and row.wants_sampler_logprobs else nothing
            *before, _ = tokens = self.token_ids[slot]
            reasons = [*[None] * len(before), self.ended.get(row)]
            for token, logprob, sampler, reason in zip(tokens, logprobs, filtered, reasons, strict=False):
                yield Token(row, token, logprob, sampler, reason)
