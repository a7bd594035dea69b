"""Draws a token on a CPU: first a block of the vocabulary, then a token of that block.

The Gumbel trick on the whole vocabulary needs a random number for each token, and on a CPU a random number and its
logarithm cost more than the token's exponential. Drawing a block, then a token in it, needs about 2 √V random numbers.
"""

from __future__ import annotations

import mlx.core as mx

LEAST = 2**-33
"""Half the distance between MLX's uniform numbers near zero; the lower bound of the draws, so that none is zero."""


def drawn_by_blocks(weights: mx.array, sums: mx.array, keys: mx.array) -> mx.array:
    """Draw one token per row, with probability proportional to its weight: `[N]` uint32.

    weights `[N, V]` fp32, at least one above zero in each row; sums `[N, B]`, the sums of B equal blocks of weights;
    keys `[N, 2]` uint32. A token of weight zero is never drawn. A row's draw depends only on its own weights and key.
    """
    rows, blocks = sums.shape
    size = weights.shape[1] // blocks
    waits = _waits(keys, blocks + size)
    block = _first(sums, waits[:, :blocks])
    inside = mx.take_along_axis(weights.reshape(rows, blocks, size), block[:, None, None], axis=1)[:, 0]
    return block * size + _first(inside, waits[:, blocks:])


def _first(rates: mx.array, waits: mx.array) -> mx.array:
    """The index of the exponential wait `[N, K]`, divided by its rate `[N, K]`, that is over first: `[N]` uint32.

    The index is k with probability rates[k] / Σ rates: the Gumbel trick without its outer logarithm. Waits are finite
    and above zero, so a rate of zero loses to any other rate.
    """
    return mx.argmax(rates / waits, axis=-1)


def _waits(keys: mx.array, count: int) -> mx.array:
    """`count` exponentially distributed numbers for each key `[N, 2]`: `[N, count]` fp32, from 1e-10 to 17.

    MLX's uniform numbers are 2^-24 apart near one, but 2^-32 apart near zero. Short waits decide which token is drawn,
    so they are computed from the numbers near zero: probabilities down to 1e-9 are not rounded away.
    """
    uniform = mx.vmap(lambda key: mx.random.uniform(LEAST, 1.0, shape=(count,), key=key))(keys)
    return -mx.log1p(-uniform)
