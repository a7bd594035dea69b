"""The rows of one agent's rollout: which of them a request goes on in, and what they come to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from grpo.generation.rows import Row
from grpo.types import BEHAVIOUR, SAMPLER, FinishReason, Trajectory

KEPT = 4
"""Rows that wait to be gone on with, of those that nothing has gone on with when a request begins another."""


@dataclass(eq=False, slots=True)
class Strand:
    """A row: a prompt, and turns that each followed from the whole before.

    `limit` is the most tokens of prompt and all that follows. `answered` counts those after the prompt up to the end of
    the last turn that was answered: what came after it was cut off, and is not trained on. `wave` orders the rows:
    those that began while none of the rollout's decoded come after all before.
    """

    row: Row
    prompt_ids: tuple[int, ...]
    limit: int
    wave: int
    decoding: bool = True
    answered: int = 0
    text: str = ""
    reason: FinishReason | None = None

    @property
    def length(self) -> int:
        """The tokens of the prompt and of what was answered."""
        return len(self.prompt_ids) + self.answered

    @property
    def goes_on(self) -> bool:
        """Whether the row can be extended."""
        return not self.decoding and self.row.state == "waiting" and len(self.row.token_ids) == self.answered

    def begins(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt is all of this and at least one token more."""
        at, length = len(self.prompt_ids), self.length
        return (
            self.answered > 0
            and length < len(prompt_ids)
            and tuple(prompt_ids[:at]) == self.prompt_ids
            and list(prompt_ids[at:length]) == self.row.token_ids[: self.answered]
        )

    def answer(self) -> None:
        """The turn has been answered."""
        self.decoding = False
        self.answered, self.reason = len(self.row.token_ids), self.row.finish_reason
        self.text = self.row.stopping.text(self.row.token_ids)

    def trajectory(self, shared: int, reason: FinishReason, logprobs: bool) -> Trajectory:
        """What was answered, after the first `shared` tokens of the prompt. The rest of the prompt is not trained."""
        own, end, row = self.prompt_ids[shared:], self.answered, self.row
        columns = {BEHAVIOUR: row.logprobs} if logprobs else {}
        if logprobs and row.wants_sampler_logprobs:
            columns[SAMPLER] = row.sampler_logprobs
        return Trajectory(
            (*own, *row.token_ids[:end]),
            (*(False for _ in own), *row.trained[:end]),
            {name: (*(0.0 for _ in own), *values[:end]) for name, values in columns.items()},
            self.text,
            reason,
        )


def in_order(strands: Iterable[Strand]) -> list[Strand]:
    """Those of which something was answered, in an order that does not depend on which of several requests at once
    came first."""
    return sorted((one for one in strands if one.answered), key=lambda one: (one.wave, one.prompt_ids))


def gone_on_with(strands: Iterable[Strand], prompt_ids: Sequence[int]) -> Strand | None:
    """The strand that a prompt goes on from: the longest, and of several the one that can be extended."""
    found = [strand for strand in strands if strand.begins(prompt_ids)]
    return max(found, key=lambda strand: (strand.length, strand.goes_on), default=None)


def idle(strands: Sequence[Strand]) -> list[Strand]:
    """Those to release when another begins: all that wait but the newest few."""
    return [strand for strand in strands if strand.goes_on][:-KEPT]
