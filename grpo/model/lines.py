"""Completions behind one another: several go through the model in one line, each as if it were alone.

A line holds a prompt once, and behind it as many of its completions as there is room for; then another prompt with its
completions, and so on. A mask keeps them apart, and each token has the position that it has in its own sequence, so
what comes out is what whole sequences would give. With lengths that differ, lines leave far less padding than rows of
one completion each.

A mask takes memory by the square of a line's width. A line that holds a single row needs none: the row sees what stands
before each of its tokens, and nobody reads what comes out of the padding behind it.

A completion of T tokens takes T places: before its first token stands its prompt's last token, which predicts it, and
its own last token is left out, because it predicts nothing. So each place predicts one token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from grpo.backend.blame import cause, is_ours
from grpo.backend.device import apart
from grpo.model.attending import meaning
from grpo.model.head import Body
from grpo.model.promptcaches import Kind, PromptKeys, causal_mask
from grpo.model.sharing import hidden_at, whole_sequences
from grpo.model.sight import InLine
from grpo.model.standins import put_before

_Ids = Sequence[int]


class Unpacked(ValueError):
    """Why completions of a model cannot go through it behind one another."""


class Lines(NamedTuple):
    """R lines of W places, int32 `[R, W]` each; all are 0 in places that nothing stands in.

    token_ids   what the model reads
    targets     the token that the place predicts, 0 in a prompt
    rows        which row of the batch, counted from 1; 0 in a prompt
    positions   the place of the token in its own sequence
    prompts     which prompt of this line the token belongs to, counted from 1

    Without `positions` and `prompts` each line holds a single row, which begins where the line does.
    """

    token_ids: mx.array
    targets: mx.array
    rows: mx.array
    positions: mx.array | None = None
    prompts: mx.array | None = None


def room(prompt: _Ids, completion: _Ids) -> int:
    """The places that a completion takes in a line of its own."""
    return len(prompt) - 1 + len(completion)


def rows_by_line(rows: Sequence[tuple[_Ids, _Ids]], width: int) -> list[list[int]]:
    """Prompts with completions, in their order, as lines of `width` places: which rows each line holds.

    A new line begins where a row does not fit any more. Each row must fit in a line of its own.
    """
    lines: list[list[int]] = []
    free, held = -1, set[_Ids]()
    for number, (prompt, completion) in enumerate(rows):
        needed = len(completion) if prompt in held else room(prompt, completion)
        if needed > free:
            lines.append([])
            free, held, needed = width, set(), room(prompt, completion)
        lines[-1].append(number)
        free -= needed
        held.add(prompt)
    return lines


def laid_out(
    rows: Sequence[tuple[_Ids, _Ids]], count: int, width: int, alone: bool = False
) -> tuple[mx.array, list[int]]:
    """Rows as arrays of `count` lines (see `rows_by_line`): those of `Lines` in one, `[5, R, W]` int32, and for each
    row the first of its places, counted over all lines. With each row `alone` in a line they are `[3, R, W]`."""
    made, starts = np.zeros((5, count, width), np.int32), []
    for line, numbers in enumerate([[number] for number in range(len(rows))] if alone else rows_by_line(rows, width)):
        end, held = 0, dict[_Ids, int]()
        for number in numbers:
            prompt, completion = rows[number]
            before, length = len(prompt) - 1, len(completion)
            if prompt not in held:
                held[prompt] = len(held) + 1
                place = slice(end, end + before)
                made[0, line, place], made[3, line, place] = prompt[:-1], np.arange(before)
                made[4, line, place] = held[prompt]
                end += before
            place = slice(end, end + length)
            made[0, line, place], made[1, line, place] = (prompt[-1], *completion[:-1]), completion
            made[2, line, place], made[4, line, place] = number + 1, held[prompt]
            made[3, line, place] = np.arange(before, before + length)
            starts.append(line * width + end)
            end += length
    return mx.array(made[:3] if alone else made), starts


def at_rows(values: mx.array, starts: mx.array, length: int, rows: mx.array) -> mx.array:
    """Float32 values of places, `[R, W]`, as rows of completions: `[B, length]`. Behind a row's end they mean nothing.

    `rows` `[R, W]` says whose place each is, as in `Lines`. So the gradient is looked up as well, by the same kernel
    for integers: a CUDA machine takes seconds to build another, and to build what scatters.
    """

    @mx.custom_function
    def taken(values: mx.array) -> mx.array:
        places = mx.add(*apart(starts[:, None], mx.arange(length)[None]))
        return _looked_up(values, mx.minimum(*apart(places, mx.array(values.size - 1))))

    @taken.vjp
    def given_back(values: mx.array, slopes: mx.array, _: mx.array) -> mx.array:
        nobody, owners = mx.array([slopes.size]), rows.reshape(-1)
        begins = mx.concatenate([nobody, mx.arange(0, slopes.size, length)])[owners]  # of the place's row in slopes
        first = mx.concatenate([mx.array([0]), starts])[owners]
        (within,) = apart(mx.arange(values.size) - first)
        padded = mx.concatenate([slopes.reshape(-1), mx.zeros(1)])
        return _looked_up(padded, mx.minimum(*apart(begins + within, nobody))).reshape(values.shape)

    return cast(mx.array, taken(values))


def _looked_up(values: mx.array, places: mx.array) -> mx.array:
    return values.reshape(-1).view(mx.int32)[places].view(mx.float32)


class LineKeys:
    """In the place of every layer's cache: says where each token stands and what it sees, and keeps nothing."""

    def __init__(self, lines: Lines, dtype: mx.Dtype) -> None:
        self._lines, self._dtype = lines, dtype
        self._masks: dict[tuple[bool, int | None], mx.array] = {}

    @property
    def offset(self) -> mx.array | int:
        """The position of each token, `[R, W]`: for `by_token`. Where each line holds one row, that of the first."""
        return 0 if self._lines.positions is None else self._lines.positions

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None, **_: Any) -> Any:
        """What each token sees, `[R, 1, W, W]`: booleans where the model asks for an array, or what is added to scores.
        Of a line with a single row, as of any sequence.

        MLX on CUDA would make the latter of booleans in every layer, for every head.
        """
        lines = self._lines
        if lines.positions is None or lines.prompts is None:
            return causal_mask(n, return_array, window_size)
        key = return_array, window_size
        if key not in self._masks:
            sees = self._sees(window_size)
            nothing, everything = mx.array(0, self._dtype), mx.array(mx.finfo(self._dtype).min, self._dtype)
            self._masks[key] = sees if return_array else mx.where(sees, nothing, everything)
        return meaning(self._masks[key], InLine(lines.positions, lines.prompts, lines.rows, window_size))

    def _sees(self, window: int | None) -> mx.array:
        """Its own prompt and its own row up to itself, and of these what is in the window. Padding sees padding."""
        rows, positions, prompts = (cast(mx.array, array)[:, None] for array in self._lines[2:])
        place = mx.arange(positions.shape[-1])
        sees = (place[:, None] >= place[None]) & (prompts[..., :, None] == prompts[..., None, :])
        sees = sees & ((rows[..., None, :] == 0) | (rows[..., None, :] == rows[..., :, None]))
        if window:
            sees = sees & (positions[..., :, None] - positions[..., None, :] < window)
        return sees

    def inside(self, layer: nn.Module) -> AbstractContextManager[None]:
        """What a layer must be computed in, for gradient checkpointing."""
        return by_token(layer)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values


