"""Updates arrays that are too large for a single step: part by part, each written into the array's own memory."""

from __future__ import annotations

import mlx.core as mx

from grpo.training.moments import BLOCK, SCALES


def parts_of(numbers: int, most: int) -> list[slice]:
    """Slices that split an array of `numbers` numbers into parts of whole blocks and about `most` numbers at most.

    All parts have the same size, except that the last may be shorter.
    """
    count = -(-numbers // most)
    each = -(-numbers // (count * BLOCK)) * BLOCK
    return [slice(start, min(start + each, numbers)) for start in range(0, numbers, each)]


class InPlace:
    """The flat arrays of one parameter, by key: the parameter itself, its float32 copy, its moments.

    MLX writes a part into an array's own memory if nothing else refers to the array. Otherwise it copies the array
    first, and the other references keep the old values.
    """

    def __init__(self, arrays: dict[str, mx.array]) -> None:
        """Empties `arrays`, so that the dictionary does not refer to the arrays."""
        self._shapes = {key: array.shape for key, array in arrays.items()}
        self._flat = {key: arrays.pop(key).reshape(-1) for key in list(arrays)}

    def part(self, where: slice) -> dict[str, mx.array]:
        """Views of the numbers in a part, and of the scales of their blocks."""
        return {key: array[_of(key, where)] for key, array in self._flat.items()}

    def write(self, where: slice, part: dict[str, mx.array]) -> None:
        """Overwrite a part with new numbers. They are computed when this returns."""
        for key, numbers in part.items():
            self._flat[key][_of(key, where)] = numbers
        mx.eval(self._flat)

    def arrays(self) -> dict[str, mx.array]:
        """All arrays in their shapes, computed."""
        shaped = {key: array.reshape(self._shapes[key]) for key, array in self._flat.items()}
        mx.eval(shaped)
        return shaped


def _of(key: str, numbers: slice) -> slice:
    """The slice of the array `key` that belongs to these numbers of the parameter."""
    if not key.endswith(f".{SCALES}"):
        return numbers
    return slice(numbers.start // BLOCK, -(-numbers.stop // BLOCK))
