"""The loops of attention in tiles (`grpo.model.attention`) over some rows and heads.

A tile is a block of queries by a block of keys. Tiles that nobody sees are left out, so half of a causal pass is. MLX
may compute independent operations in any order and has many in flight, so each tile waits for the tile before it.

In the shapes below R rows and N heads of keys are computed together, and G heads of queries share a head of keys.
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
"""Tokens of a tile, at least, if there are as many."""
WIDEST = {False: 256, True: 1024}
"""And at most, on a CPU and on a GPU."""
SCORES = {False: 2**18, True: 2**24}
"""Scores in the tiles of all the rows and heads that are computed together: 1 MB on a CPU, whose cache holds them, and
64 MB on a GPU, where each operation is a launch. A single head of a row may need more."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """What all chunks of a call share.

    `blocks` of queries; `tiles`, blocks of keys, of which the first `before` are of prompts; whether the backward pass
    gets the weights (`keeps`); and the `most` scores at a time.
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
        """For so many queries, keys of their own, and keys of prompts."""
        gpu = on_gpu()
        # A quarter of the tokens: the smaller a tile, the less is computed that nobody sees.
        size = min(WIDEST[gpu], max(NARROWEST, largest_power_of_two(max(queries, keys) // 4)))
        before = ranges(prompts, WIDEST[gpu])
        return cls(scale, sight, ranges(queries, size), (*before, *ranges(keys, size)), len(before), keeps, SCORES[gpu])

    def scores(self, repeats: int) -> int:
        """Of the largest tile of a head of keys, whose queries have so many heads."""
        return repeats * len(self.blocks[0]) * max(map(len, self.tiles))


class _Tile(NamedTuple):
    """Keys and values of which a block of queries sees some, and what is added to their scores, if anything."""

    place: int
    keys: mx.array
    values: mx.array
    bias: mx.array | None


class BackwardInputs(NamedTuple):
    """What a backward pass begins with: the gradient of what came out, `[R, N, G, T, E]`, what came out, and the
    logarithms of the sums of exponentials `[R, N, G, T, 1]`."""

    slopes: mx.array
    out: mx.array
    sums: mx.array


class _Softmax(NamedTuple):
    """Of the keys so far, for each query: the greatest score, the sum of exponentials, and of values by them."""

    highest: mx.array
    weight: mx.array
    total: mx.array


Slopes = list[mx.array]


class Chunk:
    """Some rows and heads of a call.

    queries `[R, N, G, T, D]`; the rows' own keys `[R, N, K, D]` and values `[R, N, K, E]`; those of each row's prompt
    (where all rows have one prompt, R is 1 there); sinks `[N, G, 1]`.
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
        """What comes out `[R, N, G, T, E]`, the logarithms of the sums of exponentials `[R, N, G, T, 1]`, and the
        weights that are kept. Begins when `after` is computed."""
        outs, sums, kept = [], [], list[mx.array]()
        for block in self._tiling.blocks:
            queries = self._scaled(block)
            state, weights = self._begun(block), list[mx.array]()
            for tiles in self._together(block):
                queries = mx.depends(queries, after) if after else queries
                state, weights = _with_tiles(state, queries, tiles, self._tiling.keeps)
                after = [state.weight, state.total]  # without the latter all blocks' weights would wait for it
            assert state is not None, "every query sees a key"
            total = state.total if self._tiling.keeps else state.total / state.weight
            outs.append(self._by_head(total.astype(queries.dtype), block))
            sums.append(self._by_head(state.highest + mx.log(state.weight) * exponents_unit(), block))
            kept += weights
        return mx.concatenate(outs, axis=3), mx.concatenate(sums, axis=3), kept

    def backward(
        self, given: BackwardInputs, kept: list[mx.array], after: list[mx.array]
    ) -> tuple[mx.array, Slopes, Slopes]:
        """The gradients of queries, of keys and values, and of the prompts' keys and values for each row.

        `kept` begins with this chunk's weights, which are taken from it.
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
        """The tiles of which some query of the block may see something."""
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
        """The same, one at a time; all at once if weights are kept, which are relative to the greatest score of all."""
        tiles = list(self._seen(block))
        return [tiles] if self._tiling.keeps else [[tile] for tile in tiles]

    def _scaled(self, block: range) -> mx.array:
        """The block's queries, `[R, N, G · block, D]`."""
        return _flat(self._queries, block) * (self._tiling.scale * exponents_unit())

    def _by_head(self, array: mx.array, block: range) -> mx.array:
        return mx.unflatten(array, 2, (-1, len(block)))

    def _begun(self, block: range) -> _Softmax | None:
        """With sinks, each query begins with its head's."""
        if self._sinks is None:
            return None
        shape = len(self._queries), *self._sinks.shape[:2], len(block)
        highest = mx.broadcast_to(self._sinks * exponents_unit(), shape).flatten(2)[..., None]
        return _Softmax(highest, mx.ones(highest.shape), mx.zeros((*highest.shape[:3], self._values.shape[-1])))

    def _joined(self, of_tiles: dict[int, Slopes], places: range) -> Slopes:
        """The gradients of keys and values by those of their tiles, some of which nobody may see."""
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
    """The softmax with more tiles, and if it `keeps` them, their weights: then these are all tiles there are.

    What was before is scaled down where these have a greater score.
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
    """In float32, `[R, N, G · block, tile]`."""
    scores = (queries @ tile.keys.swapaxes(-1, -2)).astype(mx.float32)
    if tile.bias is None:
        return scores
    each = tile.bias.shape[1] if tile.bias.shape[1] > 1 else scores.shape[2]
    return (mx.unflatten(scores, 2, (-1, each)) + tile.bias[:, None, None]).flatten(2, 3)


def _flat(array: mx.array, block: range) -> mx.array:
    """A block of `[R, N, G, T, D]` as `[R, N, G · block, D]`."""
    return array[:, :, :, block.start : block.stop].flatten(2, 3)


def _added(sofar: Slopes | None, more: Slopes) -> Slopes:
    """In float32."""
    more = [array.astype(mx.float32) for array in more]
    return more if sofar is None else [total + array for total, array in zip(sofar, more, strict=True)]


def ranges(number: int, size: int) -> tuple[range, ...]:
    """The numbers below `number`, so many at a time."""
    return tuple(range(start, min(start + size, number)) for start in range(0, number, size))
