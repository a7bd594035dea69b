"""The loops of attention in tiles (`grpo.model.attention`), over some rows and heads.

A tile is a block of queries times a block of keys. Tiles without a visible key are skipped, which is half of a causal
pass. MLX computes independent operations in any order, with many in flight, so each tile waits for the previous one.

In the shapes below, R rows and N key heads are computed together, and G query heads share a key head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from grpo.backend.device import on_gpu
from grpo.backend.maths import exp_of, exponents_unit, largest_power_of_two
from grpo.model.sight import Sight

NARROWEST = 64
"""Fewest tokens of a tile, unless the sequence is shorter."""
WIDEST = {False: 256, True: 1024}
"""Most tokens of a tile, by whether there is a GPU."""
SCORES = {False: 2**18, True: 2**24}
"""Most scores in the tiles of all rows and heads that are computed together, by whether there is a GPU: 1 MB on a CPU,
which fits in its cache, and 64 MB on a GPU, where each operation is a launch. A single head of a row may need more."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """The settings that all chunks of a call share.

    `blocks` are ranges of queries; `tiles` are ranges of keys, of which the first `before` belong to prompts; `keeps`
    says whether the softmax weights are stored for the backward pass; `most` is the largest number of scores at a time.
    """

    scale: float
    sight: Sight
    blocks: tuple[range, ...]
    tiles: tuple[range, ...]
    before: int
    keeps: bool
    most: int

    @classmethod
    def of(cls, scale: float, sight: Sight, queries: int, keys: int, prompts: int, keeps: bool) -> Tiling:
        """The tiling for these numbers of queries, of the rows' own keys, and of the prompts' keys."""
        gpu = on_gpu()
        # A quarter of the tokens, because smaller tiles compute fewer hidden scores.
        size = min(WIDEST[gpu], max(NARROWEST, largest_power_of_two(max(queries, keys) // 4)))
        before = ranges(prompts, WIDEST[gpu])
        return cls(scale, sight, ranges(queries, size), (*before, *ranges(keys, size)), len(before), keeps, SCORES[gpu])

    def scores(self, repeats: int) -> int:
        """Number of scores in the largest tile of a key head, if `repeats` query heads share it."""
        return repeats * len(self.blocks[0]) * max(map(len, self.tiles))


class _Tile(NamedTuple):
    """Keys and values, some of which a block of queries sees, and the bias for their scores, if any."""

    place: int
    keys: mx.array
    values: mx.array
    bias: mx.array | None


class BackwardInputs(NamedTuple):
    """The inputs of a backward pass: the gradient of the output, `[R, N, G, T, E]`, the output, and the logarithms of
    the sums of exponentials `[R, N, G, T, 1]`."""

    slopes: mx.array
    out: mx.array
    sums: mx.array


class _Softmax(NamedTuple):
    """The running softmax of each query over the keys so far: the greatest score, the sum of exponentials, and the
    weighted sum of values."""

    highest: mx.array
    weight: mx.array
    total: mx.array


Slopes = list[mx.array]


class Chunk:
    """Some rows and heads of a call.

    queries `[R, N, G, T, D]`; the rows' own keys `[R, N, K, D]` and values `[R, N, K, E]`; keys and values of each
    row's prompt (R is 1 if all rows share one prompt); sinks `[N, G, 1]`.
    """

    def __init__(
        self,
        tiling: Tiling,
        rows: slice,
        queries: mx.array,
        own: Sequence[mx.array],
        prompts: Sequence[mx.array],
        sinks: mx.array | None,
    ) -> None:
        self._tiling, self._rows, self._queries, self._sinks = tiling, rows, queries, sinks
        (self._keys, self._values), self._prompts = own, prompts

    def forward(self, after: list[mx.array]) -> tuple[mx.array, mx.array, list[mx.array]]:
        """The output `[R, N, G, T, E]`, the logarithms of the sums of exponentials `[R, N, G, T, 1]`, and the stored
        weights. The computation begins after `after`."""
        outs, sums, kept = [], [], list[mx.array]()
        for block in self._tiling.blocks:
            queries = self._scaled(block)
            state, weights = self._begun(block), list[mx.array]()
            for tiles in self._together(block):
                queries = mx.depends(queries, after) if after else queries
                state, weights = _with_tiles(state, queries, tiles, self._tiling.keeps)
                after = [state.weight, state.total]  # without the total, all blocks' weights would pile up
            assert state is not None, "every query sees a key"
            total = state.total if self._tiling.keeps else state.total / state.weight
            outs.append(self._by_head(total.astype(queries.dtype), block))
            sums.append(self._by_head(state.highest + mx.log(state.weight) * exponents_unit(), block))
            kept += weights
        return mx.concatenate(outs, axis=3), mx.concatenate(sums, axis=3), kept

    def backward(
        self, given: BackwardInputs, kept: list[mx.array], after: list[mx.array]
    ) -> tuple[mx.array, Slopes, Slopes]:
        """The gradients of queries, of keys and values, and of each row's prompt's keys and values.

        `kept` begins with this chunk's weights, which are removed from it.
        """
        of_queries, of_tiles = [], dict[int, Slopes]()
        for block in self._tiling.blocks:
            queries = self._scaled(block)
            slope, out, log = (_flat(array, block) for array in given)
            product = (slope.astype(mx.float32) * out).sum(axis=-1, keepdims=True)
            found: mx.array | None = None
            for tile in self._seen(block):
                if after:
                    slope, queries = mx.depends([slope, queries], after)
                weights = kept.pop(0) if self._tiling.keeps else exp_of(_scores(queries, tile) - log)
                of_weights = (slope @ tile.values.swapaxes(-1, -2)).astype(mx.float32)
                of_scores = (weights * (of_weights - product)).astype(queries.dtype)
                pair = [
                    of_scores.swapaxes(-1, -2) @ queries,
                    weights.astype(slope.dtype).swapaxes(-1, -2) @ slope,
                ]
                of_tiles[tile.place] = _added(of_tiles.get(tile.place), pair)
                (found,) = _added(None if found is None else [found], [of_scores @ tile.keys])
                after = [*of_tiles[tile.place], found]
            assert found is not None, "every query sees a key"
            of_queries.append(self._by_head(found * self._tiling.scale, block))
        before = self._tiling.before
        prompts = self._joined(of_tiles, range(before)) if before else []
        return (
            mx.concatenate(of_queries, axis=3),
            self._joined(of_tiles, range(before, len(self._tiling.tiles))),
            prompts,
        )

    def _seen(self, block: range) -> Iterator[_Tile]:
        """The tiles in which a query of the block may see a key."""
        tiling = self._tiling
        for place, tile in enumerate(tiling.tiles):
            part = slice(tile.start, tile.stop)
            if place < tiling.before:
                keys, values = (array[:, :, part] for array in self._prompts)
                yield _Tile(place, keys, values, tiling.sight.of_prompts(self._rows, block, tile))
            elif tiling.sight.any(block, tile):
                bias = tiling.sight.bias(self._rows, block, tile)
                yield _Tile(place, self._keys[:, :, part], self._values[:, :, part], bias)

    def _together(self, block: range) -> list[list[_Tile]]:
        """The block's tiles, one per list; all in one list if weights are stored, which need the greatest score."""
        tiles = list(self._seen(block))
        return [tiles] if self._tiling.keeps else [[tile] for tile in tiles]

    def _scaled(self, block: range) -> mx.array:
        """The block's queries, scaled, `[R, N, G · block, D]`."""
        return _flat(self._queries, block) * (self._tiling.scale * exponents_unit())

    def _by_head(self, array: mx.array, block: range) -> mx.array:
        return mx.unflatten(array, 2, (-1, len(block)))

    def _begun(self, block: range) -> _Softmax | None:
        """The softmax before the first tile: the head's sink, or None without sinks."""
        if self._sinks is None:
            return None
        shape = len(self._queries), *self._sinks.shape[:2], len(block)
        highest = mx.broadcast_to(self._sinks * exponents_unit(), shape).flatten(2)[..., None]
        return _Softmax(highest, mx.ones(highest.shape), mx.zeros((*highest.shape[:3], self._values.shape[-1])))

    def _joined(self, of_tiles: dict[int, Slopes], places: range) -> Slopes:
        """The gradients of keys and values, concatenated from their tiles; zero for tiles that no query sees."""
        rows, heads = self._keys.shape[:2]
        pieces = []
        for place in places:
            shapes = [
                (rows, heads, len(self._tiling.tiles[place]), array.shape[-1]) for array in (self._keys, self._values)
            ]
            pieces.append(of_tiles.get(place) or [mx.zeros(shape) for shape in shapes])
        of_keys, of_values = (mx.concatenate(list(arrays), axis=2) for arrays in zip(*pieces, strict=True))
        return [of_keys * (1 / exponents_unit()), of_values]


