"""What stands in a layer's cache while prompts run once and their completions go on from them.

A first pass records what each layer leaves of P prompts, `PromptKeys` or `PromptState`; a second one, of B completions,
reads it row by row, `MoreKeys` or `MoreState`. All of it stays in the graph, so gradients flow through both passes.
`inputs`, `bind`, `outputs` and `keep` are for gradient checkpointing, which wants to be handed what a layer reads and
leaves outside its arguments.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx

from grpo.backend.device import apart
from grpo.model.attending import meaning, mlx_lms, under_way
from grpo.model.attention import PromptKeysValues, attention
from grpo.model.mlxlm import ArraysCache, KVCache, RotatingKVCache, create_causal_mask
from grpo.model.promptrows import looked_up, summed_by_prompt
from grpo.model.sight import Causal

NOWHERE = 2**30
"""A place behind every token."""


class RowPrompts:
    """Which prompt each row goes on from, and what it sees."""

    def __init__(self, prompt_lengths: mx.array, index: mx.array, width: int, dtype: mx.Dtype) -> None:
        self.index = index
        self.lengths = prompt_lengths[index]
        self._width = width
        self._dtype = dtype
        self._masks: dict[int | None, mx.array] = {}
        self._biases: dict[int | None, mx.array] = {}

    def bias(self, n: int, window: int | None) -> mx.array:
        """The mask as what is added to scores. MLX on CUDA would make it of booleans in every layer, for every head."""
        if window not in self._biases:
            nothing, everything = mx.array(0, self._dtype), mx.array(mx.finfo(self._dtype).min, self._dtype)
            self._biases[window] = mx.where(*apart(self.mask(n, window), nothing, everything))
        return self._biases[window]

    def mask(self, n: int, window: int | None) -> mx.array:
        """`[B, 1, n, prompt width + n]` bool: the row's own prompt, and its completion up to each token itself."""
        if window not in self._masks:
            lengths, query = self.lengths[:, None, None, None], mx.arange(n)[:, None]
            # Of each column its place in the prompt and in the completion; where it has none, one that nobody sees.
            prompt = mx.concatenate([mx.arange(self._width), mx.full((n,), NOWHERE)])
            own = mx.concatenate([mx.full((self._width,), NOWHERE), mx.arange(n)])
            sees_prompt, sees_own = mx.less(*apart(prompt, lengths)), mx.less_equal(*apart(own, query))
            if window:
                sees_prompt = sees_prompt & (lengths + query - prompt < window)
                sees_own = sees_own & (query - own < window)
            self._masks[window] = mx.bitwise_or(*apart(sees_prompt, sees_own))
        return self._masks[window]


