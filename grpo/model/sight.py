"""Which keys each query of a training pass may see, by tiles: a block of queries times a block of keys."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

MASKED = -1e30
"""Added to the score of a hidden key. Finite, so that the difference of two such scores is not NaN."""


class Sight(Protocol):
    """Visibility by blocks. A block is a range of indices: `rows` in a batch, `queries` and `keys` in a row."""

    def any(self, queries: range, keys: range) -> bool:
        """Whether any of these queries may see any of these keys of its own row."""
        ...

    def bias(self, rows: slice, queries: range, keys: range) -> mx.array | None:
        """The bias for scores of the rows' own keys, 0 or `MASKED`: float32 `[rows or 1, queries, keys]`.

        None if every query sees every key.
        """
        ...

    def of_prompts(self, rows: slice, queries: range, keys: range) -> mx.array | None:
        """The bias for keys of the rows' prompts: `[rows or 1, queries or 1, keys]`."""
        ...


class Causal:
    """Each token sees itself and the tokens before it; with a `window`, only the last `window` of them.

    `lengths` `[B]` are the lengths of the rows' shared prompts. Without them every token of a prompt is visible.
    """

    def __init__(self, window: int | None = None, lengths: mx.array | None = None) -> None:
        self._window, self._lengths = window, lengths
        self._made: dict[tuple[int, int, int], mx.array] = {}

    def any(self, queries: range, keys: range) -> bool:
        return keys.start < queries.stop and not (self._window and queries.start - keys.stop + 1 >= self._window)

    def bias(self, rows: slice, queries: range, keys: range) -> mx.array | None:  # noqa: ARG002  the same for all rows
        within = not self._window or queries.stop - 1 - keys.start < self._window
        if keys.stop - 1 <= queries.start and within:
            return None
        shape = queries.start - keys.start, len(queries), len(keys)
        if shape not in self._made:  # tiles at the same distance from the diagonal share one bias
            ahead = shape[0] + mx.arange(shape[1])[:, None] - mx.arange(shape[2])
            sees = ahead >= 0
            self._made[shape] = _bias(sees & (ahead < self._window) if self._window else sees)[None]
        return self._made[shape]

    def of_prompts(self, rows: slice, queries: range, keys: range) -> mx.array | None:
        if self._lengths is None:
            assert not self._window, "a window needs the prompts' lengths"
            return None
        lengths, places = self._lengths[rows, None, None], mx.arange(keys.start, keys.stop)
        sees = places < lengths
        if self._window:
            ahead = lengths + mx.arange(queries.start, queries.stop)[:, None] - places
            sees = sees & (ahead < self._window)
        return _bias(sees)


class InLine:
    """Packed completions: each token sees its own prompt, and its own completion up to itself.

    `positions`, `prompts` and `rows` are columns of `grpo.model.lines.Lines`, `[R, W]` each.
    """

    def __init__(self, positions: mx.array, prompts: mx.array, rows: mx.array, window: int | None) -> None:
        self._columns, self._window = (positions, prompts, rows), window

    def any(self, queries: range, keys: range) -> bool:
        return keys.start < queries.stop

    def bias(self, rows: slice, queries: range, keys: range) -> mx.array | None:
        of_queries = [column[rows, queries.start : queries.stop, None] for column in self._columns]
        of_keys = [column[rows, None, keys.start : keys.stop] for column in self._columns]
        (query_position, query_prompt, query_row), (key_position, key_prompt, key_row) = of_queries, of_keys
        sees = (query_prompt == key_prompt) & ((key_row == 0) | (key_row == query_row))
        if keys.stop - 1 > queries.start:
            sees = sees & (mx.arange(queries.start, queries.stop)[:, None] >= mx.arange(keys.start, keys.stop))
        if self._window:
            sees = sees & (query_position - key_position < self._window)
        return _bias(sees)

    def of_prompts(self, rows: slice, queries: range, keys: range) -> mx.array | None:
        raise NotImplementedError("a packed line contains its prompts")


class Masked:
    """The visibility given by a boolean mask `[B or 1, T, K]`."""

    def __init__(self, mask: mx.array) -> None:
        self._mask = mask

    def any(self, queries: range, keys: range) -> bool:  # noqa: ARG002  the mask is not evaluated yet
        return True

    def bias(self, rows: slice, queries: range, keys: range) -> mx.array | None:
        mask = self._mask if len(self._mask) == 1 else self._mask[rows]
        return _bias(mask[:, queries.start : queries.stop, keys.start : keys.stop])

    def of_prompts(self, rows: slice, queries: range, keys: range) -> mx.array | None:
        raise NotImplementedError("a mask covers only a row's own keys")


def _bias(sees: mx.array) -> mx.array:
    return mx.where(sees, mx.array(0.0), mx.array(MASKED))
