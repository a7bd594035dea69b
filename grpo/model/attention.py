"""Attention in tiles for training: memory grows linearly with the tokens, not quadratically.

MLX's attention stores the scores of every layer for the backward pass, `[B, heads, T, T]`, wherever it has no fused
backward pass: on a CPU and on Metal. Here the forward pass stores its output and one number per query, and the backward
pass recomputes the scores tile by tile (FlashAttention-2, arXiv 2307.08691, in stock operations). If there are few
scores, they are stored, which is faster. `grpo.model.tiles` contains the loops; this module divides the work into
chunks of rows and heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx

from grpo.backend.maths import exp_of, exponents_unit
from grpo.model.promptrows import looked_up, summed_by_prompt
from grpo.model.sight import Sight
from grpo.model.tiles import BackwardInputs, Chunk, Tiling, ranges

KEPT = 2**22
"""Most scores of one call that are stored for the backward pass: 16 MB."""


def most_pairs(heads: int) -> int:
    """Most (query, key) pairs for which a call with this many query heads stores scores. Larger calls store none."""
    return KEPT // heads


class PromptKeysValues(NamedTuple):
    """Keys `[P, H, L, D]` and values `[P, H, L, E]` of prompts; row b continues from prompt `rows[b]`."""

    keys: mx.array
    values: mx.array
    rows: mx.array


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    sight: Sight,
    prompts: PromptKeysValues | None = None,
    sinks: mx.array | None = None,
    gradient: bool = True,
) -> mx.array:
    """Softmax attention with a gradient for every array: `[B, HQ, T, E]` in the queries' dtype.

    queries `[B, HQ, T, D]`, keys `[B, H, K, D]`, values `[B, H, K, E]`, where HQ is a multiple of H. `sight` defines
    which keys each query sees. The keys of `prompts` come before the rows' own keys. `sinks` `[HQ]` are additional
    scores without a value: they take weight from the keys (arXiv 2309.17453). Without `gradient` no scores are stored,
    and a row's result does not depend on the number of rows.
    """
    index = None if prompts is None else prompts.rows
    given = [queries, keys, values, *(prompts[:2] if prompts else ()), *([] if sinks is None else [sinks])]
    if not gradient:
        return _Call(given, index, scale, sight, most_kept=0).forward()[0]

    @mx.custom_function
    def attend(*arrays: mx.array) -> tuple[mx.array, ...]:
        return _Call(arrays, index, scale, sight, KEPT).forward()

    @attend.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        return _Call(primals, index, scale, sight, KEPT).backward(cotangents[0], *outputs)

    out, *_ = cast(tuple[mx.array, ...], attend(*given))
    return out


class _Call:
    """The arrays of one call, and the chunks that they are divided into."""

    def __init__(
        self, arrays: Sequence[mx.array], index: mx.array | None, scale: float, sight: Sight, most_kept: int
    ) -> None:
        self._arrays, self._index = arrays, index
        queries, *others = arrays
        self._keys, self._values, *others = (mx.contiguous(array) for array in others)
        self._prompts = others[:2] if index is not None else []
        self._sinks = others[-1] if len(others) % 2 else None
        (rows, heads, length, width), groups = queries.shape, self._keys.shape[1]
        self._repeats = heads // groups
        before = self._prompts[0].shape[2] if self._prompts else 0
        keys = before + self._keys.shape[2]
        self._tiling = Tiling.of(
            scale, sight, length, self._keys.shape[2], before, heads * rows * length * keys <= most_kept
        )
        copied = before * (width + self._values.shape[-1]) if before and self._prompts[0].shape[0] > 1 else 0
        self._cuts = _cut(rows, groups, max(self._tiling.scores(self._repeats), copied), self._tiling.most)
        self._queries = self._by_head(queries)

    def forward(self) -> tuple[mx.array, ...]:
        """The output, `[B, HQ, T, E]`, the logarithms of the sums of exponentials, `[B, H, G, T, 1]`, and the stored
        weights."""
        outs, sums, kept, after = list[mx.array](), list[mx.array](), list[mx.array](), list[mx.array]()
        for rows, heads in self._cuts:
            out, sum_, weights = self._chunk(rows, heads).forward(after)
            outs, sums, kept, after = [*outs, out], [*sums, sum_], [*kept, *weights], [out]
        return self._together(outs).flatten(1, 2), self._together(sums), *kept

    def backward(self, slopes: mx.array, out: mx.array, sums: mx.array, *kept: mx.array) -> tuple[mx.array, ...]:
        """The gradients of all arrays, from the gradient of `out` and what `forward` returned."""
        slopes, out = self._by_head(slopes), self._by_head(out)
        found, theirs, waiting = [], dict[int, list[mx.array]](), list(kept)
        after = list[mx.array]()
        for rows, heads in self._cuts:
            given = BackwardInputs(*(array[rows, heads] for array in (slopes, out, sums)))
            of_queries, own, of_prompts = self._chunk(rows, heads).backward(given, waiting, after)
            found.append([of_queries, *own])
            after = found[-1]
            if of_prompts:
                theirs[heads.start] = self._summed(theirs.get(heads.start), of_prompts, rows)
                after = [*after, *theirs[heads.start]]
        result = [self._together(list(arrays)) for arrays in zip(*found, strict=True)]
        result += [mx.concatenate(list(arrays), axis=1) for arrays in zip(*theirs.values(), strict=True)]
        if self._sinks is not None:
            weights = exp_of(self._by_row(self._sinks)[..., None] * exponents_unit() - sums)
            result.append(-(weights * slopes.astype(mx.float32) * out).sum(axis=(0, 3, 4)))
        return tuple(
            array.reshape(given.shape).astype(given.dtype) for array, given in zip(result, self._arrays, strict=True)
        )

    def _chunk(self, rows: slice, heads: slice) -> Chunk:
        prompts = [self._of_rows(array[:, heads], rows) for array in self._prompts]
        sinks = None if self._sinks is None else self._by_row(self._sinks)[heads]
        own = [array[rows, heads] for array in (self._keys, self._values)]
        return Chunk(self._tiling, rows, self._queries[rows, heads], own, prompts, sinks)

    def _of_rows(self, prompts: mx.array, rows: slice) -> mx.array:
        """The prompts of these rows, copied only while the rows are computed. A single prompt is not repeated."""
        return prompts if prompts.shape[0] == 1 else looked_up(prompts, cast(mx.array, self._index)[rows])

    def _summed(self, sofar: list[mx.array] | None, found: Sequence[mx.array], rows: slice) -> list[mx.array]:
        """The gradients of prompts' keys and values: the sum over the rows so far, plus these rows."""
        index, number = cast(mx.array, self._index)[rows], self._prompts[0].shape[0]
        sums = [summed_by_prompt(array, index, number) for array in found]
        return sums if sofar is None else [total + more for total, more in zip(sofar, sums, strict=True)]

    def _by_head(self, array: mx.array) -> mx.array:
        """`[B, HQ, …]` as `[B, H, G, …]`: query heads grouped by the key head that they share."""
        return mx.unflatten(array, 1, (-1, self._repeats))

    def _by_row(self, sinks: mx.array) -> mx.array:
        """`[HQ]` as `[H, G, 1]` in float32."""
        return sinks.astype(mx.float32).reshape(-1, self._repeats, 1)

    def _together(self, arrays: list[mx.array]) -> mx.array:
        """The arrays of all chunks concatenated, `[B, H, …]`."""
        each = sum(rows.start == 0 for rows, _ in self._cuts)
        whole = [mx.concatenate(arrays[i : i + each], axis=1) for i in range(0, len(arrays), each)]
        return mx.concatenate(whole)


def _cut(rows: int, heads: int, size: int, most: int) -> list[tuple[slice, slice]]:
    """Divide the work: rows with all their heads, or some heads of one row. One head of a row has the size `size`, and
    a chunk at most `most`."""
    fitting = max(1, most // size)
    if fitting >= heads:
        return [(slice(part.start, part.stop), slice(0, heads)) for part in ranges(rows, fitting // heads)]
    parts = [slice(part.start, part.stop) for part in ranges(heads, fitting)]
    return [(slice(row, row + 1), part) for row in range(rows) for part in parts]
