"""Which rows go through the model together: micro-batches by tokens, of few shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from grpo.backend.device import on_gpu
from grpo.config import OptimConfig, RolloutConfig
from grpo.types import Rollout, Task

Sample = tuple[Task, Rollout]

GPU_MULTIPLE = 128
"""Lengths on a GPU are multiples of this: the update is compiled once for each shape, and CUDA's fused attention has a
backward pass for such lengths alone."""


class Shape(NamedTuple):
    """A micro-batch's shape, padding included: prompts × their length, and rows × their completions' length."""

    prompts: int
    prompt_length: int
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.prompts * self.prompt_length + self.rows * self.length


@dataclass(frozen=True, slots=True)
class Packing:
    """The rule for shapes: at most `tokens` through the model (a single row apart) and `rows`, of groups of `group`.

    With `shares` a prompt goes through once, else with each of its rows.

    With a `multiple` above 1 there is one shape for each pair of padded lengths, so that their number is bounded:
    lengths are padded to 1, 2, 3, 4, 6, 8, 12, … times it, and rows and prompts to what fills the tokens.
    """

    tokens: int
    rows: int
    group: int
    multiple: int = 1
    shares: bool = True

    @classmethod
    def of(cls, optim: OptimConfig, rollout: RolloutConfig, parts: int = 1, gpu: bool | None = None) -> Packing:
        """The packing of a run whose `micro_batch_tokens` has been decided, into at least `parts` micro-batches.

        `gpu`: whether it is for one; None: whether this machine computes on one.
        """
        assert optim.micro_batch_tokens != "auto", "the plan decides this before a batch is made"
        rows = rollout.prompts_per_step * rollout.num_generations // optim.num_minibatches
        return cls(
            optim.micro_batch_tokens,
            -(-rows // parts),
            rollout.num_generations,
            GPU_MULTIPLE if (on_gpu() if gpu is None else gpu) else 1,
            optim.share_prompts,
        )

    def shape(self, prompts: int, rows: int, prompt_length: int, length: int) -> Shape | None:
        """The shape of a micro-batch with so many prompts and rows of up to these lengths; None if it is too large."""
        if self.multiple == 1:
            shape = Shape(prompts, prompt_length, rows, length)
            return shape if rows == 1 or (self.through(shape) <= self.tokens and rows <= self.rows) else None
        prompt_length, length = self._padded(prompt_length), self._padded(length)
        capacity = 2 * _power_of_two(self.rows - 1) if self.rows > 1 else 1
        while True:
            shape = Shape(-(-capacity // self.group), prompt_length, capacity, length)
            if capacity == 1 or self.through(shape) <= self.tokens:
                return shape if rows <= shape.rows and prompts <= shape.prompts else None
            capacity //= 2

    def through(self, shape: Shape) -> int:
        """The tokens of a micro-batch of this shape that go through the model, padding included."""
        return shape.tokens if self.shares else shape.rows * (shape.prompt_length + shape.length)

    def _padded(self, length: int) -> int:
        units = -(-length // self.multiple)
        power = _power_of_two(units)
        return self.multiple * next(size for size in (power, power * 3 // 2, power * 2) if size >= units)


def pack(rows: Sequence[Sample], packing: Packing) -> list[tuple[list[int], Shape]]:
    """Micro-batches as positions in `rows`, with their shapes.

    Rows are taken from the longest to the shortest, group by group or all together, whichever makes fewer tokens:
    groups share prompts, and equal lengths share padding.
    """
    longest: dict[tuple[int, ...], int] = {}
    for task, rollout in rows:
        longest[task.prompt_ids] = max(longest.get(task.prompt_ids, 0), _length(rollout))

    def by_group(row: Sample) -> tuple[object, ...]:
        return (-longest[row[0].prompt_ids], row[0].prompt_ids, -_length(row[1]))

    def by_length(row: Sample) -> tuple[object, ...]:
        return (-_length(row[1]), row[0].prompt_ids)

    packed = (_in_order(rows, _ordered(rows, order), packing) for order in (by_group, by_length))
    return min(packed, key=lambda parts: sum(packing.through(shape) for _, shape in parts))


def pack_in_order(rows: Sequence[Sample], packing: Packing) -> list[tuple[list[int], Shape]]:
    """Micro-batches of the rows as they come."""
    return _in_order(rows, list(range(len(rows))), packing)


def _ordered(rows: Sequence[Sample], order: Callable[[Sample], tuple[object, ...]]) -> list[int]:
    return sorted(range(len(rows)), key=lambda position: order(rows[position]))


def _in_order(rows: Sequence[Sample], order: Sequence[int], packing: Packing) -> list[tuple[list[int], Shape]]:
    parts: list[tuple[list[int], Shape]] = []
    for position in order:
        taken = parts[-1][0] if parts else []
        if taken and (shape := _shape([rows[i] for i in [*taken, position]], packing)):
            parts[-1] = ([*taken, position], shape)
        else:
            alone = _shape([rows[position]], packing)
            assert alone is not None, "a single row always fits"
            parts.append(([position], alone))
    return parts


def _shape(rows: Sequence[Sample], packing: Packing) -> Shape | None:
    prompts = {task.prompt_ids for task, _ in rows}
    return packing.shape(len(prompts), len(rows), max(map(len, prompts)), max(_length(rollout) for _, rollout in rows))


def _length(rollout: Rollout) -> int:
    return len(rollout.trajectory.token_ids)


def _power_of_two(most: int) -> int:
    """The largest power of two that is not above `most`, and at least 1."""
    return 1 << max(0, most.bit_length() - 1)
