"""The prompt once for its group: keys and values of P prompts, and B completions that go on from them.

Both passes go through the model's own code by mlx-lm's cache protocol. The first pass leaves each layer's keys and
values in the graph, and the second appends its own to a copy for each row, so gradients flow through both. The tokens
that are processed fall from B · (prompt + completion) to P · prompt + B · completion.

Positions and masks are those of whole sequences, so padding on the right of either pass is seen by nothing.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

Body = Any
"""A model without its head: token ids `[B, L]` in, hidden states `[B, L, D]` out, with `cache=` one object a layer."""


class PromptKeys:
    """Records one layer's keys and values of the prompts, `[P, heads, L, D]`."""

    offset = 0

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None, **_: Any) -> Any:
        from mlx_lm.models.base import create_causal_mask

        if return_array or (window_size and n > window_size):
            return create_causal_mask(n, window_size=window_size)
        return "causal"

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = keys, values
        return keys, values

    def inputs(self) -> list[mx.array]:
        """What the layer reads from here and has a gradient."""
        return []

    def bind(self, inputs: list[mx.array]) -> None:
        """Read these in their place: the same values, as a transformation's inputs."""

    def outputs(self) -> list[mx.array]:
        """What the layer leaves here."""
        return [] if self.keys is None or self.values is None else [self.keys, self.values]

    def keep(self, outputs: list[mx.array]) -> None:
        """Hold these as what the layer left: a transformation's outputs."""
        if outputs:
            self.keys, self.values = outputs


