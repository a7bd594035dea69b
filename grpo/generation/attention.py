"""Attention of a row's newest tokens over its prompt and over what it has decoded.

`StockAttention` is made of stock MLX operations and is right everywhere; `FusedRowAttention` takes MLX's fused
attention for a row that is alone; `grpo.generation.cuda_attention` has kernels. All go by the same interface, and each
is tried against the model before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import mlx.core as mx

from grpo.backend.maths import exp
from grpo.generation.blocks import Block, Blocks
from grpo.generation.buffers import Layer
from grpo.generation.products import few_rows, padded, product
from grpo.generation.slots import WIDEST, View, Where

MASKED = -1e30
"""Score of what a row may not see. Finite, so that a row without any prompt gives no NaN."""


class Attention(Protocol):
    """How decoding reads and writes the buffers. S slots of W tokens, HQ query heads, H heads of keys
    and values."""

    overlaps: bool
    """Whether a step may be launched while the one before it still runs, without MLX copying the buffers."""
    widest: int
    """The most tokens of a row that a step may feed."""

    def attend(
        self, layer: Layer, queries: mx.array, keys: mx.array, values: mx.array, scale: float, view: View
    ) -> mx.array:
        """Write this step's keys and values into the slots' columns, and attend over the prompt and them.

        queries `[S, HQ, W, D]`, keys `[S, H, W, D]`, values `[S, H, W, E]`; returns `[S, HQ, W, E]` of the queries'
        dtype.
        """
        ...

    def attend_joined(self, layer: Layer, qkv: mx.array, block: Block, blocks: Blocks, view: View | Where) -> mx.array:
        """The same from a block's product `[S · W, (HQ + 2H) · D]`, normed and rotated first: `[S · W, HQ · D]`.

        Rows behind those, if there are any, come back as zeros. Kernels that overlap steps are content with a `Where`.
        """
        ...


class StockAttention:
    """By stock operations: the prompt's part as one product for each group, the rest for each slot.

    The parts are put together by their maxima and sums (flash decoding, arXiv 2205.14135), so that no prompt is ever
    repeated for its rows.
    """

    overlaps = False  # MLX writes into a buffer only when no step in flight holds it
    widest = WIDEST

    def attend_joined(self, layer: Layer, qkv: mx.array, block: Block, blocks: Blocks, view: View | Where) -> mx.array:
        assert isinstance(view, View)
        slots, heads = len(view.place_of), blocks.query_heads + 2 * blocks.heads
        rows = _by_head(qkv, slots, view.fed, heads)
        queries_keys = rows[:, : -blocks.heads]
        if block.qk_norm is not None:
            queries_keys = block.qk_norm(queries_keys)
        queries_keys = _rotated(queries_keys, blocks, view)
        queries, keys = queries_keys[:, : blocks.query_heads], queries_keys[:, blocks.query_heads :]
        out = self.attend(layer, queries, keys, rows[:, -blocks.heads :], blocks.scale, view)
        return padded(out.swapaxes(1, 2).flatten(0, 1).flatten(1), len(qkv), 0)

    def attend(
        self, layer: Layer, queries: mx.array, keys: mx.array, values: mx.array, scale: float, view: View
    ) -> mx.array:
        slots, query_heads, tokens, width = queries.shape
        heads, repeats = keys.shape[1], query_heads // keys.shape[1]
        layer.write(view, keys, values)
        few = few_rows(repeats)
        # Products of few rows, the same ones however many tokens there are: [S, H, W · repeats / few, few, D].
        grouped = (queries * scale).reshape(slots, heads, repeats, tokens, width)
        grouped = grouped.swapaxes(2, 3).reshape(slots, heads, -1, few, width)
        own = layer.keys[:, :, None, : view.width], layer.values[:, :, None, : view.width]
        part = _partial(grouped, *own, view.own(repeats // few), mx.matmul)
        if view.prefix:
            part = _together(part, _over_prompts(layer, grouped, view))
        out = (part.total / part.weight).astype(queries.dtype).reshape(slots, heads, tokens, repeats, -1)
        return out.swapaxes(2, 3).reshape(slots, query_heads, tokens, -1)


class FusedRowAttention(StockAttention):
    """By MLX's fused attention where a row is alone, by the stock way otherwise.

    One row needs no array as a mask, and without one `mx.fast.scaled_dot_product_attention` stays fused on a GPU. Its
    prompt and its own columns are put one behind the other for that, which copies one row's keys and values.
    """

    def attend(
        self, layer: Layer, queries: mx.array, keys: mx.array, values: mx.array, scale: float, view: View
    ) -> mx.array:
        if queries.shape[0] > 1:
            return super().attend(layer, queries, keys, values, scale, view)
        layer.write(view, keys, values)
        row = view.first_row

        def joined(prefix: mx.array, own: mx.array) -> mx.array:
            prompt = prefix[row.place : row.place + 1, :, : row.length]
            return mx.concatenate([prompt, own[:, :, : row.decoded + view.fed]], axis=2)

        everything = joined(layer.prefix_keys, layer.keys), joined(layer.prefix_values, layer.values)
        mask = "causal" if view.fed > 1 else None
        return mx.fast.scaled_dot_product_attention(queries, *everything, scale=scale, mask=mask)


def _rotated(x: mx.array, blocks: Blocks, view: View) -> mx.array:
    """Rotary embedding (RoFormer, arXiv 2104.09864) of `[S, heads, W, D]`, in fp32."""
    cos, sin = view.rotation(blocks.frequencies)
    turned = 2 * blocks.frequencies.shape[0]
    first, second = (
        (x[..., :turned:2], x[..., 1:turned:2]) if blocks.traditional else mx.split(x[..., :turned], 2, axis=-1)
    )
    parts = [first * cos - second * sin, first * sin + second * cos]
    joined = mx.stack(parts, axis=-1).flatten(-2) if blocks.traditional else mx.concatenate(parts, axis=-1)
    return (
        mx.concatenate([joined.astype(x.dtype), x[..., turned:]], axis=-1)
        if turned < x.shape[-1]
        else joined.astype(x.dtype)
    )


class _Part(NamedTuple):
    """Attention over some of the columns: `total` is not divided by `weight` yet, both are relative to e^`highest`."""

    highest: mx.array
    weight: mx.array
    total: mx.array


def _by_head(rows: mx.array, slots: int, tokens: int, heads: int) -> mx.array:
    """`[≥ S · W, heads · D]` as `[S, heads, W, D]`."""
    if len(rows) > slots * tokens:
        rows = rows[: slots * tokens]
    if tokens == 1:
        return rows.reshape(slots, heads, 1, -1)
    return rows.reshape(slots, tokens, heads, -1).swapaxes(1, 2)


def _partial(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    visible: mx.array,
    multiply: Callable[[mx.array, mx.array], mx.array],
) -> _Part:
    """queries `[…, r, D]`, keys and values `[…, C, D]`, visible `[…, 1, C]`."""
    scores = mx.where(visible, multiply(queries, keys.swapaxes(-1, -2)).astype(mx.float32), MASKED)
    highest = scores.max(axis=-1, keepdims=True)
    weights = exp(scores - highest)
    return _Part(highest, weights.sum(axis=-1, keepdims=True), multiply(weights.astype(values.dtype), values))


def _over_prompts(layer: Layer, queries: mx.array, view: View) -> _Part:
    """The part of the prefix places, for all slots: queries `[S, H, p, few, D]` go to their group's place and back."""
    _, heads, parts, few, width = queries.shape
    layout, rows = view.layout, parts * few
    gridded = queries if layout.grid is None else queries[layout.grid]
    gridded = gridded.reshape(layout.places, layout.rows, heads, rows, width).swapaxes(1, 2)
    gridded = gridded.reshape(layout.places, heads, layout.rows * rows, width)
    part = _partial(gridded, layer.prefix_keys, layer.prefix_values, view.prompt, product)

    def back(array: mx.array) -> mx.array:
        array = array.reshape(layout.places, heads, layout.rows, rows, -1).swapaxes(1, 2)
        array = array.reshape(layout.places * layout.rows, heads, parts, few, -1)
        return array if layout.cells is None else array[layout.cells]

    return _Part(*map(back, part))


def _together(one: _Part, other: _Part) -> _Part:
    highest = mx.maximum(one.highest, other.highest)
    left, right = exp(one.highest - highest), exp(other.highest - highest)
    return _Part(highest, one.weight * left + other.weight * right, one.total * left + other.total * right)
