"""The events of one engine step: new tokens, and rows that ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
    """One token for each row, by slot, and the rows that `ended`, with the reason. An empty slot has None in `rows`.

    The tokens are in the rows already. Iterating yields each `Token`.
    """

    rows: Sequence[Row | None] = ()
    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] | None = None
    sampler_logprobs: Sequence[float] | None = None
    ended: Mapping[Row, FinishReason] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Token]:
        for slot, row in enumerate(self.rows):
            if row is not None:
                logprob = self.logprobs[slot] if self.logprobs and row.wants_logprobs else None
                sampler = self.sampler_logprobs[slot] if self.sampler_logprobs and row.wants_sampler_logprobs else None
                yield Token(row, self.token_ids[slot], logprob, sampler, self.ended.get(row))
