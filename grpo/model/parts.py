"""Flat parts of large arrays, one part per process (`grpo.model.fsdp`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.ranks import Ranks
from grpo.model.shards import PRECISE, Shards

LEAST = 2**12
"""Fewest numbers of an array that is divided. Smaller arrays (norms, biases) are whole in every process."""
ALIGNED = 256
"""The length of a part is a multiple of this: 8-bit moments have one scale per 256 numbers, which no two processes may
share."""
SCALES = ".scales"
"""Suffix of the names that an optimizer gives to the scales of 8-bit moments."""
ADAPTERS = "lora_a", "lora_b", "m"


@dataclass(frozen=True, slots=True)
class ArrayPlace:
    """The module and name that hold a divided array, and the whole array's shape and size."""

    holder: Any
    name: str
    shape: tuple[int, ...]
    size: int

    @property
    def array(self) -> mx.array:
        held: mx.array = self.holder[self.name]
        return held

    def put(self, array: mx.array) -> None:
        self.holder[self.name] = array


class Parts:
    """Divides arrays among `ranks` into one-dimensional parts of the same length, padded with zeros at the end.

    `copies` are the processes that hold the same parts in other groups.
    """

    def __init__(self, ranks: Ranks, copies: Ranks) -> None:
        self.ranks, self.copies = ranks, copies
        self.is_silent = False
        """Whether nothing is exchanged: results are then meaningless, but take as much memory as real ones."""

    def part_of(self, array: mx.array) -> mx.array:
        """This process's part of a whole array, not yet evaluated."""
        length = self.length(array.size)
        start = min(self.ranks.rank * length, array.size)
        own = array.reshape(-1)[start : start + length]
        return mx.contiguous(mx.pad(own, (0, length - own.size)) if own.size < length else own)

    def length(self, size: int) -> int:
        """The length of one part of an array with `size` numbers."""
        return -(-size // (self.ranks.size * ALIGNED)) * ALIGNED

    def joined(self, part: mx.array, place: ArrayPlace) -> mx.array:
        """The whole array, gathered from all processes and evaluated. All processes must call this."""
        whole = self.ranks.join(part, 0)[: place.size].reshape(place.shape)
        mx.eval(whole)
        return whole


class FlatShards(Shards):
    """Which trained arrays are divided while the model is spread. Their gradients and optimizer states are always
    divided."""

    def __init__(self, parts: Parts, places: Mapping[str, ArrayPlace]) -> None:
        super().__init__()
        self._parts, self.places = parts, dict(places)
        if self.places:
            self.ranks = parts.ranks

    def divides(self, path: str) -> bool:
        return self._base(path) is not None

    def shape(self, path: str, array: mx.array) -> tuple[int, ...]:
        base = self._base(path)
        if base is None or not array.ndim:
            return tuple(array.shape)
        place = self.places[base]
        return (-(-place.size // ALIGNED),) if path.endswith(SCALES) else place.shape

    def sums_of(self, paths: Iterable[str], ranks: Ranks) -> list[tuple[list[str], Ranks]]:
        parts = [path for path in paths if self.divides(path)]
        copies = Ranks() if self._parts.is_silent else self._parts.copies
        return [(parts, copies), ([path for path in paths if path not in set(parts)], ranks)]

    def part_of(self, path: str, array: mx.array) -> mx.array:
        if self._base(path) is None or not array.ndim:
            return array
        if path.endswith(SCALES):
            length = self._parts.length(self.places[self._base(path) or ""].size) // ALIGNED
            padded = mx.pad(array, (0, length * self.ranks.size - array.size))
            return mx.contiguous(padded[self.ranks.rank * length : (self.ranks.rank + 1) * length])
        return self._parts.part_of(array)

    def whole_of(self, path: str, array: mx.array) -> mx.array:
        base = self._base(path)
        if base is None or not array.ndim:
            return array
        place = self.places[base]
        if array.shape == place.shape:
            return array
        if path.endswith(SCALES):
            return self.ranks.join(array, 0)[: -(-place.size // ALIGNED)]
        return self._parts.joined(array, place)

    def _base(self, path: str) -> str | None:
        """The path of the divided array that `path` means: itself, or an optimizer's state for it. None for others."""
        path = path.removeprefix(PRECISE)
        for _ in range(3):  # `weight`, `weight.m`, and `weight.m.codes`
            if path in self.places:
                return path
            path = path.rpartition(".")[0]
        return None


def places_below(module: nn.Module) -> list[ArrayPlace]:
    """The arrays in a module and its submodules that are divided."""
    return [
        ArrayPlace(inner, name, tuple(array.shape), array.size)
        for inner in module.modules()
        for name, array in inner.items()
        if isinstance(array, mx.array) and array.size >= LEAST and name not in ADAPTERS
    ]
