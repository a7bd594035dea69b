"""Packing: several completions go through the model in one line, each as if it were alone.

A line holds a prompt once, followed by as many of its completions as fit; then another prompt with its completions, and
so on. A mask separates them, and each token has its position in its own sequence, so the results are those of whole
sequences. If lengths differ, lines contain far less padding than rows of one completion each.

A mask takes memory by the square of a line's width. A line with a single row needs none: attention is causal, and
nothing reads the results at the padding after the row.

A completion of T tokens takes T places: the prompt's last token, which predicts the first token, comes first, and the
completion's last token, which predicts nothing, is left out. So each place predicts one token.
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
    """The model cannot process packed completions. The message is the reason."""


class Lines(NamedTuple):
    """R lines of W places, int32 `[R, W]` each; all are 0 in empty places.

    token_ids   the model's input tokens
    targets     the token that the place predicts, 0 in a prompt
    rows        the row of the batch, counted from 1; 0 in a prompt
    positions   the position of the token in its own sequence
    prompts     the prompt of this line that the token belongs to, counted from 1

    Without `positions` and `prompts`, each line holds a single row, which begins at the line's first place.
    """

    token_ids: mx.array
    targets: mx.array
    rows: mx.array
    positions: mx.array | None = None
    prompts: mx.array | None = None


def room(prompt: _Ids, completion: _Ids) -> int:
    """Number of places that a prompt and one completion take in a line."""
    return len(prompt) - 1 + len(completion)


def rows_by_line(rows: Sequence[tuple[_Ids, _Ids]], width: int) -> list[list[int]]:
    """Pack prompts with completions, in their order, into lines of `width` places. Returns each line's row numbers.

    A new line begins when a row no longer fits. Each row must fit in an empty line.
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
    """Rows as `count` lines (see `rows_by_line`): the five arrays of `Lines` stacked, `[5, R, W]` int32, and the first
    place of each row, counted over all lines. With `alone` each row has its own line, and the array is `[3, R, W]`."""
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
    """Float32 values of places `[R, W]`, rearranged as rows of completions `[B, length]`.

    Values after a row's end are meaningless. `rows` `[R, W]` gives the row of each place, as in `Lines`. With it the
    gradient is an indexing operation as well, with the same integer kernel: on CUDA, building another kernel, or one
    that scatters, takes seconds.
    """

    @mx.custom_function
    def taken(values: mx.array) -> mx.array:
        places = mx.add(*apart(starts[:, None], mx.arange(length)[None]))
        return _looked_up(values, mx.minimum(*apart(places, mx.array(values.size - 1))))

    @taken.vjp
    def given_back(values: mx.array, slopes: mx.array, _: mx.array) -> mx.array:
        nobody, owners = mx.array([slopes.size]), rows.reshape(-1)
        begins = mx.concatenate([nobody, mx.arange(0, slopes.size, length)])[owners]  # of the row in slopes, by place
        first = mx.concatenate([mx.array([0]), starts])[owners]
        (within,) = apart(mx.arange(values.size) - first)
        padded = mx.concatenate([slopes.reshape(-1), mx.zeros(1)])
        return _looked_up(padded, mx.minimum(*apart(begins + within, nobody))).reshape(values.shape)

    return cast(mx.array, taken(values))


def _looked_up(values: mx.array, places: mx.array) -> mx.array:
    return values.reshape(-1).view(mx.int32)[places].view(mx.float32)


class LineKeys:
    """Replaces every layer's cache: provides positions and masks, and stores nothing."""

    def __init__(self, lines: Lines, dtype: mx.Dtype) -> None:
        self._lines, self._dtype = lines, dtype
        self._masks: dict[tuple[bool, int | None], mx.array] = {}

    @property
    def offset(self) -> mx.array | int:
        """The position of each token, `[R, W]`, for `by_token`; 0, the first position, if each line holds one row."""
        return 0 if self._lines.positions is None else self._lines.positions

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None, **_: Any) -> Any:
        """The mask, `[R, 1, W, W]`: booleans if the model asks for an array, or else a bias for the scores.

        From booleans, MLX on CUDA would build the bias in every layer, for every head. Lines with a single row use the
        ordinary causal mask.
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
        """Each token sees its prompt and its row up to itself, within the window. Padding sees padding."""
        rows, positions, prompts = (cast(mx.array, array)[:, None] for array in self._lines[2:])
        place = mx.arange(positions.shape[-1])
        sees = (place[:, None] >= place[None]) & (prompts[..., :, None] == prompts[..., None, :])
        sees = sees & ((rows[..., None, :] == 0) | (rows[..., None, :] == rows[..., :, None]))
        if window:
            sees = sees & (positions[..., :, None] - positions[..., None, :] < window)
        return sees

    def inside(self, layer: nn.Module) -> AbstractContextManager[None]:
        """The block in which gradient checkpointing must recompute a layer."""
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
    """Whether a module is a rotary embedding of any architecture: its call takes `offset`, and it has no children."""
    if isinstance(module, _ByToken):
        return False  # nested blocks
    return not module.children() and "offset" in inspect.signature(type(module).__call__).parameters


class _ByToken:
    """Mixin before a rotary embedding's class: each token becomes a row with its own offset."""

    def __call__(self: Any, x: mx.array, offset: Any = 0, *args: Any, **kwargs: Any) -> mx.array:
        turn: Callable[..., mx.array] = super().__call__  # type: ignore[misc]  # the embedding's class
        if not isinstance(offset, mx.array) or offset.ndim < 2:
            return turn(x, offset, *args, **kwargs)
        batch, heads, length, width = x.shape
        tokens = x.swapaxes(1, 2).reshape(batch * length, heads, 1, width)
        turned = turn(tokens, offset.reshape(-1), *args, **kwargs)
        return turned.reshape(batch, length, heads, width).swapaxes(1, 2)


def line_hidden(model: nn.Module, body: Body, depth: int, lines: Lines, dtype: mx.Dtype) -> mx.array:
    """The hidden states of all places, `[R, W, D]`. `dtype` is the model's; `depth` is the number of layer caches."""
    with by_token(model):
        hidden: mx.array = body(lines.token_ids, cache=[LineKeys(lines, dtype)] * depth)
    return hidden


def check_lines(model: nn.Module, body: Body, layers: Sequence[Kind], dtype: mx.Dtype) -> None:
    """Raise Unpacked if packed completions differ from whole sequences in a trial on three rows."""
    if any(kind is not PromptKeys for kind in layers):
        raise Unpacked("its layers keep recurrent states, which would carry over from one completion to the next")
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
    except Exception as error:  # the model's code, or grpo's, may raise anything
        what = "the trial failed" if is_ours(error) else "this architecture does not take a position for each token"
        raise Unpacked(f"{what}: {cause(error)}") from error
    if not gap < (0.01 if dtype == mx.float32 else 0.1):  # rounding stays below; a real difference is ~1
        raise Unpacked(f"this architecture's attention depends on more than positions and masks (gap {gap:.2g})")
