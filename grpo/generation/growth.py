"""The number of columns in slots: it grows with the longest row, so that short rows do not reserve their full limit.

Growing copies the buffers, which reads and writes as much as one or two decoding steps. So columns grow by a quarter of
the filled columns, and by at least `STEP`: a row of 32,768 tokens grows about 20 times. On CUDA each size also needs a
new trace of a step, so `GPU_STEP` is larger. Pages would need less memory when short rows decode next to a long row,
but stock operations would have to gather the pages at every step.
"""

from __future__ import annotations

from grpo.backend.device import on_gpu

COLUMN_STEP = 8
"""Slots have a multiple of this many columns: sums over an odd number of columns round differently."""
STEP, GPU_STEP = 64, 256
"""Minimum number of columns by which slots grow. It is a multiple of what a step reads (`slots.width_step`), so that
steps read the same number of columns as without growth, and give the same numbers to the bit."""
GROWTH = 4
"""Slots grow by the filled columns divided by this number, if that is more than the minimum."""


def columns_for(needed: int, longest: int) -> int:
    """The number of columns to allocate for rows that need `needed` columns now and at most `longest` later."""
    step = GPU_STEP if on_gpu() else STEP
    return min(_up(needed + needed // GROWTH, step), _up(longest, COLUMN_STEP))


def _up(count: int, step: int) -> int:
    return -(-count // step) * step
