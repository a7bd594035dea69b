"""Copies arrays of prompts to the rows that continue from them, and sums arrays of rows by prompt."""

from __future__ import annotations

import mlx.core as mx

from grpo.backend.device import apart


def looked_up(prompts: mx.array, index: mx.array) -> mx.array:
    """Each row's entry of `[P, ...]`, as `[B, ...]`.

    Indexing moves one element at a time, so elements are viewed as wider ones if possible.
    """
    if prompts.shape[-1] * prompts.itemsize % mx.uint64.size:
        return prompts[index]
    return mx.contiguous(prompts).view(mx.uint64)[index].view(prompts.dtype)


def summed_by_prompt(rows: mx.array, index: mx.array, number: int) -> mx.array:
    """The sum of `[B, ...]` over each prompt's rows, `[P, ...]`, as a product with one-hot rows.

    The gradient of indexing would scatter instead, element by element.
    """
    (places,) = apart(mx.equal(*apart(mx.arange(number)[:, None], index[None])))
    collected: mx.array = places.astype(rows.dtype) @ rows.reshape(index.size, -1)
    return collected.reshape(number, *rows.shape[1:])
