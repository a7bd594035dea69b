"""What belongs to prompts, for each of the rows that go on from them; and back, summed."""

from __future__ import annotations

import mlx.core as mx

from grpo.backend.device import apart


def looked_up(prompts: mx.array, index: mx.array) -> mx.array:
    """Of `[P, ...]` the one that each row goes on from, `[B, ...]`.

    Indexing moves one element at a time, so these are made as wide as they get.
    """
    if prompts.shape[-1] * prompts.itemsize % mx.uint64.size:
        return prompts[index]
    return mx.contiguous(prompts).view(mx.uint64)[index].view(prompts.dtype)


def summed_by_prompt(rows: mx.array, index: mx.array, number: int) -> mx.array:
    """Of `[B, ...]` the sums over each prompt's rows, `[P, ...]`: a product with the rows' places, one-hot.

    As the gradient of an indexing it would be scattered, element by element.
    """
    (places,) = apart(mx.equal(*apart(mx.arange(number)[:, None], index[None])))
    collected: mx.array = places.astype(rows.dtype) @ rows.reshape(index.size, -1)
    return collected.reshape(number, *rows.shape[1:])
