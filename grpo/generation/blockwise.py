"""The draw of a token on a CPU: first a block of the vocabulary, then a token of that block.

Gumbel's trick on the whole vocabulary needs a random number for each token, and on a CPU a random number and its
logarithm cost more than the token's exponential. Two draws, of a block and inside it, need about 2 √V numbers.
"""

from __future__ import annotations

import mlx.core as mx

LEAST = 2**-33
"""Half a step of MLX's uniform numbers next to zero: added to all, so that none is zero."""


def drawn_by_blocks(weights: mx.array, sums: mx.array, keys: mx.array) -> mx.array:
    """Draw one token a row, with a probability in proportion to its weight: `[N]` uint32.

    weights `[N, V]` fp32, at least one of each row above zero; sums `[N, B]` of its B equal blocks; keys `[N, 2]`
    uint32. A token of weight zero is never drawn. A row's draw depends on its own weights and key alone.
    """
    rows, blocks = sums.shape
    size = weights.shape[1] // blocks
    waits = _waits(keys, blocks + size)
    block = _first(sums, waits[:, :blocks])
    inside = mx.take_along_axis(weights.reshape(rows, blocks, size), block[:, None, None], axis=1)[:, 0]
    return block * size + _first(inside, waits[:, blocks:])


def _first(rates: mx.array, waits: mx.array) -> mx.array:
    """Of exponential waits `[N, K]`, each sped up by its rate `[N, K]`, which is over first: `[N]` uint32.

    It is k with probability rates[k] / Σ rates: Gumbel's trick without its outer logarithm. Waits are finite and above
    zero, so that a rate of zero loses to any other.
    """
    return mx.argmax(rates / waits, axis=-1)


def _waits(keys: mx.array, count: int) -> mx.array:
    """`count` numbers of the exponential distribution for each key `[N, 2]`: `[N, count]` fp32, from 1e-10 to 17.

    MLX's uniform numbers lie 2^-24 apart next to one, but 2^-32 next to zero. Short waits decide what is drawn, so they
    are made of the numbers next to zero: a probability down to 1e-9 is not rounded away.
    """
    uniform = mx.vmap(lambda key: mx.random.uniform(LEAST, 1.0, shape=(count,), key=key))(keys)
    return -mx.log1p(-uniform)
