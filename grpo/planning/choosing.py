"""Chooses the micro-batches of an update: their number of tokens, and how many layers are checkpointed."""

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
"""The smallest micro-batch that keeps a GPU busy. Half of it suffices if completions are packed into lines, which have
little padding. A quarter of it suffices on a CPU, where micro-batches have at most 4,096 tokens."""
MOST_ACTIVATIONS, MOST_ON_CUDA = 3 * 2**30, 12 * 2**30
KEPT_NUMBERS = 3.5
"""Numbers that an update keeps per token, for each output of a layer's matrices."""
ENOUGH_ON_CPU, ENOUGH_TOKENS = 2**28, 1_024
"""On a CPU, micro-batches with more than this many bytes are not faster, but with fewer than this many tokens prompts
go through the model too often. `qwen3-25m`, 4 × 8 × (64 + 64): 2.42 s and 0.41 GB in four micro-batches, 2.56 s and
1.27 GB in one."""
PARTS_OF_DEPTH = 8
"""The number of checkpointed layers is chosen in this many steps from none to all, so that small variations of a
measurement do not change the choice."""
MUCH = 8
"""If this many times a micro-batch's estimate fits, it fits in any case, with lanes, logits and gradient."""
WORTH_TRYING = 1.2
"""A micro-batch is tried out if its estimate is at most this many times the available memory."""

