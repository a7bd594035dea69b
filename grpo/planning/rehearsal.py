"""One micro-batch of the update, rehearsed before the run: its peak is what the plan says, to a hundredth or two.

A line through two small gradients (`footprint`) is for choosing among sizes and for lengths that nobody has tried. What
was chosen is tried as it will be, with its loss and its head, wherever that costs no more than some seconds.
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
"""Multiplications, or what takes as long, that a rehearsal may cost: some seconds on two cores."""
TIMES = 3
"""Micro-batches that are rehearsed one after the other, at most: a later one has the sum of gradients beside it, and
how many operations are in flight at once varies a little."""
EACH_NUMBER, EACH_SCORE = 500, 600
"""What an update does to a number that a matrix makes of a token, and to a score, in multiplications that take as
long."""


def rehearsed(policy: Policy, loss: LossConfig, checkpointing: bool | int, shape: Shape, number: int) -> int:
    """Bytes above what is there that the gradient of so many micro-batches of this shape takes.

    One goes before them that does not count: it touches memory that the system has to clear, so that more operations
    are in flight than ever after.
    """
    gc.collect()  # or what others have left behind would go while this is measured
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
    """Bytes beside what stays of them that so many prompts of this length take on their way through the model."""
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
    """A batch of this shape with all the columns that this loss reads."""
    prompts, prompt_length, rows, length, lines, *_ = shape
    assert not lines, "completions behind one another have lines, which this does not make up"
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
    """Whether a micro-batch of this shape may be rehearsed on a CPU, reckoned from sizes: the same at every call."""
    tokens, pairs = extent(shape, shares, checkpointing=False)
    modules = [module for layer in model.layers for module in layer.modules()]
    matrices: list[mx.array] = [m["weight"] for m in modules if "weight" in m and m["weight"].ndim > 1]
    numbers, outputs = sum(w.size for w in matrices), sum(w.shape[-2] for w in matrices)
    scores = int(getattr(model.args, "num_attention_heads", 1)) * len(model.layers)
    work = tokens * (3 * numbers + EACH_NUMBER * outputs) + EACH_SCORE * scores * pairs
    return work <= MOST_WORK