class Continuation:
    """Appends completions' keys and values to those of their prompts: row b goes on from prompt `index[b]`."""

    def __init__(self, prompt: PromptKeys, rows: _Rows) -> None:
        self._rows = rows
        self._prompt = prompt.outputs()

    @property
    def offset(self) -> mx.array:
        """The position of each row's first token: `[B]`."""
        return self._rows.lengths

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None, **_: Any) -> mx.array:
        """What each token sees: as booleans where the model asks for an array (to use it itself), or to be added."""
        return self._rows.mask(n, window_size) if return_array else self._rows.bias(n, window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        prompt_keys, prompt_values = (_for_rows(array, self._rows.index) for array in self._prompt)
        return mx.concatenate([prompt_keys, keys], axis=2), mx.concatenate([prompt_values, values], axis=2)

    def inputs(self) -> list[mx.array]:
        return self._prompt

    def bind(self, inputs: list[mx.array]) -> None:
        self._prompt = inputs

    def outputs(self) -> list[mx.array]:
        return []

    def keep(self, outputs: list[mx.array]) -> None:
        pass


class _Rows:
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
            self._biases[window] = mx.where(self.mask(n, window), nothing, everything)
        return self._biases[window]

    def mask(self, n: int, window: int | None) -> mx.array:
        """`[B, 1, n, prompt width + n]` bool: the row's own prompt, and its completion up to each token itself."""
        if window not in self._masks:
            prompt, own = mx.arange(self._width), mx.arange(n)
            here = self.lengths[:, None, None] + own[None, :, None]  # positions of queries
            sees_prompt = mx.broadcast_to(
                prompt[None, None] < self.lengths[:, None, None], (*here.shape[:2], self._width)
            )
            sees_own = own[:, None] >= own[None]
            if window:
                sees_prompt = sees_prompt & (here - prompt[None, None] < window)
                sees_own = sees_own & (own[:, None] - own[None] < window)
            sees_own = mx.broadcast_to(sees_own[None], (here.shape[0], n, n))
            self._masks[window] = mx.concatenate([sees_prompt, sees_own], axis=2)[:, None]
        return self._masks[window]


def _for_rows(prompts: mx.array, index: mx.array) -> mx.array:
    """Of `[P, ...]` the one that each row goes on from, `[B, ...]`.

    Indexing moves one element at a time, so these are made as wide as they get. The gradient is a product with the
    rows' places, one-hot: as that of an indexing it would be scattered, element by element.
    """

    @mx.custom_function
    def spread(prompts: mx.array) -> mx.array:
        if prompts.shape[-1] * prompts.itemsize % mx.uint64.size:
            return prompts[index]
        return mx.contiguous(prompts).view(mx.uint64)[index].view(prompts.dtype)

    @spread.vjp
    def collected(prompts: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        places = (mx.arange(prompts.shape[0])[:, None] == index[None]).astype(cotangent.dtype)
        return (places @ cotangent.reshape(index.size, -1)).reshape(prompts.shape)

    return cast(mx.array, spread(prompts))


def shared_hidden(
    body: Body, layers: int, prompt_ids: mx.array, prompt_lengths: mx.array, index: mx.array, completion_ids: mx.array
) -> mx.array:
    """The hidden states that predict completions' tokens, `[B, T, D]`, with each prompt run once.

    prompt_ids `[P, L]` and completion_ids `[B, T]` are padded on the right; prompt_lengths `[P]`; index `[B]` says
    which prompt a completion belongs to.
    """
    prompts = [PromptKeys() for _ in range(layers)]
    hidden = body(prompt_ids, cache=prompts)
    last = mx.take_along_axis(hidden, (prompt_lengths - 1)[:, None, None], axis=1)[index]
    rows = _Rows(prompt_lengths, index, prompt_ids.shape[1], hidden.dtype)
    own = body(completion_ids, cache=[Continuation(prompt, rows) for prompt in prompts])
    return mx.concatenate([last, own[:, :-1]], axis=1)


def whole_sequences(
    prompt_ids: mx.array, prompt_lengths: mx.array, index: mx.array, completion_ids: mx.array
) -> tuple[mx.array, mx.array]:
    """Prompt and completion in one row: token ids `[B, L + T]`, padded on the right, and prompt lengths `[B]`."""
    lengths = prompt_lengths[index]
    column = mx.arange(prompt_ids.shape[1] + completion_ids.shape[1])[None] - lengths[:, None]
    own = mx.take_along_axis(completion_ids, mx.clip(column, 0, completion_ids.shape[1] - 1), axis=1)
    prompts = mx.pad(prompt_ids[index], [(0, 0), (0, completion_ids.shape[1])])
    return mx.where(column < 0, prompts, own), lengths


def why_not_shared(model: nn.Module, body: Body) -> str | None:
    """Why this model cannot go on from prompts that were run once, or None if it can.

    Its layers must keep keys and values alone; that it then computes the same as for whole sequences is tried, on
    three short rows.
    """
    from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

    cache = make_prompt_cache(model)
    if odd := {type(layer).__name__ for layer in cache if type(layer) not in (KVCache, RotatingKVCache)}:
        return f"its layers keep more than keys and values ({', '.join(sorted(odd))})"
    prompts, lengths = mx.array([[1, 2, 3], [4, 5, 0]]), mx.array([3, 2])
    index, completions = mx.array([0, 1, 1]), mx.array([[6, 7], [8, 9], [10, 11]])
    tokens, starts = whole_sequences(prompts, lengths, index, completions)
    try:
        shared = shared_hidden(body, len(cache), prompts, lengths, index, completions)
        body_dtype, shared = shared.dtype, shared.astype(mx.float32)
        whole = hidden_at(body(tokens), starts, 2).astype(mx.float32)
        gap: Any = (mx.linalg.norm(shared - whole) / mx.linalg.norm(whole)).item()
    except (TypeError, ValueError, AttributeError, IndexError) as error:  # raised by the model's own code
        return f"its attention does not take positions and masks by row ({type(error).__name__})"
    bound = 0.01 if body_dtype == mx.float32 else 0.1  # what rounding explains; what is wrong is of the order of 1
    return None if gap < bound else f"its attention depends on more than positions and masks (gap {gap:.2g})"


def hidden_at(hidden: mx.array, prompt_lengths: mx.array, length: int) -> mx.array:
    """Of whole sequences' hidden states `[B, L, D]` those that predict completion tokens, `[B, length, D]`."""
    # The one that predicts completion token t is that of the token before it.
    positions = mx.minimum(prompt_lengths[:, None] - 1 + mx.arange(length)[None], hidden.shape[1] - 1)
    return mx.take_along_axis(hidden, positions[..., None], axis=1)
