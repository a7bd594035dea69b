"""Distance of the trained arrays from their start, as a norm over all layers, without computing the product B A."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from grpo.model.shards import Shards


def distance(
    state: Mapping[str, mx.array], started: Mapping[str, mx.array], saved: bool, scale: float, shards: Shards
) -> float:
    """The norm of `scale · (B A - B₀ A₀)` over LoRA layers, and of the difference from the start for all other arrays.

    `started` is the state at the run's start; unless it was a `saved` adapter, B₀ A₀ is 0. If several processes share
    the model, all of them must call this: each computes the terms of its parts, and all compute those of whole arrays.
    """

    def square(path: str) -> mx.array:
        if not path.endswith("lora_b"):
            return ((state[path] - started[path]).astype(mx.float32) ** 2).sum()
        names = (f"{path[:-1]}a", path)
        a, b = (_as_factor(state[name]) for name in names)
        if saved:
            a, b = _difference(a, b, *(_as_factor(started[name]) for name in names))
        return scale**2 * _product_norm(a, b)

    whole = parts = mx.array(0.0)
    for path in state:
        if path.endswith("lora_a"):
            continue
        if any(
            map(shards.divides, (path, f"{path[:-1]}a"))
        ):  # this process has columns of the product, or terms of its sum
            parts = parts + square(path)
        else:
            whole = whole + square(path)
    norm: Any = mx.sqrt(mx.maximum(whole + shards.ranks.sum([parts])[0], 0)).item()
    return float(norm)


def _as_factor(array: mx.array) -> mx.array:
    """A layer's A as `[D, r]` or B as `[r, E]`, float32. Experts, with one more axis, store both transposed."""
    array = array.astype(mx.float32)
    return array.swapaxes(-1, -2) if array.ndim == 3 else array


def _difference(a: mx.array, b: mx.array, a0: mx.array, b0: mx.array) -> tuple[mx.array, mx.array]:
    """AB - A₀B₀ = A (B - B₀) + (A - A₀) B₀ as the factors of one product with twice the rank. Exactly 0 if nothing
    changed."""
    return mx.concatenate([a, a - a0], axis=-1), mx.concatenate([b - b0, b0], axis=-2)


def _product_norm(a: mx.array, b: mx.array) -> mx.array:
    """|AB|² = Σ (AᵀA) ∘ (BBᵀ), without computing AB: `[..., D, r]` and `[..., r, E]` in, a scalar out."""
    return ((a.swapaxes(-1, -2) @ a) * (b @ b.swapaxes(-1, -2))).sum()
