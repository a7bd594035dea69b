"""What an update needs, reckoned from a model's sizes: for where there is no model to measure (`footprint`).

Numbers of the size of an activation, fitted to measurements of Qwen2 and Qwen3 shapes on two CPU cores, with LoRA on
every linear layer (on fewer, less is kept): 26 shapes of 2 to 24 layers, rows of 24 to 700 tokens. Mean error 5 %, the
largest 17 %; with experts, where the inner layer counts as wide as all that a token meets, 35 %. Other
architectures keep other things.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo.model.attention import most_pairs
from grpo.model.costs import Costs
from grpo.model.logprobs import LOGITS, chunk_tokens
from grpo.model.rowwise import PAYING, tile_tokens
from grpo.planning.footprint import HEAD_SUMS, MOST_COPIES, Footprint

INPUTS_ON_THEIR_WAY = 2
"""Layers whose inputs are on the device at once where inputs are offloaded: one that goes or comes, and one at work."""
INSIDE = 10.1
"""Numbers of one checkpointed layer that is computed again, for each of the inside of its feed-forward part."""
SCORES_KEPT, SCORES_AT_WORK = 0.53, 1.4
"""Numbers for each pair of tokens and head, short rows: of each layer, and once more for the layer at work; and of the
one layer at work, where layers are checkpointed. A causal mask hides half of the pairs, which tiles leave out. Measured
for 2, 3, 4 and 8 layers: 0.46 to 0.52, and 0.7 to 1.8."""

SCORES_OF_A_PASS = 0.5
"""The same of a forward pass alone. Measured: 0.33 to 0.51."""


@dataclass(frozen=True, slots=True)
class _Widths:
    """Of a layer, in numbers: its input, queries, keys, and the inside of its feed-forward part."""

    hidden: int
    queries: int
    keys: int
    inner: int


def reckoned_footprint(
    costs: Costs, checkpointing: bool, fused: bool, head: int = 0, offloads: bool = False, gpu: bool = True
) -> Footprint:
    """As `measure_footprint` finds it.

    `fused`: attention keeps no scores at all, which is so on CUDA; elsewhere it keeps them for short rows. `head`:
    bytes that a head with float32 logits holds beside them. `offloads`: the inputs of checkpointed layers are in the
    host's memory (`optim.offload_activations`). `gpu`: so many tokens and logits go at once as on a GPU.
    """
    inner, used = _inner(costs)
    widths = _widths(costs)
    inputs = min(costs.depth, INPUTS_ON_THEIR_WAY) if offloads else costs.depth
    numbers = _checkpointed(inputs, widths) if checkpointing else _kept(costs.depth, widths)
    scores = costs.heads * (SCORES_AT_WORK if checkpointing else SCORES_KEPT * (costs.depth + 1))
    return Footprint(
        # The sum of gradients so far, in float32, and a micro-batch's own.
        fixed=costs.trained * (4 + costs.itemsize),
        token=costs.itemsize * numbers,
        pair=0.0 if fused else costs.itemsize * scores,
        logits=4 * costs.head.outputs,
        chunk=chunk_tokens(costs.head.outputs, LOGITS[gpu]),
        shares=True,
        checkpointing=checkpointing,
        head=head + costs.head.trains * HEAD_SUMS * costs.head.inputs * costs.head.outputs,
        depth=costs.depth,
        most_pairs=most_pairs(costs.heads),
        most_copies=MOST_COPIES[gpu],
        inside=costs.itemsize * INSIDE * inner * checkpointing,  # without checkpoints `_kept` has it
        most_inside=PAYING * tile_tokens(2 * inner + used * costs.hidden, gpu),
    )


def forward_footprint(costs: Costs, fused: bool, gpu: bool = True) -> Footprint:
    """The same of a forward pass alone, in which nothing is kept: one layer's activations, whatever the depth.

    Fitted to Qwen3 shapes on two CPU cores: 6 shapes of 2 to 8 layers, rows of 16 to 480 tokens; the largest error is
    a fifth.
    """
    widths = _widths(costs)
    numbers = 4.8 * widths.hidden + 2.0 * (widths.queries + 2 * widths.keys) + 4.0 * widths.inner
    return Footprint(
        fixed=0,
        token=costs.itemsize * numbers,
        pair=0.0 if fused else costs.itemsize * SCORES_OF_A_PASS * costs.heads,
        logits=4 * costs.head.outputs,
        chunk=chunk_tokens(costs.head.outputs, LOGITS[gpu]),
        shares=True,
        checkpointing=True,
        depth=costs.depth,
        most_pairs=most_pairs(costs.heads),
        most_copies=MOST_COPIES[gpu],
    )


def _widths(costs: Costs) -> _Widths:
    return _Widths(costs.hidden, costs.heads * costs.head_dim, costs.kv_heads * costs.head_dim, _inner(costs)[0])


def _inner(costs: Costs) -> tuple[int, int]:
    """The inside of the feed-forward part, all that a token meets, and how many experts these are."""
    return max((product.used * product.outputs, product.used) for product in costs.products)


def _kept(depth: int, width: _Widths) -> float:
    """All layers' activations, and what is at work in one."""
    each = 4.9 * width.hidden + 3.3 * (width.queries + width.keys) + 5.0 * width.inner
    return depth * each + 4.2 * (width.hidden + width.queries + width.inner)


def _checkpointed(inputs: int, width: _Widths) -> float:
    """The inputs of so many layers, and one layer's activations but for the inside of its feed-forward part."""
    layer = 6.4 * (width.queries + 2 * width.keys) + 10 * width.hidden
    return 1.05 * inputs * width.hidden + layer
