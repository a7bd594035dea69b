"""Which micro-batches an update goes in: how many tokens at once, and how many layers are checkpointed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import mlx.nn as nn

from grpo.config import OptimConfig
from grpo.planning.footprint import Footprint
from grpo.planning.machines import Machine
from grpo.planning.workload import Workload
from grpo.recipes import with_settings
from grpo.training.packing import Shape

AUTO_TOKENS = (16_384, 8_192, 4_096, 2_048, 1_024, 512, 256)
FEW_TOKENS = 2_048
"""Below so many tokens at once a GPU is not kept busy, or with half of them where completions go behind one another and
fill them; a CPU is with a quarter of them, and with 4,096 at most."""
MOST_ACTIVATIONS, MOST_ON_CUDA = 3 * 2**30, 12 * 2**30
KEPT_NUMBERS = 3.5
"""What an update keeps of a token, for each number that a layer's matrices make of it."""
ENOUGH_ON_CPU, ENOUGH_TOKENS = 2**28, 1_024
"""A CPU is as fast with micro-batches of no more bytes, but below so many tokens prompts go through too often.
`qwen3-25m`, 4 × 8 × (64 + 64): 2.42 s and 0.41 GB in four, 2.56 s and 1.27 GB in one."""
PARTS_OF_DEPTH = 8
"""Layers are checkpointed in so many steps from none to all, so that what varies a little in a measurement does not
change the choice."""
MUCH = 8
"""Times its reckoned bytes, a micro-batch fits in any case: lanes, logits and the gradient included."""
WORTH_TRYING = 1.2
"""Of the room, what a micro-batch may need by the line, for it to be tried whether it fits."""