class PromptKeys:
    """Records one layer's keys and values of the prompts, `[P, heads, L, D]`."""

    offset = 0

    def __init__(self, _lengths: mx.array) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None, **_: Any) -> Any:
        return causal_mask(n, return_array, window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = keys, values
        return keys, values

    def continued(self, rows: RowPrompts) -> MoreKeys:
        return MoreKeys(self.outputs(), rows)

    def inputs(self) -> list[mx.array]:
        """What the layer reads from here and has a gradient."""
        return []

    def bind(self, inputs: list[mx.array]) -> None:
        """Begin anew, and read these in their place: the same values, as a transformation's inputs."""

    def outputs(self) -> list[mx.array]:
        """What the layer leaves here."""
        return [] if self.keys is None or self.values is None else [self.keys, self.values]

    def keep(self, outputs: list[mx.array]) -> None:
        """Hold these as what the layer left: a transformation's outputs."""
        if outputs:
            self.keys, self.values = outputs


class MoreKeys:
    """Appends completions' keys and values to those of their prompts: row b goes on from prompt `index[b]`."""

    def __init__(self, prompt: list[mx.array], rows: RowPrompts) -> None:
        self._rows = rows
        self._prompt = prompt

    @property
    def offset(self) -> mx.array:
        """The position of each row's first token: `[B]`."""
        return self._rows.lengths

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None, **_: Any) -> mx.array:
        """What each token sees: as booleans where the model asks for an array (to use it itself), or to be added."""
        rows = self._rows
        mask = rows.mask(n, window_size) if return_array else rows.bias(n, window_size)
        return meaning(mask, Causal(window_size, rows.lengths))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The rows' own alone, if `attend` is asked for attention."""
        return (keys, values) if under_way() is not None else self._behind_prompts(keys, values)

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: mx.array | None,
        sinks: mx.array | None,
    ) -> mx.array:
        """Attention over the row's prompt and the row itself, in the place of mlx-lm's."""
        now = under_way()
        if now is None:
            return mlx_lms(queries, keys, values, scale, mask, sinks)
        sight = now.sight(queries, keys, values, mask)
        if not isinstance(sight, Causal):
            return mlx_lms(queries, *self._behind_prompts(keys, values), scale, mask, sinks)
        prompts = PromptKeysValues(self._prompt[0], self._prompt[1], self._rows.index)
        return attention(queries, keys, values, scale, sight, prompts, sinks)

    def _behind_prompts(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        prompt_keys, prompt_values = (for_rows(array, self._rows.index) for array in self._prompt)
        return mx.concatenate([prompt_keys, keys], axis=2), mx.concatenate([prompt_values, values], axis=2)

    def inputs(self) -> list[mx.array]:
        return self._prompt

    def bind(self, inputs: list[mx.array]) -> None:
        self._prompt = inputs

    def outputs(self) -> list[mx.array]:
        return []

    def keep(self, outputs: list[mx.array]) -> None:
        pass


class PromptState:
    """Records one recurrent layer's arrays as they are where each prompt ends, `[P, …]` each."""

    left_padding = None

    def __init__(self, lengths: mx.array) -> None:
        self.lengths = lengths
        self._left: dict[int, mx.array] = {}
        self._numbers: list[int] = []

    def __getitem__(self, number: int) -> mx.array | None:
        return self._left.get(number)

    def __setitem__(self, number: int, array: mx.array) -> None:
        self._left[number] = array

    def make_mask(self, n: int, **_: Any) -> mx.array:
        """`[P, n]` bool: padding behind a prompt does not change its state."""
        return mx.arange(n) < self.lengths[:, None]

    def advance(self, n: int) -> None:
        """There is one pass."""

    def continued(self, rows: RowPrompts) -> MoreState:
        return MoreState(self._left, rows)

    def inputs(self) -> list[mx.array]:
        return []

    def bind(self, _inputs: list[mx.array]) -> None:
        self._numbers, self._left = list(self._left), {}

    def outputs(self) -> list[mx.array]:
        return list(self._left.values())

    def keep(self, outputs: list[mx.array]) -> None:
        self._left = dict(zip(self._numbers, outputs, strict=True))


class MoreState:
    """Goes on from the prompts' states: row b from that of prompt `index[b]`."""

    lengths = left_padding = None

    def __init__(self, prompt: dict[int, mx.array], rows: RowPrompts) -> None:
        self._rows = rows
        self._prompt = prompt
        self._own: dict[int, mx.array] = {}

    def __getitem__(self, number: int) -> mx.array | None:
        if number in self._own or number not in self._prompt:
            return self._own.get(number)
        return for_rows(self._prompt[number], self._rows.index)

    def __setitem__(self, number: int, array: mx.array) -> None:
        self._own[number] = array

    def make_mask(self, _n: int, **_: Any) -> None:
        """Padding is behind all that counts."""

    def advance(self, n: int) -> None:
        """There is one pass."""

    def inputs(self) -> list[mx.array]:
        return list(self._prompt.values())

    def bind(self, inputs: list[mx.array]) -> None:
        self._prompt = dict(zip(self._prompt, inputs, strict=True))
        self._own = {}

    def outputs(self) -> list[mx.array]:
        return []

    def keep(self, outputs: list[mx.array]) -> None:
        pass


def causal_mask(n: int, return_array: bool, window: int | None) -> Any:
    """What a model gets for the mask of `n` tokens, each of which sees what stands before it, within its window."""
    if return_array or (window and n > window):
        return meaning(create_causal_mask(n, window_size=window), Causal(window))
    return "causal"


def for_rows(prompts: mx.array, index: mx.array) -> mx.array:
    """Of `[P, ...]` the one that each row goes on from, `[B, ...]`. Its gradient is a sum by prompts."""

    @mx.custom_function
    def spread(prompts: mx.array) -> mx.array:
        return looked_up(prompts, index)

    @spread.vjp
    def together(prompts: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return summed_by_prompt(cotangent, index, prompts.shape[0])

    return cast(mx.array, spread(prompts))


Kind = type[PromptKeys] | type[PromptState]


def kinds(cache: list[Any]) -> list[Kind]:
    """What stands in for each of mlx-lm's caches. Raises ValueError, with their names, for caches of other kinds."""
    known: dict[type, Kind] = {KVCache: PromptKeys, RotatingKVCache: PromptKeys, ArraysCache: PromptState}
    if odd := {type(layer).__name__ for layer in cache if type(layer) not in known}:
        raise ValueError(", ".join(sorted(odd)))
    return [known[type(layer)] for layer in cache]
