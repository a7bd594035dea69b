"""How much memory an update takes, found by trying: two small gradients tell what a token costs.

Formulas for activations are of one architecture, one backend and one way of attending; a measurement is of whatever
will run. What is measured is a line: bytes for each token, and bytes for each pair of tokens that attention scores.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from grpo.backend.device import on_gpu
from grpo.model.dropout import dropping
from grpo.model.head import head_parameters
from grpo.model.lines import Lines
from grpo.model.logprobs import chunk_tokens
from grpo.model.policy import Policy
from grpo.model.widehead import bytes_at_work
from grpo.training.packing import Shape

LOGIT_COPIES, MOST_COPIES = 4, 12
"""Arrays of the size of a chunk's logits, float32, that the loss holds for a chunk, and at most, as measured."""

PEEKS = 3
"""Times that each of the gradients is measured."""
KEPT = {False: 2 / 3, True: 1 / 3}
"""Of the peak without a head, how much is there when the backward pass begins, by whether layers are checkpointed, as
measured."""
HEAD_SUMS = 8
"""Bytes for each number of a head that trains, where its gradient is summed over chunks: two float32 sums at a time."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that a gradient needs beside the weights: fixed, a token, a pair of tokens, and a row of logits.

    Of the tokens' bytes a part (`KEPT`) waits while the loss is computed; the rest comes after it. `head` is what the
    head holds beside its logits: float32 pieces of its matrix, and the sums of its gradient if it trains.
    """

    fixed: int
    token: float
    pair: float
    logits: int
    chunk: int
    shares: bool
    checkpointing: bool
    head: int = 0

    def bytes(self, shape: Shape, body: float | None = None) -> int:
        """Of one micro-batch of this shape; `body` is what `measure_body` found of it, if that was asked."""
        if body is None:
            tokens, pairs = _extent(shape, self.shares, self.checkpointing)
            body = self.token * tokens + self.pair * pairs
        projected = shape.lines * shape.width or shape.rows * shape.length
        copies = min(MOST_COPIES, LOGIT_COPIES * -(-projected // self.chunk))
        head = self.head + copies * self.logits * min(self.chunk, projected)
        return int(self.fixed + max(body, KEPT[self.checkpointing] * body + head))


def measure_body(policy: Policy, checkpointing: bool, shapes: Sequence[Shape]) -> list[float]:
    """Bytes that the hidden states of micro-batches of these shapes, and their gradients, take at most."""
    gc.collect()  # or what others have left behind would go while this is measured
    former, policy.gradient_checkpointing = policy.gradient_checkpointing, checkpointing
    try:
        _peak(policy, shapes[0])  # kernels and constants that are made once
        # In the middle of a few: what is in flight at once varies with what else the machine does.
        return [statistics.median(_peak(policy, shape) for _ in range(PEEKS)) for shape in shapes]
    finally:
        policy.gradient_checkpointing = former


def measure_footprint(policy: Policy, checkpointing: bool) -> Footprint:
    """The footprint of this policy's gradient, with or without gradient checkpointing."""
    unit = 128 if on_gpu() else 32
    shapes = Shape(1, unit, 2, unit), Shape(2, 2 * unit, 4, 2 * unit)
    first, second = measure_body(policy, checkpointing, shapes)
    (tokens, pairs), (more_tokens, more_pairs) = (
        _extent(shape, policy.share_prompts, checkpointing) for shape in shapes
    )
    # Two lines in two unknowns; a fused attention has none of the second kind.
    pair = max(0.0, (second - first * more_tokens / tokens) / (more_pairs - pairs * more_tokens / tokens))
    token = max(0.0, (second - pair * more_pairs) / more_tokens)
    vocabulary = _vocabulary(policy)
    trained = [array for _, array in tree_flatten(policy.model.trainable_parameters())]
    # The sum of gradients so far, and of a micro-batch's own gradients those that are being added to it.
    fixed = sum(4 * array.size for array in trained) + max(array.nbytes for array in trained)
    head = bytes_at_work(policy.model, on_gpu())
    head += sum(HEAD_SUMS * array.size for _, array in tree_flatten(head_parameters(policy.model)))
    rows = 4 * vocabulary, chunk_tokens(vocabulary)
    return Footprint(fixed, token, pair, *rows, policy.share_prompts, checkpointing, head)


def _extent(shape: Shape, shares: bool, checkpointing: bool) -> tuple[int, int]:
    """Tokens that go through the model, and pairs of them whose scores are held at once.

    Checkpointed layers are computed again one at a time, so the prompts' scores are not there beside the completions'.
    """
    prompts, prompt_length, rows, length, lines, width = shape
    if lines:
        return shape.tokens, lines * width**2
    if shares:
        passes = prompts * prompt_length**2, rows * length * (prompt_length + length)
        return shape.tokens, max(passes) if checkpointing else sum(passes)
    return rows * (prompt_length + length), rows * (prompt_length + length) ** 2


def _peak(policy: Policy, shape: Shape) -> int:
    """Bytes above what was there, of the gradient of a function of the hidden states."""
    given, hidden = _going_through(policy, shape)

    def loss(_: nn.Module) -> mx.array:
        with dropping(mx.random.key(0)):  # what is dropped, if anything is, is kept beside what is not
            return hidden(*given).astype(mx.float32).sum()

    mx.eval(given)
    trained: int = sum(array.nbytes for _, array in tree_flatten(policy.model.trainable_parameters()))
    resting = mx.get_active_memory()
    mx.reset_peak_memory()
    with policy.training():
        value, gradient = nn.value_and_grad(policy.model, loss)(policy.model)
    mx.eval(value, gradient)
    return max(0, mx.get_peak_memory() - resting - trained)


def _going_through(policy: Policy, shape: Shape) -> tuple[list[mx.array], Callable[..., mx.array]]:
    """What goes through the policy in a micro-batch of this shape, and the function that makes hidden states of it."""
    if shape.lines:
        return [mx.zeros((5, shape.lines, shape.width), mx.int32)], lambda lines: policy.line_hidden(Lines(*lines))
    prompts = mx.zeros((shape.prompts, shape.prompt_length), mx.int32)
    lengths = mx.full((shape.prompts,), shape.prompt_length)
    index, completions = mx.zeros((shape.rows,), mx.int32), mx.zeros((shape.rows, shape.length), mx.int32)
    return [prompts, lengths, index, completions], policy.group_hidden


def _vocabulary(policy: Policy) -> int:
    size: int = policy.model(mx.array([[0]])).shape[-1]  # the shape alone: nothing is computed
    return size