Checkpointing = bool | int
"""Which layers are checkpointed: all (True), none (False), or this many, counted from the first."""
Rehearsed = Callable[[Checkpointing, Shape], int | None]
"""Measured bytes of a micro-batch of this shape; None if it was not tried out."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The chosen micro-batches: the `optim` section, the largest shape, and the bytes for `lanes` parallel ones.

    `alone`: they are computed one after the other because memory does not suffice for two.
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
    """The inputs of a choice.

    room       bytes that an update may take in addition to what stays in memory
    depth      number of layers
    footprint  memory of an update, without or with checkpointing
    tried      measured bytes of a micro-batch, if it was tried out
    lanes      how many micro-batches a CPU computes in parallel, by their tokens and their number
    reckoned   bytes of a shape, estimated from sizes
    offloaded  bytes that move to the host's memory, which has room for `machine.host`
    gradient   bytes of the sum of gradients, which is needed with micro-batches of any size
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
        """Choose what the recipe says, or for `auto` what fits and pays.

        A micro-batch takes the available memory, up to `MOST_ACTIVATIONS` (`MOST_ON_CUDA`): beyond that, larger
        micro-batches with checkpointed layers are faster. Without `memory.limit_gb` it takes at most an eighth of the
        memory. Layers are checkpointed if otherwise there are too few tokens to keep the machine busy, or not even the
        longest row fits: all layers, or as few as necessary if the recipe has a limit, which may be used up.

        CUDA waits for launches, so there larger micro-batches are tried first. A CPU is as fast with small ones: it
        takes the largest whose estimate `reckoned` is below `ENOUGH_ON_CPU`. The estimate is used because measurements
        vary a little, and the same recipe must always make the same choice. All `lanes` micro-batches may reach their
        peak simultaneously, so each counts in full. If they do not fit, they are computed one after the other, which
        takes at most 1.2 × as long; checkpointing takes 1.3 ×.
        """
        machine, load, footprint = self.machine, self.load, cache(self.footprint)  # measured on demand: takes seconds
        few = FEW_TOKENS // ((1 + load.packs) if machine.gpu else 4)
        setting, tokens = load.optim.gradient_checkpointing, load.optim.micro_batch_tokens
        auto = (True,) if load.optim.offload_activations else (False, True)
        ways = auto if setting == "auto" else (setting,)
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
                continue  # the same choice with alone=False has already failed
            small = self._is_small(largest)
            best = best if small else self._found(footprint, way, size, largest, alone)
            enough = (
                setting != "auto"
                or way is not False
                or size >= few
                or largest[0].tokens == load.largest(2 * size, machine.gpu, machine.cuda)[0].tokens
            )
            large = not machine.gpu and self.reckoned(largest[0]) > ENOUGH_ON_CPU
            smaller_will_do = large and tokens == "auto" and size > ENOUGH_TOKENS
            fits = small or (best is not None and best.bytes <= self.comfortable)
            if not fits or not enough or smaller_will_do or not self._holds(way, largest):
                continue
            fills = self.machine.limited and way is True and setting == "auto"
            fewest = self._fewest(footprint, largest, alone) if fills else way
            worse = self._worse(footprint, way, size, largest[0])
            for fewer in (fewest,) if fewest is way else (fewest, way):
                best = self._found(footprint, fewer, size, [*largest, *worse], alone, self.tried)
                if best.bytes <= self.comfortable:
                    return best
        assert best is not None
        if best.bytes > WORTH_TRYING * self.room:
            return best  # trying it out might need more memory than there is
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
        """The choice of micro-batches of these shapes, with their bytes: `alone`, one after the other, or in parallel
        lanes."""
        lanes = 1 if alone else self._side_by_side(largest)
        needed = {}
        for shape in largest:
            seen = tried(way, shape)
            needed[shape] = lanes * (by_footprints(footprint, way, self.depth, shape) if seen is None else seen)
        shape = max(needed, key=lambda shape: needed[shape])
        if self.machine.limited and self.load.optim.micro_batch_tokens == "auto":
            size = min(size, self.load.through(largest))  # else shorter rows could have more tokens than these shapes
        optim = with_settings(self.load.optim, {"micro_batch_tokens": size, "gradient_checkpointing": way})
        return Chosen(optim, size, way, needed[shape], shape, lanes, alone)

    def _worse(
        self, footprint: Callable[[bool], Footprint], way: Checkpointing, size: int, longest: Shape
    ) -> list[Shape]:
        """The micro-batch of shorter completions that takes the most memory, if attention keeps scores only of shorter
        rows; else empty.

        Estimates count scores for all rows, so this matters only if micro-batches are tried out, under a memory limit.
        """
        if self.machine.gpu or not self.machine.limited or footprint(bool(way)).keeps_scores(longest):
            return []
        shorter = filter(footprint(bool(way)).keeps_scores, self.load.shorter(size, self.machine.gpu))
        return sorted(shorter, key=lambda shape: by_footprints(footprint, way, self.depth, shape))[-1:]

    def _side_by_side(self, largest: Sequence[Shape]) -> int:
        """How many micro-batches of these shapes are computed in parallel if memory allows it."""
        return 1 if self.machine.gpu else self.lanes(largest[0].tokens, -(-self.load.rows // largest[0].rows))

    def _holds(self, way: Checkpointing, largest: Sequence[Shape]) -> bool:
        """Whether the host's memory has room for what these shapes offload."""
        host = self.machine.host
        return host is None or max(self.offloaded(way, shape) for shape in largest) <= host

    def _is_small(self, largest: Sequence[Shape]) -> bool:
        """Whether these shapes fit by far, so that they can be tried out without a footprint measured beforehand."""
        if self.machine.gpu or self.machine.limited:
            return False
        return MUCH * max(map(self.reckoned, largest)) <= self.comfortable

    def _fewest(self, footprint: Callable[[bool], Footprint], largest: Sequence[Shape], alone: bool) -> Checkpointing:
        """The smallest number of layers that must be checkpointed for these shapes to fit; True for all."""
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
    """Bytes of a micro-batch. If some of `depth` layers are checkpointed, interpolates by their share. `body` is the
    measured memory of its hidden states, if it was tried out."""
    if isinstance(way, bool):
        return footprint(way).bytes(shape, body)
    share = min(1.0, way / depth)
    return int(share * footprint(True).bytes(shape, body) + (1 - share) * footprint(False).bytes(shape, body))


def reckoned(model: nn.Module, shape: Shape) -> float:
    """A rough estimate of the bytes of a micro-batch's activations, from sizes: float32, no checkpoints, all scores."""
    modules = [module for layer in model.layers for module in layer.modules()]
    outputs: int = sum(m["weight"].shape[-2] for m in modules if "weight" in m and m["weight"].ndim > 1)
    scores = 0.75 * int(getattr(model.args, "num_attention_heads", 1)) * (len(model.layers) + 1)
    pairs = shape.rows * shape.length * (shape.prompt_length + shape.length)
    return 4 * (KEPT_NUMBERS * outputs * shape.tokens + scores * pairs)
