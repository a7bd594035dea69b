"""Tries out a micro-batch of the update before the run, so that the planned peak is exact to 1 or 2 %.

The footprint (`grpo.planning.footprint`) serves to choose among sizes, and for lengths that are not tried out. The
chosen micro-batch is tried out as in the run, with its loss and head, if that takes no more than a few seconds.
"""

from __future__ import annotations

import gc

import mlx.core as mx
import mlx.nn as nn

from grpo.config import LossConfig
from grpo.generation.decoding import Decoding
from grpo.generation.growth import COLUMN_STEP
from grpo.generation.rows import Line, SharedPrompt
from grpo.generation.slots import Size
from grpo.model.policy import Policy
from grpo.planning.footprint import extent
from grpo.training.gradients import Gradients
from grpo.training.packing import Shape
from grpo.types import Batch

MOST_WORK = 6e10
"""Maximum cost of a trial, in multiplications: a few seconds on two cores."""
TIMES = 3
"""Maximum number of micro-batches that are tried out one after the other. Later ones share memory with the sum of
gradients, and the number of operations in flight varies a little."""
EACH_NUMBER, EACH_SCORE = 500, 600
"""The cost of elementwise work in an update, in multiplications: per output of a matrix, and per attention score."""


def rehearsed(policy: Policy, loss: LossConfig, checkpointing: bool | int, shape: Shape, number: int) -> int:
    """Peak bytes, above those in use, of the gradient of `number` micro-batches of this shape (at most `TIMES`).

    A first micro-batch is not measured: it uses memory that the system must clear, which delays operations, so that
    more of them are in flight than later.
    """
    gc.collect()  # else garbage could be freed during the measurement
    former, policy.gradient_checkpointing = policy.gradient_checkpointing, checkpointing
    try:
        resting = mx.get_active_memory()
        batches = [made_up(shape, loss) for _ in range(min(TIMES, number))]
        mx.eval([batch.arrays() for batch in batches])
        gradients = Gradients(policy, loss, compiles=False, alone=True)
        gradients(batches[:1])
        mx.reset_peak_memory()
        gradients(batches)
        return mx.get_peak_memory() - resting
    finally:
        policy.gradient_checkpointing = former


def entering(decoding: Decoding, places: int, length: int) -> int:
    """Peak bytes of prefilling `places` prompts of this length, besides what stays of them afterwards."""
    gc.collect()
    session = decoding.open(Size(places, places, max(1, length - 1), COLUMN_STEP))
    prompts = [SharedPrompt([0] * length) for _ in range(places)]
    mx.reset_peak_memory()
    session.admit(range(places), [Line(prompt) for prompt in prompts])
    seen = mx.get_peak_memory() - mx.get_active_memory()
    del session
    decoding.forget()
    return seen


def made_up(shape: Shape, loss: LossConfig) -> Batch:
    """A synthetic batch of this shape with all columns that this loss reads."""
    prompts, prompt_length, rows, length, lines, *_ = shape
    assert not lines, "shapes with packed lines are not supported here"
    column = mx.zeros((rows, length))
    penalty = loss.kl_in == "loss" and (loss.beta > 0 or bool(loss.beta_end))
    return Batch(
        prompt_ids=mx.zeros((prompts, prompt_length), mx.int32),
        prompt_lengths=mx.full((prompts,), prompt_length),
        prompt_index=mx.arange(rows) * prompts // rows,
        token_ids=mx.zeros((rows, length), mx.int32),
        trained=column + 1,
        weights=column + 1 / (rows * length),
        advantages=column + 1,
        behaviour=column + 0,
        anchor=column + 0,
        reference=column + 0 if penalty else None,
        beta=mx.array(loss.beta) if penalty else None,
    )


def is_cheap(model: nn.Module, shape: Shape, shares: bool) -> bool:
    """Whether trying out a micro-batch of this shape on a CPU is cheap, estimated from sizes, so always the same."""
    tokens, pairs = extent(shape, shares, checkpointing=False)
    modules = [module for layer in model.layers for module in layer.modules()]
    matrices: list[mx.array] = [m["weight"] for m in modules if "weight" in m and m["weight"].ndim > 1]
    numbers, outputs = sum(w.size for w in matrices), sum(w.shape[-2] for w in matrices)
    scores = int(getattr(model.args, "num_attention_heads", 1)) * len(model.layers)
    work = tokens * (3 * numbers + EACH_NUMBER * outputs) + EACH_SCORE * scores * pairs
    return work <= MOST_WORK
