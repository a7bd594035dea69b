"""Layer caches for training with shared prompts: each prompt runs once, and its completions continue from it.

In the first pass, `PromptKeys` or `PromptState` records each layer's keys and values or states of P prompts. In the
second pass, over B completions, `MoreKeys` or `MoreState` reads the records row by row. Everything stays in the graph,
so gradients flow through both passes. `inputs`, `bind`, `outputs` and `keep` are for gradient checkpointing, which must
know the arrays that a layer reads and writes outside its arguments.
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
"""A position after every token."""


class RowPrompts:
    """The prompt of each row, and the masks over prompts and completions."""

    def __init__(self, prompt_lengths: mx.array, index: mx.array, width: int, dtype: mx.Dtype) -> None:
        self.index = index
        self.lengths = prompt_lengths[index]
        self._width = width
        self._dtype = dtype
        self._masks: dict[int | None, mx.array] = {}
        self._biases: dict[int | None, mx.array] = {}

    def bias(self, n: int, window: int | None) -> mx.array:
        """The mask as a bias that is added to scores. From booleans, MLX on CUDA would build it per layer and head."""
        if window not in self._biases:
            nothing, everything = mx.array(0, self._dtype), mx.array(mx.finfo(self._dtype).min, self._dtype)
            self._biases[window] = mx.where(*apart(self.mask(n, window), nothing, everything))
        return self._biases[window]

    def mask(self, n: int, window: int | None) -> mx.array:
        """`[B, 1, n, prompt width + n]` bool: the row's own prompt, and its completion up to each token itself."""
        if window not in self._masks:
            lengths, query = self.lengths[:, None, None, None], mx.arange(n)[:, None]
            # Each column's position in the prompt and in the completion; NOWHERE, which no query sees, if it has none.
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
        """The arrays that the layer reads from this cache and that need a gradient."""
        return []

    def bind(self, inputs: list[mx.array]) -> None:
        """Reset, and read `inputs` instead of the stored arrays: the same values, as inputs of a transformation."""

    def outputs(self) -> list[mx.array]:
        """The arrays that the layer wrote into this cache."""
        return [] if self.keys is None or self.values is None else [self.keys, self.values]

    def keep(self, outputs: list[mx.array]) -> None:
        """Store `outputs`, a transformation's outputs, as the arrays that the layer wrote."""
        if outputs:
            self.keys, self.values = outputs


class MoreKeys:
    """Appends keys and values of completions to those of their prompts: row b continues from prompt `index[b]`."""

    def __init__(self, prompt: list[mx.array], rows: RowPrompts) -> None:
        self._rows = rows
        self._prompt = prompt

    @property
    def offset(self) -> mx.array:
        """The position of each row's first token: `[B]`."""
        return self._rows.lengths

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None, **_: Any) -> mx.array:
        """The mask: booleans if the model asks for an array (to use it itself), or else a bias for the scores."""
        rows = self._rows
        mask = rows.mask(n, window_size) if return_array else rows.bias(n, window_size)
        return meaning(mask, Causal(window_size, rows.lengths))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The rows' keys and values. Without attention in tiles, those of their prompts come before them."""
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
        """Attention over the row's prompt and the row itself, instead of mlx-lm's attention."""
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
    """Records one recurrent layer's arrays at the end of each prompt, `[P, …]` each."""

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
        """`[P, n]` bool: padding after a prompt does not change its state."""
        return mx.arange(n) < self.lengths[:, None]

    def advance(self, n: int) -> None:
        """No-op: the cache is used for a single forward pass."""

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
    """Continues from the prompts' states: row b from the state of prompt `index[b]`."""

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
        """No mask needed: padding is on the right, after every real token."""

    def advance(self, n: int) -> None:
        """No-op: the cache is used for a single forward pass."""

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
    """The causal mask of `n` tokens, within a window if there is one: an array, or mlx-lm's "causal"."""
    if return_array or (window and n > window):
        return meaning(create_causal_mask(n, window_size=window), Causal(window))
    return "causal"


def for_rows(prompts: mx.array, index: mx.array) -> mx.array:
    """Each row's entry of `[P, ...]`, as `[B, ...]`. The gradient of an entry is the sum over its prompt's rows."""

    @mx.custom_function
    def spread(prompts: mx.array) -> mx.array:
        return looked_up(prompts, index)

    @spread.vjp
    def together(prompts: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return summed_by_prompt(cotangent, index, prompts.shape[0])

    return cast(mx.array, spread(prompts))


Kind = type[PromptKeys] | type[PromptState]


def kinds(cache: list[Any]) -> list[Kind]:
    """The class that replaces each of mlx-lm's caches. Raises ValueError with the names of unsupported caches."""
    known: dict[type, Kind] = {KVCache: PromptKeys, RotatingKVCache: PromptKeys, ArraysCache: PromptState}
    if odd := {type(layer).__name__ for layer in cache if type(layer) not in known}:
        raise ValueError(", ".join(sorted(odd)))
    return [known[type(layer)] for layer in cache]