@contextmanager
def by_token(model: nn.Module) -> Iterator[None]:
    """Inside the block, the model's rotary embeddings take positions `[B, T]` for their `offset`."""
    turning = [module for module in model.modules() if _turns(module)]
    with put_before(turning, _ByToken):
        yield


def _turns(module: nn.Module) -> bool:
    """Whether it is a rotary embedding, of whatever architecture: it is called with an `offset`, and has no parts."""
    if isinstance(module, _ByToken):
        return False  # in a block inside a block
    return not module.children() and "offset" in inspect.signature(type(module).__call__).parameters


class _ByToken:
    """Put before a rotary embedding's own class: it takes each token for a row of its own, which has an offset."""

    def __call__(self: Any, x: mx.array, offset: Any = 0, *args: Any, **kwargs: Any) -> mx.array:
        turn: Callable[..., mx.array] = super().__call__  # type: ignore[misc]  # the embedding's own
        if not isinstance(offset, mx.array) or offset.ndim < 2:
            return turn(x, offset, *args, **kwargs)
        batch, heads, length, width = x.shape
        tokens = x.swapaxes(1, 2).reshape(batch * length, heads, 1, width)
        turned = turn(tokens, offset.reshape(-1), *args, **kwargs)
        return turned.reshape(batch, length, heads, width).swapaxes(1, 2)


def line_hidden(model: nn.Module, body: Body, depth: int, lines: Lines, dtype: mx.Dtype) -> mx.array:
    """The hidden states of all places, `[R, W, D]`. `dtype` is the model's, `depth` how many layers have a cache."""
    with by_token(model):
        hidden: mx.array = body(lines.token_ids, cache=[LineKeys(lines, dtype)] * depth)
    return hidden


def check_lines(model: nn.Module, body: Body, layers: Sequence[Kind], dtype: mx.Dtype) -> None:
    """Raise Unpacked where completions behind one another do not come out as whole sequences: tried on three rows."""
    if any(kind is not PromptKeys for kind in layers):
        raise Unpacked("its layers keep recurrent states, which go on from whatever stands before")
    prompts, index, completions = [(1, 2, 3), (4, 5)], [0, 1, 1], [(6, 7), (8, 9), (10, 11)]
    rows = [(prompts[place], completion) for place, completion in zip(index, completions, strict=True)]
    laid, starts = laid_out(rows, 1, 10)
    tokens, lengths = whole_sequences(
        mx.array([[1, 2, 3], [4, 5, 0]]), mx.array([3, 2]), mx.array(index), mx.array(completions)
    )
    try:
        hidden = line_hidden(model, body, len(layers), Lines(*laid), dtype).astype(mx.float32)
        packed = mx.stack([hidden[0, start : start + 2] for start in starts])
        whole = hidden_at(body(tokens, cache=None), lengths, 2).astype(mx.float32)
        gap: Any = (mx.linalg.norm(packed - whole) / mx.linalg.norm(whole)).item()
    except Exception as error:  # whatever the model's own code raises, or ours
        what = "the trial failed" if is_ours(error) else "this architecture does not take a position for each token"
        raise Unpacked(f"{what}: {cause(error)}") from error
    if not gap < (0.01 if dtype == mx.float32 else 0.1):  # what rounding explains; what is wrong is of the order of 1
        raise Unpacked(f"this architecture's attention depends on more than positions and masks (gap {gap:.2g})")
