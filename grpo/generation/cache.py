"""Keys and values of the rows being decoded, in fixed buffers.

Each row has a slot. A slot holds its prompt in the first `prefix` columns and what it has decoded in a ring of
`ring` columns behind them. All rows write to the same column at a step, whatever their lengths, so a write is one
slice of the buffer; which columns are a row's own is said by a mask. Rotary positions were applied before the
keys came here, so where a key lies does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from grpo.errors import UserError

PREFILL_CHUNK = 2048
"""Prompt tokens of a row that go through the model at once."""
WIDTH_STEP = 64
"""Attention reads the ring in multiples of this many columns."""

KeysValues = tuple[mx.array, mx.array]


class Slots:
    """Where each row is: shared by the layers' caches and advanced once a step.

    `prompt_lengths` `[S]` and `starts` `[S]` int32: the prompt tokens in the prefix, and the step of admission.
    """

    def __init__(self, count: int, prefix: int, ring: int, layers: int) -> None:
        self.prefix, self.ring, self.step = prefix, ring, 0
        self.prompt_lengths = mx.zeros(count, mx.int32)
        self.starts = mx.zeros(count, mx.int32)
        self.layers = [LayerCache(self) for _ in range(layers)]
        self._advance_to(0)

    @property
    def count(self) -> int:
        return int(self.starts.shape[0])

    @property
    def decoded(self) -> mx.array:
        """How many tokens each row has decoded before this step: `[S]` int32."""
        return self.step - self.starts

    def advance(self) -> None:
        """Go on to the next step, after the model has seen this one's tokens."""
        self._advance_to(self.step + 1)

    def _advance_to(self, step: int) -> None:
        self.step = step
        self.column = self.prefix + step % self.ring
        used = min(self.ring, -(-(step + 1) // WIDTH_STEP) * WIDTH_STEP)
        self.width = self.prefix + used
        self._age = (step - mx.arange(used)) % self.ring
        self.refresh()

    def refresh(self) -> None:
        """Recompute what follows from the rows' lengths and starts."""
        self.positions = self.prompt_lengths + self.decoded
        own_prompt = mx.arange(self.prefix)[None] < self.prompt_lengths[:, None]
        own_decoded = self._age[None] <= self.decoded[:, None]
        self.mask = mx.concatenate([own_prompt, own_decoded], axis=1)[:, None, None]

    def admit(self, slots: Sequence[int], prompts: Sequence[Prefix]) -> None:
        """Put rows into free slots: slot `slots[i]` goes on from `prompts[i]`."""
        index = mx.array(list(slots))
        self.starts[index] = self.step
        self.prompt_lengths[index] = mx.array([prompt.length for prompt in prompts], mx.int32)
        for number, layer in enumerate(self.layers if self.prefix else ()):
            layer.insert(index, [prompt.layers[number] for prompt in prompts])
        self.refresh()

    def keep(self, slots: Sequence[int]) -> None:
        """Drop all slots but these, which become 0, 1, …"""
        index = mx.array(list(slots))
        self.starts, self.prompt_lengths = self.starts[index], self.prompt_lengths[index]
        for layer in self.layers:
            layer.keep(index)
        self.refresh()


class LayerCache:
    """One layer's buffers, `[S, heads, prefix + ring, D]`, behind the protocol of mlx-lm's caches."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    @property
    def offset(self) -> mx.array:
        """The rotary position of each row's next token: `[S]` int32."""
        return self._slots.positions

    def make_mask(self, _n: int, **_kwargs: Any) -> mx.array:
        return self._slots.mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> KeysValues:
        """Write one step's keys and values, `[S, heads, 1, D]`, and return the columns in use."""
        self.keys, self.values = self._allocated(keys, values)
        column, width = self._slots.column, self._slots.width
        self.keys[:, :, column : column + 1] = keys
        self.values[:, :, column : column + 1] = values
        return self.keys[:, :, :width], self.values[:, :, :width]

    def insert(self, index: mx.array, prompts: Sequence[KeysValues]) -> None:
        """Copy prompts' keys and values, `[heads, P, D]` each and all of one padded P, into slots."""
        keys, values = (mx.stack(list(parts)) for parts in zip(*prompts, strict=True))
        length = keys.shape[2]
        self.keys, self.values = self._allocated(keys, values)
        self.keys[index, :, :length] = keys
        self.values[index, :, :length] = values

    def keep(self, index: mx.array) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[index], self.values[index]

    def _allocated(self, keys: mx.array, values: mx.array) -> KeysValues:
        if self.keys is not None and self.values is not None:
            return self.keys, self.values
        columns = self._slots.prefix + self._slots.ring
        new_keys, new_values = (
            mx.zeros((self._slots.count, a.shape[1], columns, a.shape[3]), a.dtype) for a in (keys, values)
        )
        return new_keys, new_values


class Prefix:
    """The keys and values of one prompt without its last token, which is the first that decoding feeds."""

    def __init__(self, length: int, layers: list[KeysValues]) -> None:
        self.length = length
        self.layers = layers


def prefill(model: nn.Module, prompts: Sequence[Sequence[int]], width: int) -> list[Prefix]:
    """Run prompts through the model together, padded on the right to `width` + 1 tokens.

    Causal attention needs no mask for padding on the right: no token sees what comes after it.
    """
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    rows = mx.array([list(ids[:-1]) + [0] * (width + 1 - len(ids)) for ids in prompts])
    for start in range(0, width, PREFILL_CHUNK):
        model(rows[:, start : start + PREFILL_CHUNK], cache=cache)
        mx.eval([layer.state for layer in cache])  # the logits stay unevaluated
    layers = [(layer.keys[:, :, :width], layer.values[:, :, :width]) for layer in cache] if width else []
    return [
        Prefix(len(ids) - 1, [(keys[row], values[row]) for keys, values in layers]) for row, ids in enumerate(prompts)
    ]


def require_plain_cache(model: nn.Module) -> None:
    """Raise UserError for a model that keeps anything but plain keys and values between tokens."""
    from mlx_lm.models.cache import KVCache, make_prompt_cache

    if odd := {type(layer).__name__ for layer in make_prompt_cache(model) if type(layer) is not KVCache}:
        raise UserError(
            f"model type {getattr(model, 'model_type', '?')}: its cache ({', '.join(sorted(odd))}) is not plain "
            "keys and values; sliding windows and recurrent state are not supported yet"
        )
