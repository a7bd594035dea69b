"""How much memory an update takes, found by trying: two small gradients tell what a token costs.

Formulas for activations are of one architecture, one backend and one way of attending; a measurement is of whatever
will run. What is measured is a line: bytes for each token, and bytes for each pair of tokens that attention scores.
`grpo.planning.rehearsal` measures one micro-batch as it will be, which is exact and costs more.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
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
"""Arrays of the size of a chunk's logits, float32, that the loss holds for a chunk, and for several of them at most, on
a CPU and on a GPU, as measured."""

PEEKS = 3
"""Times that each of the gradients is measured on a GPU. On a CPU the peak varies by less than a hundredth."""
LONG = 4096
"""From so many tokens on a gradient is measured once: it takes seconds, and what varies is a small part of it."""
LONG_ROWS = 5_120, 10_240
"""Lengths of two rows that are measured in lines of their own, on CUDA with checkpointed layers. What such layers
compute in tiles of tokens is there for a tile, so that short rows take more for each of their tokens."""
KEPT_CHECKPOINTED = 1 / 3
"""Of the peak without a head, how much is there when the backward pass begins, if layers are checkpointed, as measured.
Without checkpoints all layers' activations are there, beside which the peak has about as much as one layer's."""
SHORTEST = 8
"""Tokens of the shortest rows that are measured."""
HEAD_SUMS = 8
"""Bytes for each number of a head that trains, where its gradient is summed over chunks: two float32 sums at a time."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that a gradient needs beside the weights: fixed (the sum of gradients), a token, a pair, a row of logits.

    Of the tokens' bytes a part (`kept`) waits while the loss is computed; the rest comes after it. `head` is what the
    head holds beside its logits: float32 pieces of its matrix, and the sums of its gradient if it trains. `depth` is
    how many layers the model has. A pass with more than `most_pairs` keeps no scores (None: all do), but counts as if
    it kept the most: a micro-batch of as many tokens in shorter rows keeps them. The head holds `logit_copies` of a
    chunk's logits, and `most_copies` at once. `inside`: bytes a token, of at most `most_inside` tokens, for what a
    checkpointed layer computes in tiles of tokens (`grpo.model.rowwise`). `alone`: bytes, and bytes a token, of the
    hidden states of rows in lines of their own, where those were measured. `also`: another model's forward pass over
    the same micro-batch, which is over when the update begins: whichever takes more counts. `gathered`: bytes of a
    layer that is whole while it is computed, where weights are spread over processes.
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
        """The same where so many logits are there at once."""
        also = self.also and self.also.in_chunks(logits)
        return replace(self, chunk=chunk_tokens(max(1, self.logits // 4), logits), also=also)

    def bytes(self, shape: Shape, body: float | None = None) -> int:
        """Of one micro-batch of this shape; `body` is what `measure_body` found of it, if that was asked."""
        tokens, pairs = extent(shape, self.shares, self.checkpointing, self.most_pairs)
        outside = self.token * tokens + self.pair * pairs
        if body is None:
            body = outside + self.inside * min(tokens, self.most_inside) + self.gathered
            if shape.alone and self.alone is not None:
                constant, each = self.alone
                body = constant + each * tokens
        waits = min(body, self.kept * max(body, outside + self.inside * tokens))  # tiles do not make that less
        projected = shape.lines * shape.width or shape.rows * shape.length
        copies = min(self.most_copies, self.logit_copies * -(-projected // self.chunk))
        head = self.head + copies * self.logits * min(self.chunk, projected)
        also = 0 if self.also is None else self.also.bytes(shape)
        return max(also, int(self.fixed + max(body, waits + head)))


def spread_footprint(footprint: Footprint, spread: Spread) -> Footprint:
    """That of weights which are whole, where they are spread: the gradient is of parts, what is at work is gathered."""
    layer, head = spread.at_work
    with spread.rehearsing():
        fixed = sum(4 * array.size for _, array in tree_flatten(spread.model.trainable_parameters()))
    return replace(footprint, fixed=fixed, gathered=layer, head=footprint.head + head)


def measure_body(policy: Policy, checkpointing: bool | int, shapes: Sequence[Shape]) -> list[float]:
    """Bytes that the hidden states of micro-batches of these shapes, and their gradients, take at most.

    The gradient is added up as in an update, so what counts of it is what is there when the peak is reached: the peak
    comes early in the backward pass, when most of the gradient does not exist yet.
    """
    gc.collect()  # or what others have left behind would go while this is measured
    former, policy.gradient_checkpointing = policy.gradient_checkpointing, checkpointing
    try:
        if on_gpu() and shapes[0].tokens < LONG:
            _peak(policy, shapes[0])  # kernels and constants that are made once
        return [statistics.median(_peak(policy, shape) for _ in range(_peeks(shape))) for shape in shapes]
    finally:
        policy.gradient_checkpointing = former


def _peeks(shape: Shape) -> int:
    """How often to measure a shape, for the middle of what is seen: what is in flight at once varies with what else the
    machine does."""
    return PEEKS if on_gpu() and shape.tokens < LONG else 1


def probes(unit: int) -> tuple[Shape, Shape]:
    """Many short rows, whose tokens score few others, and one long row: about as many tokens, and many more pairs.

    So the difference is the pairs', and what is constant does not look like pairs.
    """
    return Shape(2, unit, 8, unit), Shape(1, unit, 1, 15 * unit)


def _unit(most: int | None) -> int:
    """The length for `probes`: short enough that both of them keep their scores, where `most` pairs are kept.

    On CUDA attention is fused for multiples of 128 alone, and then keeps no scores.
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
    token, pair = line_through(
        [extent(shape, policy.share_prompts, checkpointing) for shape in shapes],
        measure_body(policy, checkpointing, shapes),
    )
    vocabulary = policy.vocabulary
    fixed = sum(4 * array.size for _, array in tree_flatten(policy.model.trainable_parameters()))
    head = bytes_at_work(policy.model, on_gpu())
    head += sum(HEAD_SUMS * array.size for _, array in tree_flatten(head_parameters(policy.model)))
    rows = 4 * vocabulary, chunk_tokens(vocabulary, policy.logits)
    depth = len(policy.model.layers)
    limits = policy.most_pairs, MOST_COPIES[on_gpu()]
    found = Footprint(fixed, token, pair, *rows, policy.share_prompts, checkpointing, head, depth, *limits)
    return replace(found, alone=_of_long_rows(policy, token, memory)) if checkpointing else found


def _of_long_rows(policy: Policy, token: float, memory: int | None) -> tuple[float, float] | None:
    """The line through what two long rows take, where attention keeps no scores and there is room for them."""
    longest = mx.get_active_memory() + token * LONG_ROWS[1]
    if not (cuda.available() and policy.packs) or longest > (memory_bytes() if memory is None else memory):
        return None
    shapes = [Shape(1, length, 1, length, lines=1, width=length, alone=True) for length in LONG_ROWS]
    less, more = measure_body(policy, True, shapes)
    each = max(0.0, (more - less) / (LONG_ROWS[1] - LONG_ROWS[0]))
    return max(0.0, less - each * LONG_ROWS[0]), each


def line_through(extents: Sequence[tuple[int, int]], found: Sequence[float]) -> tuple[float, float]:
    """Bytes a token and a pair, neither below 0, by two extents (tokens and pairs) and what was found of them.

    Two lines in two unknowns; a fused attention has none of the second kind.
    """
    (tokens, pairs), (more_tokens, more_pairs) = extents
    first, second = found
    pair = max(0.0, (second - first * more_tokens / tokens) / (more_pairs - pairs * more_tokens / tokens))
    return max(0.0, (second - pair * more_pairs) / more_tokens), pair


def extent(shape: Shape, shares: bool, checkpointing: bool, most: int | None = None) -> tuple[int, int]:
    """Tokens that go through the model, and pairs of them whose scores are held at once, `most` of each pass.

    Checkpointed layers are computed again one at a time, so the prompts' scores are not there beside the completions'.
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
    """Bytes above what was there, of adding the gradient of a function of the hidden states to a sum of gradients."""
    given, hidden = _going_through(policy, shape)

    def loss(_: nn.Module) -> mx.array:
        with dropping(mx.random.key(0)):  # what is dropped, if anything is, is kept beside what is not
            return hidden(*given).astype(mx.float32).sum()

    total: list[Any] = [tree_map(lambda p: mx.zeros(p.shape), policy.model.trainable_parameters())]
    mx.eval(given, total)
    resting = mx.get_active_memory()
    mx.reset_peak_memory()
    with policy.training():
        value, gradient = nn.value_and_grad(policy.model, loss)(policy.model)
    summed = tree_map(mx.add, total.pop(), gradient)  # nothing else holds a part that is added
    del gradient
    mx.eval(summed, value)
    return max(0, mx.get_peak_memory() - resting)


def _going_through(policy: Policy, shape: Shape) -> tuple[list[mx.array], Callable[..., mx.array]]:
    """What goes through the policy in a micro-batch of this shape, and the function that makes hidden states of it."""
    if shape.lines:
        laid = mx.zeros((3 if shape.alone else 5, shape.lines, shape.width), mx.int32)
        return [laid], lambda lines: policy.line_hidden(Lines(*lines))
    prompts = mx.zeros((shape.prompts, shape.prompt_length), mx.int32)
    lengths = mx.full((shape.prompts,), shape.prompt_length)
    index, completions = mx.zeros((shape.rows,), mx.int32), mx.zeros((shape.rows, shape.length), mx.int32)
    return [prompts, lengths, index, completions], policy.group_hidden
