"""Which of the arrays that train are parts of larger ones, where several processes hold a model together.

What a run writes down is whole, so that a run with any number of processes goes on with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.ranks import Ranks
from grpo.model.tensor import cut_of

OUTPUTS = {"lora_a": None, "lora_b": -1, "m": 0}, {"lora_a": None, "lora_b": -2}
INPUTS = {"lora_a": 0, "lora_b": None, "m": None}, {"lora_a": -1, "lora_b": None}
"""The axis along which the arrays of an adapter are divided where its layer's outputs are, or its inputs: of a linear
layer, and of experts, which keep A and B transposed. The gradient of an array that is whole (None) is a sum over the
processes."""
PRECISE = "precise."
"""What the optimizer's names of float32 copies begin with."""


class Shards:
    """The arrays that train in a model, as this process has them. Where the model is not divided, all are whole.

    `sums` are the paths of whole arrays of whose gradient each process finds a part.
    """

    def __init__(self, model: nn.Module | None = None, ranks: Ranks | None = None) -> None:
        """`ranks` are the processes that hold the model together."""
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
        """Whether the array is a part of a larger one."""
        return self._axis(path) is not None

    def sums_of(self, paths: Iterable[str], ranks: Ranks) -> list[tuple[list[str], Ranks]]:
        """The sums that make a gradient of what each process found of it: of which arrays, over which processes.

        `ranks` are those that share the work of a step.
        """
        return [([path for path in paths if path in self.sums], self.ranks), (list(paths), ranks)]

    def shape(self, path: str, array: mx.array) -> tuple[int, ...]:
        """The shape of the whole."""
        shape = list(array.shape)
        if (axis := self._axis(path)) is not None and array.ndim:
            shape[axis] *= self.ranks.size
        return tuple(shape)

    def whole(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The whole arrays of everybody's parts, by the same names: of what trains, or of an optimizer's state.

        All processes of the group must ask, for the same arrays.
        """
        return {path: self.whole_of(path, array) for path, array in arrays.items()}

    def whole_of(self, path: str, array: mx.array) -> mx.array:
        """The whole array of everybody's parts; an array that is not divided, as it is."""
        axis = self._axis(path)
        return array if axis is None or not array.ndim else self.ranks.join(array, axis)

    def outlines(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Arrays of the shapes and dtypes of the whole arrays, never to be computed."""
        return {path: mx.zeros(self.shape(path, array), array.dtype) for path, array in arrays.items()}

    def part(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """This process's parts of whole arrays."""
        return {path: self.part_of(path, array) for path, array in arrays.items()}

    def part_of(self, path: str, array: mx.array) -> mx.array:
        """This process's part of one of them."""
        axis = self._axis(path)
        if axis is None or not array.ndim:
            return array
        return mx.contiguous(mx.split(array, self.ranks.size, axis=axis)[self.ranks.rank])

    def _axis(self, path: str) -> int | None:
        """By the path of what trains, or the name of what an optimizer keeps of it."""
        path = path.removeprefix(PRECISE)
        return self._axes.get(path, self._axes.get(path.rpartition(".")[0]))
