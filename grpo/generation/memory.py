"""Computes, before a run, how many slots fit into memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from grpo.errors import TooLargeError
from grpo.generation.growth import columns_for
from grpo.generation.slots import WIDEST, WIDTHS

LOGITS_HELD, FILTERED_HELD = 4, 12
"""Largest number of copies of a step's logits, in fp32, that sampling holds: without filters, and with filters."""


class Memory(Protocol):
    """The part of `decoding.Decoding` that estimates memory."""

    @property
    def vocabulary(self) -> int: ...

    @property
    def narrow(self) -> str | None: ...

    def memory(self, slots: int, places: int, prompt: int, completion: int, entering: int | None = None) -> int: ...

    def outside(self, prompt: int, completion: int) -> int: ...


@dataclass(frozen=True, slots=True)
class Need:
    """The largest load of a generator: numbers of rows and prompts, and their maximum lengths in tokens.

    `reshaped`: whether sampling uses filters or a penalty. `waits`: whether rows leave their slots while they wait for
    an environment. `group`: the number of rows per prompt.
    """

    rows: int
    prompts: int
    prompt_length: int
    completion_length: int
    reshaped: bool = False
    waits: bool = False
    group: int = 1

    def bytes(self, decoding: Memory, slots: int, entering: int | None = None) -> int:
        """Bytes that the generator needs for this load with `slots` slots. `entering`: see `Decoding.memory`.

        If each row has a slot, all prompts enter before any completion has more than its first columns.
        """
        slots, length, at_first = min(slots, self.rows), self.completion_length, self.completion_length
        if slots == self.rows and not self.waits:
            at_first = min(length, columns_for(1, length))
        entered, decoded = (
            decoding.memory(slots, self.places(slots), self.prompt_length, columns, extra)
            for columns, extra in ((at_first, entering), (length, 0))
        )
        return max(entered, decoded) + self._logits(decoding, slots)

    def entering(self, slots: int) -> int:
        """The number of prompts that enter `slots` empty slots together, if the rows of each group are adjacent."""
        return min(self.places(slots), -(-slots // self.group))

    def places(self, slots: int) -> int:
        """The largest number of prompts that are decoded simultaneously with `slots` slots."""
        return min(slots, self.rows, self.prompts)

    def wider(self, decoding: Memory, slots: int, fed: int) -> int:
        """Bytes that a step with `fed` tokens per row needs in addition to a plain step: logits and draft columns."""
        slots, places = min(slots, self.rows), self.places(slots)
        columns = [
            decoding.memory(slots, places, self.prompt_length, self.completion_length + more) for more in (0, fed - 1)
        ]
        return columns[1] - columns[0] + (fed - 1) * self._logits(decoding, slots)

    def _logits(self, decoding: Memory, slots: int) -> int:
        return (FILTERED_HELD if self.reshaped else LOGITS_HELD) * 4 * slots * decoding.vocabulary

    def waiting(self, decoding: Memory) -> int:
        """Bytes that rows keep outside their slots if all rows wait simultaneously."""
        return self.rows * decoding.outside(self.prompt_length, self.completion_length) if self.waits else 0


def slots_that_fit(decoding: Memory, need: Need, slots: int, available: int) -> int:
    """The largest number of slots, up to `slots`, that fits into `available` bytes.

    Raises TooLargeError, with the numbers, if not even one slot fits.
    """
    low, high = 0, min(slots, need.rows)
    if need.bytes(decoding, high) <= available:
        return high  # checked first: a slot for each row may need less memory than one slot fewer
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if need.bytes(decoding, middle) <= available else (low, middle - 1)
    if low == 0:
        needed, left = need.bytes(decoding, 1) / 2**30, max(0, available) / 2**30
        raise TooLargeError(
            f"one completion of {need.completion_length} tokens after a prompt of {need.prompt_length} needs "
            f"{needed:.1f} GB for its keys and values, but only {left:.1f} GB are left next to the model: lower "
            "rollout.max_completion_length or data.max_prompt_length, store keys and values in fewer bits "
            "(rollout.kv_bits), or use a smaller or quantized model"
        )
    return low


def slots_beside_waiting(decoding: Memory, need: Need, slots: int, available: int) -> int:
    """`slots_that_fit`, with memory reserved for rows that wait: up to half of what is left after one slot.

    Without this memory, a row would be computed again each time that it continues.
    """
    left = max(0, available - need.bytes(decoding, 1))
    return slots_that_fit(decoding, need, slots, available - min(need.waiting(decoding), left // 2))


def widest_that_fits(decoding: Memory, need: Need, slots: int, spare: int, most: int = WIDEST) -> int:
    """The largest number of tokens, up to `most`, that a step may feed each row: 1, 2, 4 or 8.

    `spare`: bytes that plain steps leave free.
    """
    widths = [width for width in reversed(WIDTHS) if width <= most]
    return next((width for width in widths if need.wider(decoding, slots, width) <= spare), 1)
