"""What each query of a training pass sees, asked a tile at a time: a block of queries by a block of keys."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

MASKED = -1e30
"""What is added to the score of a key that is not seen. Finite, so that no difference of two of them is NaN."""


class Sight(Protocol):
    """Blocks are ranges of places: `rows` of a batch, `queries` and `keys` of a row."""

    def any(self, queries: range, keys: range) -> bool:
        """Whether some query may see some key of the rows' own."""
        ...

    def bias(self, rows: slice, queries: range, keys: range) -> mx.array | None:
        """What is added to scores of the rows' own keys, 0 or `MASKED`: float32 `[rows or 1, queries, keys]`.

        None where every query sees every key.
        """
        ...

    def of_prompts(self, rows: slice, queries: range, keys: range) -> mx.array | None:
        """The same for keys of the rows' prompts: `[rows or 1, queries or 1, keys]`."""
        ...


class Causal:
    """Each token sees itself and what stands before it, within the last `window` tokens if there is one.

    `lengths` `[B]` are of the rows' prompts, where these are shared; without them every prompt is seen whole.
    """

    def __init__(self, window: int | None = None, lengths: mx.array | None = None) -> None:
        self._window, self._lengths = window, lengths
        self._made: dict[tuple[int, int, int], mx.array] = {}

    def any(self, queries: range, keys: range) -> bool:
        return keys.start < queries.stop and not (self._window and queries.start - keys.stop + 1 >= self._window)

    def bias(self, rows: slice, queries: range, keys: range) -> mx.array | None:  # noqa: ARG002  all see the same
        within = not self._window or queries.stop - 1 - keys.start < self._window
        if keys.stop - 1 <= queries.start and within:
            return None
        shape = queries.start - keys.start, len(queries), len(keys)
        if shape not in self._made:  # the same along the diagonal
            ahead = shape[0] + mx.arange(shape[1])[:, None] - mx.arange(shape[2])
            sees = ahead >= 0
            self._made[shape] = _bias(sees & (ahead < self._window) if self._window else sees)[None]
        return self._made[shape]

    def of_prompts(self, rows: slice, queries: range, keys: range) -> mx.array | None:
        if self._lengths is None:
            assert not self._window, "a window begins at a distance from the prompt's end"
            return None
        lengths, places = self._lengths[rows, None, None], mx.arange(keys.start, keys.stop)
        sees = places < lengths
        if self._window:
            ahead = lengths + mx.arange(queries.start, queries.stop)[:, None] - places
            sees = sees & (ahead < self._window)
        return _bias(sees)


class InLine:
    """Completions behind one another: each token sees its own prompt, and its own row up to itself.

    `positions`, `prompts` and `rows` are `grpo.model.lines.Lines`' columns, `[R, W]` each.
    """

    def __init__(self, positions: mx.array, prompts: mx.array, rows: mx.array, window: int | None) -> None:
        self._columns, self._window = (positions, prompts, rows), window

    def any(self, queries: range, keys: range) -> bool:
        return keys.start < queries.stop

    def bias(self, rows: slice, queries: range, keys: range) -> mx.array | None:
        ours = [column[rows, queries.start : queries.stop, None] for column in self._columns]
        theirs = [column[rows, None, keys.start : keys.stop] for column in self._columns]
        (position, prompt, row), (place, its_prompt, its_row) = ours, theirs
        sees = (prompt == its_prompt) & ((its_row == 0) | (its_row == row))
        if keys.stop - 1 > queries.start:
            sees = sees & (mx.arange(queries.start, queries.stop)[:, None] >= mx.arange(keys.start, keys.stop))
        if self._window:
            sees = sees & (position - place < self._window)
        return _bias(sees)

    def of_prompts(self, rows: slice, queries: range, keys: range) -> mx.array | None:
        raise NotImplementedError("a line holds its prompts itself")


class Masked:
    """Whatever a mask of booleans says, `[B or 1, T, K]`."""

    def __init__(self, mask: mx.array) -> None:
        self._mask = mask

    def any(self, queries: range, keys: range) -> bool:  # noqa: ARG002  booleans are known when they are computed
        return True

    def bias(self, rows: slice, queries: range, keys: range) -> mx.array | None:
        mask = self._mask if len(self._mask) == 1 else self._mask[rows]
        return _bias(mask[:, queries.start : queries.stop, keys.start : keys.stop])

    def of_prompts(self, rows: slice, queries: range, keys: range) -> mx.array | None:
        raise NotImplementedError("a mask is of a row's own keys")


def _bias(sees: mx.array) -> mx.array:
    return mx.where(sees, mx.array(0.0), mx.array(MASKED))