def _with_tiles(
    state: _Softmax | None, queries: mx.array, tiles: list[_Tile], keeps: bool
) -> tuple[_Softmax, list[mx.array]]:
    """The running softmax with more tiles, and their weights if it `keeps` them, which needs all tiles in one call.

    If the new tiles have a greater score, the former sums are scaled down.
    """
    scores = [_scores(queries, tile) for tile in tiles]
    tops = [part.max(axis=-1, keepdims=True) for part in scores]
    highest = _all(mx.maximum, tops if state is None else [state.highest, *tops])
    powers = [exp_of(part - highest) for part in scores]
    weight = _all(mx.add, [part.sum(axis=-1, keepdims=True) for part in powers])
    if state is not None:
        less = exp_of(state.highest - highest)
        weight = weight + state.weight * less
    if keeps:
        powers = [part / weight for part in powers]
    totals = [part.astype(tile.values.dtype) @ tile.values for part, tile in zip(powers, tiles, strict=True)]
    total = _all(mx.add, [part.astype(mx.float32) for part in totals])
    if state is not None:
        total = total + state.total * less
    return _Softmax(highest, weight, total), powers if keeps else []


def _all(operation: object, arrays: list[mx.array]) -> mx.array:
    first, *others = arrays
    for array in others:
        first = operation(first, array)  # type: ignore[operator]
    return first


def _scores(queries: mx.array, tile: _Tile) -> mx.array:
    """The scores of a tile in float32, `[R, N, G · block, tile]`."""
    scores = (queries @ tile.keys.swapaxes(-1, -2)).astype(mx.float32)
    if tile.bias is None:
        return scores
    each = tile.bias.shape[1] if tile.bias.shape[1] > 1 else scores.shape[2]
    return (mx.unflatten(scores, 2, (-1, each)) + tile.bias[:, None, None]).flatten(2, 3)


def _flat(array: mx.array, block: range) -> mx.array:
    """A block of `[R, N, G, T, D]` as `[R, N, G · block, D]`."""
    return array[:, :, :, block.start : block.stop].flatten(2, 3)


def _added(sofar: Slopes | None, more: Slopes) -> Slopes:
    """The sums of arrays in float32; `more` alone if there is nothing so far."""
    more = [array.astype(mx.float32) for array in more]
    return more if sofar is None else [total + array for total, array in zip(sofar, more, strict=True)]


def ranges(number: int, size: int) -> tuple[range, ...]:
    """The numbers below `number`, in ranges of at most `size`."""
    return tuple(range(start, min(start + size, number)) for start in range(0, number, size))
