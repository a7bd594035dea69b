"""The rows of one agent's rollout: which row a request continues, and the rows' trajectories."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from grpo.generation.rows import Row
from grpo.types import BEHAVIOUR, SAMPLER, FinishReason, Trajectory

KEPT = 4
"""Number of waiting rows that are kept for later requests when a request starts a new row."""


@dataclass(eq=False, slots=True)
class Strand:
    """A row: a prompt, and turns that each continued everything before them.

    `limit` is the maximum number of tokens, including the prompt. `answered` is the number of tokens after the prompt,
    up to the end of the last answered turn: later tokens were cut off, and are not trained on. `wave` orders the rows:
    a row that starts while no row of the rollout decodes begins a new wave.
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
        """The number of tokens of the prompt and the answered turns."""
        return len(self.prompt_ids) + self.answered

    @property
    def goes_on(self) -> bool:
        """Whether the row can be extended."""
        return not self.decoding and self.row.state == "waiting" and len(self.row.token_ids) == self.answered

    def begins(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt extends the whole row by at least one token."""
        at, length = len(self.prompt_ids), self.length
        return (
            self.answered > 0
            and length < len(prompt_ids)
            and tuple(prompt_ids[:at]) == self.prompt_ids
            and list(prompt_ids[at:length]) == self.row.token_ids[: self.answered]
        )

    def answer(self) -> None:
        """Record that the turn has been answered."""
        self.decoding = False
        self.answered, self.reason = len(self.row.token_ids), self.row.finish_reason
        self.text = self.row.stopping.text(self.row.token_ids)

    def trajectory(self, shared: int, reason: FinishReason, logprobs: bool) -> Trajectory:
        """Return the row after the first `shared` tokens of its prompt. The rest of the prompt is not trained on."""
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
    """Return the strands with an answer, in an order that does not depend on which of several simultaneous requests
    came first."""
    return sorted((one for one in strands if one.answered), key=lambda one: (one.wave, one.prompt_ids))


def gone_on_with(strands: Iterable[Strand], prompt_ids: Sequence[int]) -> Strand | None:
    """Return the longest strand that a prompt continues; of equally long strands, one that can be extended."""
    found = [strand for strand in strands if strand.begins(prompt_ids)]
    return max(found, key=lambda strand: (strand.length, strand.goes_on), default=None)


def idle(strands: Sequence[Strand]) -> list[Strand]:
    """Return the strands to release when a new row starts: all waiting strands except the newest."""
    return [strand for strand in strands if strand.goes_on][:-KEPT]