Checkpointing = bool | int
"""Which layers are checkpointed: all (True), none (False), or how many from the first."""
Rehearsed = Callable[[Checkpointing, Shape], int | None]
"""Bytes that a micro-batch of this shape was seen to take; None where that was not tried."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """Micro-batches, the largest shape among them, and what they need, so many side by side (`lanes`).

    `alone`: they go one after the other because memory does not suffice for more.
    """

    optim: OptimConfig
    tokens: int
    checkpointing: Checkpointing
    bytes: int
    shape: Shape
    lanes: int = 1
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """What a choice is made by.

    `room` is what an update may take beside what stays. `footprint` is what it needs without and with checkpointing,
    `lanes` how many of so many micro-batches of so many tokens a CPU computes side by side, and `reckoned` the bytes of
    a shape by sizes alone. `offloaded` is what goes to another memory, which `machine.host` bounds. The sum of the
    `gradient` takes its bytes beside a micro-batch of any size.
    """

    machine: Machine
    load: Workload
    room: int
    depth: int
    footprint: Callable[[bool], Footprint]
    tried: Rehearsed = lambda *_: None
    lanes: Callable[[int, int], int] = lambda *_: 1
    reckoned: Callable[[Shape], float] = lambda _: 0.0
    offloaded: Callable[[Checkpointing, Shape], int] = lambda *_: 0
    gradient: int = 0

    def make(self) -> Chosen:
        """What the recipe says, or for `auto` what fits and pays.

        A micro-batch takes what there is room for, up to `MOST_ACTIVATIONS` (`MOST_ON_CUDA`): beyond that a larger one
        with its layers checkpointed is faster. Without a limit of the recipe's own it takes an eighth of the memory.
        Layers are checkpointed where that leaves too few tokens to keep the machine busy, or not even the longest row:
        all of them, or as few as fit into the recipe's own limit, which is there to be used.

        CUDA waits for launches, so there the largest micro-batch comes first. A CPU is as fast with small ones: it
        takes the largest that is `reckoned` below `ENOUGH_ON_CPU`, because what is measured varies a little, and the
        same recipe must choose the same. As many as it has `lanes` may be at their peak at once, so they count with all
        that they take alone. Where they do not fit, one goes after the other: that takes 1.2 × as long at most, where
        checkpointing takes 1.3 ×.
        """
        machine, load, footprint = self.machine, self.load, cache(self.footprint)  # seconds to measure: if come to
        few = FEW_TOKENS // ((1 + load.packs) if machine.gpu else 4)
        asked, tokens = load.optim.gradient_checkpointing, load.optim.micro_batch_tokens
        auto = (True,) if load.optim.offload_activations else (False, True)
        ways = auto if asked == "auto" else (asked,)
        sizes = AUTO_TOKENS[0 if machine.gpu else 2 :] if tokens == "auto" else (tokens,)
        order = (
            [(way, False, size) for size in sizes for way in ways]
            if machine.cuda
            else list(product(ways, (False, True), sizes))
        )
        best: Chosen | None = None
        for way, alone, size in order:
            largest = load.largest(size, machine.gpu, machine.cuda)
            if alone and self._side_by_side(largest) == 1:
                continue  # and came to nothing before
            small = self._is_small(largest)
            best = best if small else self._found(footprint, way, size, largest, alone)
            enough = (
                asked != "auto"
                or way is not False
                or size >= few
                or largest[0].tokens == load.largest(2 * size, machine.gpu, machine.cuda)[0].tokens
            )
            large = not machine.gpu and self.reckoned(largest[0]) > ENOUGH_ON_CPU
            smaller_will_do = large and tokens == "auto" and size > ENOUGH_TOKENS
            fits = small or (best is not None and best.bytes <= self.comfortable)
            if not fits or not enough or smaller_will_do or not self._holds(way, largest):
                continue
            fills = self.machine.limited and way is True and asked == "auto"
            fewest = self._fewest(footprint, largest, alone) if fills else way
            worse = self._worse(footprint, way, size, largest[0])
            for fewer in (fewest,) if fewest is way else (fewest, way):
                best = self._found(footprint, fewer, size, [*largest, *worse], alone, self.tried)
                if best.bytes <= self.comfortable:
                    return best
        assert best is not None
        if best.bytes > WORTH_TRYING * self.room:
            return best  # trying it might take more memory than there is
        worse = self._worse(footprint, best.checkpointing, best.tokens, largest[0])
        return self._found(footprint, best.checkpointing, best.tokens, [*largest, *worse], best.alone, self.tried)

    @property
    def comfortable(self) -> int:
        """Bytes that a micro-batch may take, the sum of gradients included."""
        most = MOST_ON_CUDA if self.machine.cuda else MOST_ACTIVATIONS
        most = most if self.machine.limited else min(most, self.machine.memory // 8)
        return min(most + self.gradient, self.room)

    def _found(
        self,
        footprint: Callable[[bool], Footprint],
        way: Checkpointing,
        size: int,
        largest: Sequence[Shape],
        alone: bool,
        tried: Rehearsed = lambda *_: None,
    ) -> Chosen:
        """What micro-batches of these shapes need: `alone`, one after the other, or in as many lanes as pay."""
        lanes = 1 if alone else self._side_by_side(largest)
        needed = {}
        for shape in largest:
            seen = tried(way, shape)
            needed[shape] = lanes * (by_footprints(footprint, way, self.depth, shape) if seen is None else seen)
        shape = max(needed, key=lambda shape: needed[shape])
        if self.machine.limited and self.load.optim.micro_batch_tokens == "auto":
            size = min(size, self.load.through(largest))  # or shorter rows would be more tokens than these shapes have
        optim = with_settings(self.load.optim, {"micro_batch_tokens": size, "gradient_checkpointing": way})
        return Chosen(optim, size, way, needed[shape], shape, lanes, alone)

    def _worse(
        self, footprint: Callable[[bool], Footprint], way: Checkpointing, size: int, longest: Shape
    ) -> list[Shape]:
        """A micro-batch of shorter completions, if one takes more than the longest: attention keeps no scores of these,
        but of those. A line counts as if all did, so it matters where micro-batches are tried for a limit of memory."""
        if self.machine.gpu or not self.machine.limited or footprint(bool(way)).keeps_scores(longest):
            return []
        shorter = filter(footprint(bool(way)).keeps_scores, self.load.shorter(size, self.machine.gpu))
        return sorted(shorter, key=lambda shape: by_footprints(footprint, way, self.depth, shape))[-1:]

    def _side_by_side(self, largest: Sequence[Shape]) -> int:
        """How many micro-batches of these shapes are computed side by side where memory allows it."""
        return 1 if self.machine.gpu else self.lanes(largest[0].tokens, -(-self.load.rows // largest[0].rows))

    def _holds(self, way: Checkpointing, largest: Sequence[Shape]) -> bool:
        """Whether the other memory has room for what these shapes offload."""
        host = self.machine.host
        return host is None or max(self.offloaded(way, shape) for shape in largest) <= host

    def _is_small(self, largest: Sequence[Shape]) -> bool:
        """Whether these shapes fit by far, so that they can be tried and no line through small gradients is asked."""
        if self.machine.gpu or self.machine.limited:
            return False
        return MUCH * max(map(self.reckoned, largest)) <= self.comfortable

    def _fewest(self, footprint: Callable[[bool], Footprint], largest: Sequence[Shape], alone: bool) -> Checkpointing:
        """How few layers have to be checkpointed for these shapes: True for all."""
        lanes = 1 if alone else self._side_by_side(largest)
        step = -(-self.depth // PARTS_OF_DEPTH)
        for number in range(step, self.depth, step):
            if (
                lanes * max(by_footprints(footprint, number, self.depth, shape) for shape in largest)
                <= self.comfortable
            ):
                return number
        return True


def by_footprints(
    footprint: Callable[[bool], Footprint], way: Checkpointing, depth: int, shape: Shape, body: float | None = None
) -> int:
    """Bytes of a micro-batch; where some of `depth` layers are checkpointed, by their share. `body` is what was seen of
    its hidden states, if that was tried."""
    if isinstance(way, bool):
        return footprint(way).bytes(shape, body)
    share = min(1.0, way / depth)
    return int(share * footprint(True).bytes(shape, body) + (1 - share) * footprint(False).bytes(shape, body))


def reckoned(model: nn.Module, shape: Shape) -> float:
    """Bytes of a micro-batch's activations, roughly, from sizes alone: float32, no layer checkpointed, scores held."""
    modules = [module for layer in model.layers for module in layer.modules()]
    outputs: int = sum(m["weight"].shape[-2] for m in modules if "weight" in m and m["weight"].ndim > 1)
    scores = 0.75 * int(getattr(model.args, "num_attention_heads", 1)) * (len(model.layers) + 1)
    pairs = shape.rows * shape.length * (shape.prompt_length + shape.length)
    return 4 * (KEPT_NUMBERS * outputs * shape.tokens + scores * pairs)
