"""Attention of a row's newest tokens over its prompt and over the tokens that it has decoded.

`StockAttention` uses stock MLX operations and works everywhere; `FusedRowAttention` uses MLX's fused attention for a
single row; `grpo.generation.cuda_attention` has CUDA kernels. All implement `Attention`, and each is compared with the
model's forward pass before it is used.
"""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

from grpo.backend.maths import exp_of, exponents_unit
from grpo.generation.blocks import Block, Blocks
from grpo.generation.buffers import Layer
from grpo.generation.products import few_rows, padded
from grpo.generation.slots import WIDEST, Layout, View, Where

MASKED = -1e30
"""Score of a column that a row must not see. Finite, so that a row without a prompt does not give NaN."""


class Attention(Protocol):
    """How decoding reads and writes the buffers.

    S slots with W tokens each, HQ query heads, H heads of keys and values, of widths D and E.
    """

    overlaps: bool
    """Whether a step may be launched while the previous step still runs, without MLX copying the buffers."""
    widest: int
    """The largest number of tokens per row that a step may feed."""

    def attend(
        self, layer: Layer, queries: mx.array, keys: mx.array, values: mx.array, scale: float, view: View
    ) -> mx.array:
        """Write this step's keys and values into the slots' columns, then attend over the prompt and these columns.

        queries `[S, HQ, W, D]`, keys `[S, H, W, D]`, values `[S, H, W, E]`; returns `[S, HQ, W, E]` in the dtype of the
        queries.
        """
        ...

    def attend_joined(self, layer: Layer, qkv: mx.array, block: Block, blocks: Blocks, view: View | Where) -> mx.array:
        """Normalize and rotate a block's joined product `[S · W, (HQ + 2H) · D]`, then attend: `[S · W, HQ · D]`.

        `qkv` may have more than S · W rows: the result has zeros for them. Kernels that overlap steps need only a
        `Where`.
        """
        ...


class StockAttention:
    """Attention by stock operations: one product per group over the prompt, one per slot over the decoded columns.

    Both parts compute exponentials relative to the same maximum, so that their sums can simply be added, and no prompt
    is ever repeated for its rows.
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
        # Products of `few` rows, however many tokens there are: [S, H, W · repeats / few, few, D].
        grouped = (queries * (scale * exponents_unit())).reshape(slots, heads, repeats, tokens, width)
        grouped = grouped.swapaxes(2, 3).reshape(slots, heads, -1, few, width)
        total, weight = _weighed(layer, grouped, view, view.own(repeats // few))
        out = (total / weight).astype(queries.dtype).reshape(slots, heads, tokens, repeats, -1)
        return out.swapaxes(2, 3).reshape(slots, query_heads, tokens, -1)


class FusedRowAttention(StockAttention):
    """MLX's fused attention for a single row, `StockAttention` for several rows.

    A single row needs no array mask, and without an array mask `mx.fast.scaled_dot_product_attention` stays fused on a
    GPU. It needs the prompt and the row's own columns in one array, which copies one row's keys and values.
    """

    def attend(
        self, layer: Layer, queries: mx.array, keys: mx.array, values: mx.array, scale: float, view: View
    ) -> mx.array:
        if queries.shape[0] > 1:
            return super().attend(layer, queries, keys, values, scale, view)
        layer.write(view, keys, values)
        row = view.first_row

        def joined(prefix: mx.array, columns: mx.array) -> mx.array:
            prompt = prefix[row.place : row.place + 1, :, : row.length]
            return mx.concatenate([prompt, columns[:, :, : row.decoded + view.fed]], axis=2)

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


def _by_head(rows: mx.array, slots: int, tokens: int, heads: int) -> mx.array:
    """`[≥ S · W, heads · D]` as `[S, heads, W, D]`."""
    if len(rows) > slots * tokens:
        rows = rows[: slots * tokens]
    if tokens == 1:
        return rows.reshape(slots, heads, 1, -1)
    return rows.reshape(slots, tokens, heads, -1).swapaxes(1, 2)


def _weighed(layer: Layer, queries: mx.array, view: View, visible: mx.array) -> tuple[mx.array, mx.array]:
    """The weighted sum of all values that a token sees, and the sum of the weights, fp32: `[S, H, p, few, E or 1]`.

    queries `[S, H, p, few, D]` are scaled and in units of `exp_of`; visible `[S, 1, p or 1, 1, width]`. A token always
    sees its own column, so the maximum is never a masked score.
    """
    scores = _scores(layer.scores(queries, view.width), visible)
    highest = scores.max(axis=-1, keepdims=True)
    if not view.prefix:
        weights = exp_of(scores - highest)
        return layer.weighed(weights), weights.sum(axis=-1, keepdims=True)
    # Only products go through the grid: if groups differ in size, most of its cells are empty.
    grid = _Grid(view.layout, queries)
    prompts = _scores(grid.back(layer.prompt_scores(grid.to(queries))), view.prompt)
    highest = mx.maximum(highest, prompts.max(axis=-1, keepdims=True))
    weights, prompt_weights = exp_of(scores - highest), exp_of(prompts - highest)
    total = layer.weighed(weights) + grid.back(layer.prompts_weighed(grid.to(prompt_weights)))
    return total, weights.sum(axis=-1, keepdims=True) + prompt_weights.sum(axis=-1, keepdims=True)


def _scores(scores: mx.array, visible: mx.array) -> mx.array:
    return mx.where(visible, scores.astype(mx.float32), MASKED)


class _Grid:
    """Rearranges arrays of slots, `[S, H, p, few, n]`, by their prefix places, `[M, H, G · p · few, n]`, and back."""

    def __init__(self, layout: Layout, queries: mx.array) -> None:
        self._layout, self._shape = layout, queries.shape[1:4]

    def to(self, array: mx.array) -> mx.array:
        layout, (heads, parts, few) = self._layout, self._shape
        gridded = array if layout.grid is None else array[layout.grid]
        gridded = gridded.reshape(layout.places, layout.rows, heads, parts * few, -1).swapaxes(1, 2)
        return gridded.reshape(layout.places, heads, layout.rows * parts * few, -1)

    def back(self, array: mx.array) -> mx.array:
        layout, (heads, parts, few) = self._layout, self._shape
        array = array.reshape(layout.places, heads, layout.rows, parts * few, -1).swapaxes(1, 2)
        array = array.reshape(layout.places * layout.rows, heads, parts, few, -1)
        return array if layout.cells is None else array[layout.cells]
