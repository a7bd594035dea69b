"""How many slots a machine has room for, known before the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from grpo.errors import TooLargeError
from grpo.generation.growth import columns_for
from grpo.generation.slots import WIDEST, WIDTHS

LOGITS_HELD, FILTERED_HELD = 4, 12
"""Copies of a step's logits, in fp32, that sampling holds at once at the most: without filters and with."""


class Memory(Protocol):
    """Of a way of decoding (`decoding.Decoding`), what it holds."""

    @property
    def vocabulary(self) -> int: ...

    @property
    def narrow(self) -> str | None: ...

    def memory(self, slots: int, places: int, prompt: int, completion: int, entering: int | None = None) -> int: ...

    def outside(self, prompt: int, completion: int) -> int: ...


@dataclass(frozen=True, slots=True)
class Need:
    """The most that is decoded at once: so many rows, of so many prompts, of at most these lengths in tokens.

    `reshaped`: whether filters or a penalty take part in sampling. `waits`: whether rows leave their slots while they
    wait for an environment, and come back.
    """

    rows: int
    prompts: int
    prompt_length: int
    completion_length: int
    reshaped: bool = False
    waits: bool = False
    group: int = 1

    def bytes(self, decoding: Memory, slots: int, entering: int | None = None) -> int:
        """What the generator holds for it, with so many slots. `entering`: see `Decoding.memory`.

        Where there is a slot for each row, prompts enter before any completion has more than its first columns.
        """
        slots, length, at_first = min(slots, self.rows), self.completion_length, self.completion_length
        if slots == self.rows and not self.waits:
            at_first = min(length, columns_for(1, length))
        entered, decoded = (
            decoding.memory(slots, self.places(slots), self.prompt_length, columns, besides)
            for columns, besides in ((at_first, entering), (length, 0))
        )
        return max(entered, decoded) + self._logits(decoding, slots)

    def entering(self, slots: int) -> int:
        """How many prompts enter so many empty slots at once, a prompt with all its rows behind the other."""
        return min(self.places(slots), -(-slots // self.group))

    def places(self, slots: int) -> int:
        """How many prompts are decoded at once, with so many slots."""
        return min(slots, self.rows, self.prompts)

    def wider(self, decoding: Memory, slots: int, fed: int) -> int:
        """What a step that feeds each row so many tokens holds beside a plain step: logits, and columns for drafts."""
        slots, places = min(slots, self.rows), self.places(slots)
        columns = [
            decoding.memory(slots, places, self.prompt_length, self.completion_length + more) for more in (0, fed - 1)
        ]
        return columns[1] - columns[0] + (fed - 1) * self._logits(decoding, slots)

    def _logits(self, decoding: Memory, slots: int) -> int:
        return (FILTERED_HELD if self.reshaped else LOGITS_HELD) * 4 * slots * decoding.vocabulary

    def waiting(self, decoding: Memory) -> int:
        """What rows keep outside the slots at the most: all of them, when all wait at once."""
        return self.rows * decoding.outside(self.prompt_length, self.completion_length) if self.waits else 0


def slots_that_fit(decoding: Memory, need: Need, slots: int, available: int) -> int:
    """The largest number of slots, up to `slots`, that `available` bytes hold.

    Raises TooLargeError, with the numbers, where not even one fits.
    """
    low, high = 0, min(slots, need.rows)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if need.bytes(decoding, middle) <= available else (low, middle - 1)
    if low == 0:
        one, left = need.bytes(decoding, 1) / 2**30, max(0, available) / 2**30
        raise TooLargeError(
            f"one completion of {need.completion_length} tokens after a prompt of {need.prompt_length} needs "
            f"{one:.1f} GB for its keys and values, and {left:.1f} GB are left beside the model: shorten "
            "rollout.max_completion_length or data.max_prompt_length, keep keys and values in fewer bits "
            "(rollout.kv_bits), or take a smaller or quantized model"
        )
    return low


def slots_beside_waiting(decoding: Memory, need: Need, slots: int, available: int) -> int:
    """The same, but what rows keep while they wait has room, too: up to half of what one slot leaves.

    A row that may keep nothing is computed again each time that it goes on.
    """
    left = max(0, available - need.bytes(decoding, 1))
    return slots_that_fit(decoding, need, slots, available - min(need.waiting(decoding), left // 2))


def widest_that_fits(decoding: Memory, need: Need, slots: int, spare: int, most: int = WIDEST) -> int:
    """The most tokens that a step may feed each row, where `spare` bytes are left beside plain steps: 1, 2, 4 or 8.

    At most as many as are asked for (`most`).
    """
    asked = [width for width in reversed(WIDTHS) if width <= most]
    return next((width for width in asked if need.wider(decoding, slots, width) <= spare), 1)
