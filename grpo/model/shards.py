"""Which trained arrays are parts of larger arrays, if several processes share a model.

A run's files contain whole arrays, so that a run with any number of processes can resume from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.ranks import Ranks
from grpo.model.tensor import cut_of

OUTPUTS = {"lora_a": None, "lora_b": -1, "m": 0}, {"lora_a": None, "lora_b": -2}
INPUTS = {"lora_a": 0, "lora_b": None, "m": None}, {"lora_a": -1, "lora_b": None}
"""The axis along which an adapter's arrays are divided if its layer is divided by outputs, or by inputs: first for
linear layers, then for experts, which store A and B transposed. None means whole: the gradient is then a sum over the
processes."""
PRECISE = "precise."
"""Prefix of the optimizer's names for float32 copies."""


class Shards:
    """How a model's trained arrays are divided over processes. If the model is not divided, all arrays are whole.

    `sums` are the paths of whole arrays whose gradient is a sum: each process computes one term.
    """

    def __init__(self, model: nn.Module | None = None, ranks: Ranks | None = None) -> None:
        """`ranks` are the processes that share the model."""
        self.ranks = ranks or Ranks()
        self._axes: dict[str, int] = {}
        self.sums: set[str] = set()
        layers = model.named_modules() if model is not None and self.ranks.size > 1 else ()
        for path, layer in layers:
            if "lora_a" not in layer or (cut := cut_of(layer)) is None:
                continue
            plain, experts = OUTPUTS if cut == -2 else INPUTS
            for name, axis in (plain if layer.lora_a.ndim == 2 else experts).items():
                if axis is None:
                    self.sums.add(f"{path}.{name}")
                else:
                    self._axes[f"{path}.{name}"] = axis

    def divides(self, path: str) -> bool:
        """Whether this process's array is a part of a larger array."""
        return self._axis(path) is not None

    def sums_of(self, paths: Iterable[str], ranks: Ranks) -> list[tuple[list[str], Ranks]]:
        """The sums that complete a gradient: pairs of array paths, and the processes to sum them over.

        `ranks` are the processes that share the work of a step.
        """
        return [([path for path in paths if path in self.sums], self.ranks), (list(paths), ranks)]

    def shape(self, path: str, array: mx.array) -> tuple[int, ...]:
        """The shape of the whole array."""
        shape = list(array.shape)
        if (axis := self._axis(path)) is not None and array.ndim:
            shape[axis] *= self.ranks.size
        return tuple(shape)

    def whole(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The whole arrays, gathered from all processes, by the same names: trained arrays, or an optimizer's state.

        All processes of the group must call this, with the same names.
        """
        return {path: self.whole_of(path, array) for path, array in arrays.items()}

    def whole_of(self, path: str, array: mx.array) -> mx.array:
        """The whole array of everybody's parts; an array that is not divided, as it is."""
        axis = self._axis(path)
        return array if axis is None or not array.ndim else self.ranks.join(array, axis)

    def outlines(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Arrays with the shapes and dtypes of the whole arrays, never to be evaluated."""
        return {path: mx.zeros(self.shape(path, array), array.dtype) for path, array in arrays.items()}

    def part(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """This process's parts of whole arrays."""
        return {path: self.part_of(path, array) for path, array in arrays.items()}

    def part_of(self, path: str, array: mx.array) -> mx.array:
        """This process's part of a whole array."""
        axis = self._axis(path)
        if axis is None or not array.ndim:
            return array
        return mx.contiguous(mx.split(array, self.ranks.size, axis=axis)[self.ranks.rank])

    def _axis(self, path: str) -> int | None:
        """The axis along which an array is divided, by its path, or by the name of an optimizer's state for it."""
        path = path.removeprefix(PRECISE)
        return self._axes.get(path, self._axes.get(path.rpartition(".")[0]))
