"""The memory of an update, estimated from a model's sizes, for plans without a model to measure (`footprint`).

The coefficients count numbers per activation. They were fitted to measurements of Qwen2 and Qwen3 shapes on two CPU
cores, with LoRA on every linear layer (with fewer LoRA layers, less is kept): 26 shapes of 2 to 24 layers, rows of 24
to 700 tokens. The mean error is 5 %, the largest 17 %. With experts it is 35 %; there the inner width is that of all
experts that a token uses. Other architectures were not fitted.
"""

from __future__ import annotations

from dataclasses import dataclass

from grpo.model.attention import most_pairs
from grpo.model.costs import Costs
from grpo.model.logprobs import LOGITS, chunk_tokens
from grpo.model.rowwise import PAYING, tile_tokens
from grpo.planning.footprint import HEAD_SUMS, MOST_COPIES, Footprint

INPUTS_ON_THEIR_WAY = 2
"""Layers whose inputs are on the device simultaneously if inputs are offloaded: one in transfer, and one in use."""
INSIDE = 10.1
"""Numbers that recomputing one checkpointed layer keeps, for each number inside its feed-forward part."""
SCORES_KEPT, SCORES_AT_WORK = 0.53, 1.4
"""Attention scores kept for each pair of tokens and each head, in short rows. SCORES_KEPT: without checkpoints, per
layer, plus one layer for the current one. SCORES_AT_WORK: with checkpoints, for the current layer only. A causal mask
hides half of the pairs, which tiles leave out. Measured for 2, 3, 4 and 8 layers: 0.46 to 0.52, and 0.7 to 1.8."""

SCORES_OF_A_PASS = 0.5
"""The same for a forward pass alone. Measured: 0.33 to 0.51."""


@dataclass(frozen=True, slots=True)
class _Widths:
    """The widths of a layer: its input, queries, keys, and the inside of its feed-forward part."""

    hidden: int
    queries: int
    keys: int
    inner: int


def reckoned_footprint(
    costs: Costs, checkpointing: bool, fused: bool, head: int = 0, offloads: bool = False, gpu: bool = True
) -> Footprint:
    """An estimate of the footprint that `measure_footprint` would measure.

    fused     attention keeps no scores at all, as on CUDA; elsewhere it keeps the scores of short rows
    head      bytes that a head with float32 logits needs besides the logits
    offloads  the inputs of checkpointed layers are in the host's memory (`optim.offload_activations`)
    gpu       chunks of tokens and logits have the sizes that are used on a GPU
    """
    inner, used = _inner(costs)
    widths = _widths(costs)
    inputs = min(costs.depth, INPUTS_ON_THEIR_WAY) if offloads else costs.depth
    numbers = _checkpointed(inputs, widths) if checkpointing else _kept(costs.depth, widths)
    scores = costs.heads * (SCORES_AT_WORK if checkpointing else SCORES_KEPT * (costs.depth + 1))
    return Footprint(
        # The float32 sum of gradients, and the gradient of a micro-batch.
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
    """The footprint of a forward pass alone, which keeps nothing: one layer's activations, whatever the depth.

    Fitted to Qwen3 shapes on two CPU cores: 6 shapes of 2 to 8 layers, rows of 16 to 480 tokens; the largest error is
    20 %.
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
    """The inner width of the feed-forward part, summed over the experts that a token uses; and their number."""
    return max((product.used * product.outputs, product.used) for product in costs.products)


def _kept(depth: int, width: _Widths) -> float:
    """Numbers per token without checkpoints: all layers' activations, and the temporary arrays of one layer."""
    each = 4.9 * width.hidden + 3.3 * (width.queries + width.keys) + 5.0 * width.inner
    return depth * each + 4.2 * (width.hidden + width.queries + width.inner)


def _checkpointed(inputs: int, width: _Widths) -> float:
    """Numbers per token with checkpoints: the inputs of `inputs` layers, and one layer's activations, except the inside
    of its feed-forward part."""
    layer = 6.4 * (width.queries + 2 * width.keys) + 10 * width.hidden
    return 1.05 * inputs * width.hidden + layer
