"""Packs rows into micro-batches by number of tokens, with few different shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from grpo.backend import cuda
from grpo.backend.device import on_gpu
from grpo.backend.maths import largest_power_of_two
from grpo.config import OptimConfig, RolloutConfig
from grpo.model.lines import room
from grpo.training.binning import SHORTEST, filled, most_lines, portions
from grpo.types import Rollout, Task

Sample = tuple[Task, Rollout]

GPU_MULTIPLE = 128
"""Lengths on a GPU are multiples of this, because the update is compiled once for each shape, and because CUDA's fused
attention has a backward pass only for such lengths."""
WIDE = 4096
"""The maximum width of lines on CUDA, unless a longer row needs more. There attention stores no scores. Elsewhere
scores take memory, so lines are only as wide as the longest row. A row longer than this may have a line of its own,
without a mask."""
WIDEST = 2 * WIDE
"""The maximum width of lines with several rows: their mask takes memory by the square of the width, 200 MB here."""
FINE, FINEST = 8, 64
"""Above FINE multiples, line widths come in finer steps; above FINEST, lengths and widths come in eighths of a power of
two. A width a third longer than its longest row wastes more than another shape costs."""
KEYS = 8192
"""The number of keys at which a token costs twice as much as a token without keys. Fitted to an H200 (0.6B shape),
where an update takes 22 µs per token, and masked attention 25 ms per layer for 16,384 tokens with 16,384 keys each."""
EACH = 1024
"""The fixed cost of a micro-batch, in tokens: launches and small products."""


class Shape(NamedTuple):
    """A micro-batch's shape, padding included: prompts × prompt length, and rows × completion length.

    With `lines` above 0, prompts and completions are packed one after the other into that many lines of `width` tokens.
    `alone`: each line has a single completion. The other sizes then describe only the per-token columns.
    """

    prompts: int
    prompt_length: int
    rows: int
    length: int
    lines: int = 0
    width: int = 0
    alone: bool = False

    @property
    def tokens(self) -> int:
        return self.lines * self.width or self.prompts * self.prompt_length + self.rows * self.length


@dataclass(frozen=True, slots=True)
class Packing:
    """The rules for shapes of micro-batches.

    tokens    maximum number of tokens that go through the model, unless a single row has more
    rows      maximum number of rows
    group     number of completions in a group
    multiple  if above 1, lengths are padded to 1, 2, 3, 4, 6, 8, 12, …, 64, 72, 80, … times this, and rows and prompts
              to what fills the tokens. There is one shape for each pair of padded lengths, so there are few shapes.
    shares    whether a prompt goes through the model once for all its rows, or with each row
    packs     whether completions may be packed into lines, where that costs less
    wide      maximum width of lines, unless the longest row needs more
    parts     number of processes that get micro-batches of the same shapes, times the number of micro-batches that a
              CPU computes in parallel (`grpo.training.lanes`)
    """

    tokens: int
    rows: int
    group: int
    multiple: int = 1
    shares: bool = True
    packs: bool = False
    wide: int = 0
    parts: int = 1

    @classmethod
    def of(
        cls,
        optim: OptimConfig,
        rollout: RolloutConfig,
        parts: int = 1,
        gpu: bool | None = None,
        on_cuda: bool | None = None,
    ) -> Packing:
        """The packing of a run, into at least `parts` micro-batches. `micro_batch_tokens` must not be `auto`.

        `gpu`, `on_cuda`: whether it is for a GPU, and for a CUDA GPU (None: as this machine has).
        """
        assert optim.micro_batch_tokens != "auto", "the plan chooses this value before any batch is made"
        rows = rollout.prompts_per_step * rollout.num_generations // optim.num_minibatches
        gpu = on_gpu() if gpu is None else gpu
        return cls(
            optim.micro_batch_tokens,
            -(-rows // parts),
            rollout.num_generations,
            GPU_MULTIPLE if gpu else 1,
            optim.share_prompts,
            gpu and optim.share_prompts and optim.pack_completions,
            WIDE if (cuda.available() if on_cuda is None else on_cuda) else 0,
            parts,
        )

    def shape(self, prompts: int, rows: int, prompt_length: int, length: int) -> Shape | None:
        """The shape for these numbers of prompts and rows, of up to these lengths; None if it is too large."""
        if self.multiple == 1:
            shape = Shape(prompts, prompt_length, rows, length)
            return shape if rows == 1 or (self.through(shape) <= self.tokens and rows <= self.rows) else None
        prompt_length, length = self._padded(prompt_length), self._padded(length)
        capacity = 2 * largest_power_of_two(self.rows - 1) if self.rows > 1 else 1
        while True:
            shape = Shape(-(-capacity // self.group), prompt_length, capacity, length)
            if capacity == 1 or self.through(shape) <= self.tokens:
                return shape if rows <= shape.rows and prompts <= shape.prompts else None
            capacity //= 2

    def through(self, shape: Shape) -> int:
        """The tokens of a micro-batch of this shape that go through the model, padding included."""
        if self.shares or shape.lines:
            return shape.tokens
        return shape.rows * (shape.prompt_length + shape.length)

    def cost(self, shapes: Sequence[Shape]) -> float:
        """The cost of micro-batches of these shapes, in units of a token without attention."""
        return sum(self._cost(shape) for shape in shapes)

    def _cost(self, shape: Shape) -> float:
        if shape.lines:
            return EACH + _attending(shape.tokens, shape.width // 2 if shape.alone else shape.width)
        keys = shape.prompt_length + shape.length
        if not self.shares:
            return EACH + _attending(shape.rows * keys, keys)
        prompts = _attending(shape.prompts * shape.prompt_length, shape.prompt_length)
        return 2 * EACH + prompts + _attending(shape.rows * shape.length, keys)  # separate passes for both

    def widths(self, longest: int) -> list[int]:
        """Widths to try for lines with several rows, if the longest row has `longest` tokens."""
        wider = (self.multiple << power for power in range(self.wide.bit_length()))
        least = self.width(longest)
        found = [least, *(width for width in wider if least < width <= min(self.wide, self.tokens))]
        return [width for width in found if width <= WIDEST]

    def width(self, longest: int) -> int:
        """The smallest width of lines for a longest row of `longest` tokens."""
        least = self._padded(longest)
        if least > FINE * self.multiple:  # quarters of a power of two (eighths above FINEST), not halves
            units = -(-longest // self.multiple)
            step = self.multiple * largest_power_of_two(units) // (8 if units > FINEST else 4)
            least = -(-longest // step) * step
        return least

    def shape_of_lines(self, lines: int, width: int, rows: int) -> Shape:
        """The shape of a micro-batch of `lines` lines that hold `rows` rows."""
        fitting = lines * max(1, width // SHORTEST)
        usual = 1 << max(0, self.rows * self.parts - 1).bit_length()
        columns = min(fitting, usual) if rows <= usual else fitting
        return Shape(columns, width, columns, width, lines, width)

    def shape_of_rows(self, lines: int, width: int) -> Shape:
        """The shape of a micro-batch of `lines` lines that hold one row each."""
        return Shape(lines, width, lines, width, lines, width, alone=True)

    def _padded(self, length: int) -> int:
        units = -(-length // self.multiple)
        power = largest_power_of_two(units)
        if units > FINEST:
            return self.multiple * -(-units // (power // 8)) * (power // 8)
        return self.multiple * next(size for size in (power, power * 3 // 2, power * 2) if size >= units)


def pack(rows: Sequence[Sample], packing: Packing) -> list[tuple[list[int], Shape]]:
    """Divide rows into micro-batches: positions in `rows`, with the shape of each micro-batch.

    It chooses the cheapest of several ways. Rows are ordered from longest to shortest, group by group (which shares
    prompts) or all together (which saves padding). With `packing.packs`, completions may also be packed into lines:
    then rows longer than WIDE may have lines of their own, and completions longer than WIDE always do.
    """
    if not packing.packs:
        return _together(rows, packing)
    places = [room(task.prompt_ids, rollout.trajectory.token_ids) for task, rollout in rows]
    lengths = [_length(rollout) for _, rollout in rows]
    alone = {tuple(size > WIDE for size in sizes) for sizes in (lengths, places)}  # a single way if no row is long
    ways = [_with_some_alone(rows, places, single, packing) for single in sorted(alone)]
    return min(ways, key=lambda parts: packing.cost([shape for _, shape in parts]))


def _with_some_alone(
    rows: Sequence[Sample], places: Sequence[int], alone: Sequence[bool], packing: Packing
) -> list[tuple[list[int], Shape]]:
    """Micro-batches with some rows in lines of their own, followed by the other rows in the cheapest way."""
    apart = sorted((n for n, single in enumerate(alone) if single), key=lambda n: -places[n])
    rest = [n for n, single in enumerate(alone) if not single]
    others = [([rest[n] for n in held], shape) for held, shape in _together([rows[n] for n in rest], packing)]
    return [*_one_by_one(apart, places, packing), *others]


def _together(rows: Sequence[Sample], packing: Packing) -> list[tuple[list[int], Shape]]:
    """The cheapest way in which no row has a line of its own."""
    longest: dict[tuple[int, ...], int] = {}
    for task, rollout in rows:
        longest[task.prompt_ids] = max(longest.get(task.prompt_ids, 0), _length(rollout))

    def by_group(row: Sample) -> tuple[object, ...]:
        return (-longest[row[0].prompt_ids], row[0].prompt_ids, -_length(row[1]))

    def by_length(row: Sample) -> tuple[object, ...]:
        return (-_length(row[1]), row[0].prompt_ids)

    packed = [_balanced(rows, _ordered(rows, order), packing) for order in (by_group, by_length)]
    if not packing.packs or not rows:
        return min(packed, key=lambda parts: sum(packing.through(shape) for _, shape in parts))
    longest_row = max(room(task.prompt_ids, rollout.trajectory.token_ids) for task, rollout in rows)
    packed += [_packed_in_lines(rows, width, packing) for width in packing.widths(longest_row)]
    return min(packed, key=lambda parts: packing.cost([shape for _, shape in parts]))


def _one_by_one(order: Sequence[int], places: Sequence[int], packing: Packing) -> list[tuple[list[int], Shape]]:
    """Micro-batches with each row in a line of its own, in this order (longest first). Processes that compute in
    parallel get the same shapes."""
    made, begun = list[tuple[list[int], Shape]](), 0
    while begun < len(order):
        width = packing.width(places[order[begun]])
        share = -(-(len(order) - begun) // packing.parts)
        lines = min(most_lines(packing.tokens, width), largest_power_of_two(share))
        for _ in range(packing.parts):
            if held := list(order[begun : begun + lines]):
                made.append((held, packing.shape_of_rows(lines, width)))
            begun += lines
    return made


def _balanced(rows: Sequence[Sample], order: Sequence[int], packing: Packing) -> list[tuple[list[int], Shape]]:
    """As few micro-batches as possible. Without padding to few shapes, all `packing.parts` get about as many rows."""
    made = _in_order(rows, order, packing)
    if packing.parts == 1 or packing.multiple > 1 or not rows:
        return made
    number = -(-len(made) // packing.parts) * packing.parts
    return _in_order(rows, order, replace(packing, rows=min(packing.rows, -(-len(rows) // number))))


def _packed_in_lines(rows: Sequence[Sample], width: int, packing: Packing) -> list[tuple[list[int], Shape]]:
    """Micro-batches of packed lines. Several processes get the same shapes, as far as there are lines."""
    lines = filled([(task.prompt_ids, _length(rollout)) for task, rollout in rows], width)
    made, begun = [], 0
    for portion in portions(-(-len(lines) // packing.parts), most_lines(packing.tokens, width), EACH / width):
        for _ in range(packing.parts):
            if held := [row for line in lines[begun : begun + portion] for row in line]:
                made.append((held, packing.shape_of_lines(portion, width, len(held))))
            begun += portion
    return made


def _attending(tokens: int, keys: int) -> float:
    return tokens * (1 + keys / KEYS)


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
