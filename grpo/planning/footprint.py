"""Measures the memory of an update: two small gradients show what a token costs.

Formulas for activations hold for one architecture, one backend and one attention method; a measurement covers what
actually runs. The result is a linear model: bytes per token, and bytes per pair of tokens that attention scores.
`grpo.planning.rehearsal` measures a real micro-batch, which is exact but costs more.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from grpo.backend import cuda
from grpo.backend.device import memory_bytes, on_gpu
from grpo.model.dropout import dropping
from grpo.model.fsdp import Spread
from grpo.model.head import head_parameters
from grpo.model.lines import Lines
from grpo.model.logprobs import chunk_tokens
from grpo.model.policy import Policy
from grpo.model.widehead import bytes_at_work
from grpo.training.packing import Shape

LOGIT_COPIES, MOST_COPIES = 4, {False: 10, True: 12}
"""Float32 copies of a chunk's logits that the loss holds: for one chunk, and the maximum for several chunks, on a CPU
(False) and on a GPU (True). Measured."""

PEEKS = 3
"""Number of measurements of each gradient on a GPU. On a CPU the peak varies by less than 1 %."""
LONG = 4096
"""Gradients of this many tokens or more are measured once: they take seconds, and the variation is relatively small."""
LONG_ROWS = 5_120, 10_240
"""Lengths of two rows that are measured in lines of their own, on CUDA with checkpointed layers. Such layers compute in
tiles of tokens and hold one tile at a time, so short rows take more memory per token."""
KEPT_CHECKPOINTED = 1 / 3
"""The share of the peak without a head that is in memory when the backward pass begins, with checkpointed layers.
Measured. Without checkpoints, all layers' activations are in memory then, and the peak adds about one layer's."""
SHORTEST = 8
"""Length in tokens of the shortest rows that are measured."""
HEAD_SUMS = 8
"""Bytes per number of a trained head, whose gradient is summed over chunks: two float32 sums at a time."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that a gradient needs in addition to the weights.

    fixed         for the sum of gradients
    token         per token of a micro-batch. A part of this (`kept`) is in memory during the loss, the rest afterwards
    pair          per pair of tokens that attention scores
    logits        per row of logits
    chunk         number of rows of logits in a chunk
    shares        whether a prompt goes through the model once for all its completions
    checkpointing whether layers are checkpointed
    head          for the head besides its logits: float32 pieces of its matrix, and its gradient's sums if it trains
    depth         number of layers
    most_pairs    a pass with more pairs keeps no scores (None: all passes keep them). It still counts as if it kept
                  this many, because a micro-batch of equally many tokens in shorter rows does
    most_copies   maximum number of copies of a chunk's logits in memory
    inside        per token, for at most `most_inside` tokens: what a checkpointed layer computes in tiles of tokens
                  (`grpo.model.rowwise`)
    logit_copies  copies of a chunk's logits for a single chunk
    alone         constant, and per token, for the hidden states of rows in lines of their own, if measured
    also          another model's forward pass over the same micro-batch, before the update: the larger of both counts
    gathered      for a layer that is whole while it is computed, if weights are spread over processes
    """

    fixed: int
    token: float
    pair: float
    logits: int
    chunk: int
    shares: bool
    checkpointing: bool
    head: int = 0
    depth: int = 2
    most_pairs: int | None = None
    most_copies: int = MOST_COPIES[True]
    inside: float = 0.0
    most_inside: int = 0
    logit_copies: int = LOGIT_COPIES
    alone: tuple[float, float] | None = None
    also: Footprint | None = None
    gathered: int = 0

    def keeps_scores(self, shape: Shape) -> bool:
        """Whether attention keeps the scores of all passes of this shape for the backward pass."""
        passes = passes_of(shape, self.shares)
        return self.most_pairs is None or max(passes) <= self.most_pairs

    @property
    def kept(self) -> float:
        return KEPT_CHECKPOINTED if self.checkpointing else self.depth / (self.depth + 1)

    def in_chunks(self, logits: int) -> Footprint:
        """The footprint if at most `logits` logits are in memory at a time."""
        also = self.also and self.also.in_chunks(logits)
        return replace(self, chunk=chunk_tokens(max(1, self.logits // 4), logits), also=also)

    def bytes(self, shape: Shape, body: float | None = None) -> int:
        """Bytes of a micro-batch of this shape. `body` is the result of `measure_body` for it, if measured."""
        tokens, pairs = extent(shape, self.shares, self.checkpointing, self.most_pairs)
        outside = self.token * tokens + self.pair * pairs
        if body is None:
            body = outside + self.inside * min(tokens, self.most_inside) + self.gathered
            if shape.alone and self.alone is not None:
                constant, each = self.alone
                body = constant + each * tokens + self.gathered
        waits = min(body, self.kept * max(body, outside + self.inside * tokens))  # tiles do not reduce this part
        projected = shape.lines * shape.width or shape.rows * shape.length
        copies = min(self.most_copies, self.logit_copies * -(-projected // self.chunk))
        head = self.head + copies * self.logits * min(self.chunk, projected)
        also = 0 if self.also is None else self.also.bytes(shape)
        return max(also, int(self.fixed + max(body, waits + head)))


def spread_footprint(footprint: Footprint, spread: Spread) -> Footprint:
    """The footprint with spread weights, from that with whole weights: gradients are of parts, layers are gathered."""
    layer, head = spread.at_work
    with spread.rehearsing():
        fixed = sum(4 * array.size for _, array in tree_flatten(spread.model.trainable_parameters()))
    return replace(footprint, fixed=fixed, gathered=layer, head=footprint.head + head)


def measure_body(policy: Policy, checkpointing: bool | int, shapes: Sequence[Shape]) -> list[float]:
    """Peak bytes of the hidden states of micro-batches of these shapes, and of their gradients.

    The gradient is summed as in an update. Only the part that exists at the peak counts: the peak comes early in the
    backward pass, when most of the gradient does not exist yet.
    """
    gc.collect()  # else garbage could be freed during the measurement
    former, policy.gradient_checkpointing = policy.gradient_checkpointing, checkpointing
    try:
        if on_gpu() and shapes[0].tokens < LONG:
            _peak(policy, shapes[0])  # makes kernels and constants that later calls reuse
        return [statistics.median(_peak(policy, shape) for _ in range(_peeks(shape))) for shape in shapes]
    finally:
        policy.gradient_checkpointing = former


def _peeks(shape: Shape) -> int:
    """How often to measure a shape. The median counts, because the number of operations in flight varies with the load
    of the machine."""
    return PEEKS if on_gpu() and shape.tokens < LONG else 1


def probes(unit: int) -> tuple[Shape, Shape]:
    """Two shapes with about as many tokens: many short rows with few pairs, and one long row with many more pairs.

    So the difference in memory comes from the pairs, and constant parts are not attributed to pairs.
    """
    return Shape(2, unit, 8, unit), Shape(1, unit, 1, 15 * unit)


def _unit(most: int | None) -> int:
    """The length for `probes`: short enough that both shapes keep their scores, if up to `most` pairs are kept.

    On CUDA attention is fused only for multiples of 128, and then keeps no scores.
    """
    if cuda.available():
        return 128
    unit = 128 if on_gpu() else 32
    while most is not None and unit > SHORTEST and extent(probes(unit)[1], True, True)[1] > most:
        unit //= 2
    return unit


def measure_footprint(policy: Policy, checkpointing: bool, memory: int | None = None) -> Footprint:
    """The footprint of this policy's gradient, with or without gradient checkpointing.

    `memory`: bytes that the measuring itself may take. None: as many as the machine has.
    """
    shapes = probes(_unit(policy.most_pairs))
    with nullcontext() if policy.spread is None else policy.spread.frozen():  # `spread_footprint` adds their gradients
        bodies = measure_body(policy, checkpointing, shapes)
        extents = [extent(shape, policy.share_prompts, checkpointing) for shape in shapes]
        token, pair = line_through(extents, bodies)
        alone = _of_long_rows(policy, token, memory) if checkpointing else None
    vocabulary = policy.vocabulary
    fixed = sum(4 * array.size for _, array in tree_flatten(policy.model.trainable_parameters()))
    head = bytes_at_work(policy.model, on_gpu())
    head += sum(HEAD_SUMS * array.size for _, array in tree_flatten(head_parameters(policy.model)))
    rows = 4 * vocabulary, chunk_tokens(vocabulary, policy.logits)
    depth = len(policy.model.layers)
    limits = policy.most_pairs, MOST_COPIES[on_gpu()]
    return Footprint(
        *(fixed, token, pair, *rows, policy.share_prompts, checkpointing, head, depth, *limits), alone=alone
    )


def _of_long_rows(policy: Policy, token: float, memory: int | None) -> tuple[float, float] | None:
    """The linear model (constant, per token) from two measured long rows. None if attention keeps scores, or if there
    is not enough memory to measure."""
    longest = mx.get_active_memory() + token * LONG_ROWS[1]
    if not (cuda.available() and policy.packs) or longest > (memory_bytes() if memory is None else memory):
        return None
    shapes = [Shape(1, length, 1, length, lines=1, width=length, alone=True) for length in LONG_ROWS]
    less, more = measure_body(policy, True, shapes)
    each = max(0.0, (more - less) / (LONG_ROWS[1] - LONG_ROWS[0]))
    return max(0.0, less - each * LONG_ROWS[0]), each


def line_through(extents: Sequence[tuple[int, int]], found: Sequence[float]) -> tuple[float, float]:
    """Bytes per token and per pair, neither below 0, from two extents (tokens and pairs) and their measured bytes.

    These are two equations in two unknowns. Fused attention has no bytes per pair.
    """
    (tokens, pairs), (more_tokens, more_pairs) = extents
    first, second = found
    pair = max(0.0, (second - first * more_tokens / tokens) / (more_pairs - pairs * more_tokens / tokens))
    return max(0.0, (second - pair * more_pairs) / more_tokens), pair


def extent(shape: Shape, shares: bool, checkpointing: bool, most: int | None = None) -> tuple[int, int]:
    """Tokens that go through the model, and pairs whose scores are in memory simultaneously, at most `most` per pass.

    Checkpointed layers are recomputed one pass at a time, so scores of prompts and completions do not coexist.
    """
    tokens = shape.tokens if shape.lines or shares else shape.rows * (shape.prompt_length + shape.length)
    passes = passes_of(shape, shares)
    held = passes if most is None else [min(most, pairs) for pairs in passes]
    return tokens, max(held) if checkpointing else sum(held)


def passes_of(shape: Shape, shares: bool) -> list[int]:
    """Pairs of tokens that attention scores, in each pass of a layer."""
    prompts, prompt_length, rows, length, lines, width, _ = shape
    if lines:
        return [lines * width**2]
    if shares:
        return [prompts * prompt_length**2, rows * length * (prompt_length + length)]
    return [rows * (prompt_length + length) ** 2]


def _peak(policy: Policy, shape: Shape) -> int:
    """Peak bytes, above those in use before, of adding a gradient through the hidden states to a sum of gradients."""
    given, hidden = _going_through(policy, shape)

    def loss(_: nn.Module) -> mx.array:
        with dropping(mx.random.key(0)):  # dropout, if there is any, keeps additional arrays
            return hidden(*given).astype(mx.float32).sum()

    total: list[Any] = [tree_map(lambda p: mx.zeros(p.shape), policy.model.trainable_parameters())]
    mx.eval(given, total)
    resting = mx.get_active_memory()
    mx.reset_peak_memory()
    with policy.training():
        value, gradient = nn.value_and_grad(policy.model, loss)(policy.model)
    summed = tree_map(mx.add, total.pop(), gradient)  # no other references, so memory is reused as in an update
    del gradient
    mx.eval(summed, value)
    return max(0, mx.get_peak_memory() - resting)


def _going_through(policy: Policy, shape: Shape) -> tuple[list[mx.array], Callable[..., mx.array]]:
    """Inputs of the policy for a micro-batch of this shape, and the function that turns them into hidden states."""
    if shape.lines:
        laid = mx.zeros((3 if shape.alone else 5, shape.lines, shape.width), mx.int32)
        return [laid], lambda lines: policy.line_hidden(Lines(*lines))
    prompts = mx.zeros((shape.prompts, shape.prompt_length), mx.int32)
    lengths = mx.full((shape.prompts,), shape.prompt_length)
    index, completions = mx.zeros((shape.rows,), mx.int32), mx.zeros((shape.rows, shape.length), mx.int32)
    return [prompts, lengths, index, completions], policy.group_hidden
