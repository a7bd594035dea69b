"""How many columns slots have: they grow with the longest row, so that rows that end early never take their limit.

Growing copies the buffers, which reads and writes as much as one or two decoding steps do. So columns grow by a quarter
of what is filled, and by `STEP` at the least: a row of 32,768 tokens grows about 20 times. On CUDA each size also makes
a new trace of a step, hence the larger step there. Pages would hold less where short rows decode beside a long one, but
stock operations would have to gather them at every step.
"""

from __future__ import annotations

from grpo.backend.device import on_gpu

COLUMN_STEP = 8
"""Slots have a multiple of this many columns: sums over an odd number of them round otherwise."""
STEP, GPU_STEP = 64, 256
"""Columns by which slots grow at the least: a multiple of what a step reads (`slots.width_step`), so that steps read as
many columns as they would if all had been there from the start, and give the same to the bit."""
GROWTH = 4
"""Slots grow by one part in this many of what is filled, if that is more."""


def columns_for(needed: int, longest: int) -> int:
    """How many columns to make for rows that need so many at the next step, and will need `longest` at the most."""
    step = GPU_STEP if on_gpu() else STEP
    return min(_up(needed + needed // GROWTH, step), _up(longest, COLUMN_STEP))


def _up(count: int, step: int) -> int:
    return -(-count // step) * step
