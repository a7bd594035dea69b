"""Arrays that are too large to move at once: a part at a time, each written into the array's own memory."""

from __future__ import annotations

import mlx.core as mx

from grpo.training.moments import BLOCK, SCALES


def parts_of(numbers: int, most: int) -> list[slice]:
    """Equal parts of an array but for the last, each of whole blocks and of about `most` numbers at most."""
    count = -(-numbers // most)
    each = -(-numbers // (count * BLOCK)) * BLOCK
    return [slice(start, min(start + each, numbers)) for start in range(0, numbers, each)]


class InPlace:
    """What belongs to one parameter, flat, by key: the parameter itself, its copy, its moments.

    MLX writes a part into an array's own memory if nothing else refers to the array; otherwise it copies the array
    first, and what others refer to stays as it was.
    """

    def __init__(self, arrays: dict[str, mx.array]) -> None:
        """Empties `arrays`, so that nothing there refers to them."""
        self._shapes = {key: array.shape for key, array in arrays.items()}
        self._flat = {key: arrays.pop(key).reshape(-1) for key in list(arrays)}

    def part(self, where: slice) -> dict[str, mx.array]:
        """Views of the numbers in a part, and of their blocks' scales."""
        return {key: array[_of(key, where)] for key, array in self._flat.items()}

    def write(self, where: slice, part: dict[str, mx.array]) -> None:
        """Put new numbers in the place of a part, computed when this returns."""
        for key, numbers in part.items():
            self._flat[key][_of(key, where)] = numbers
        mx.eval(self._flat)

    def arrays(self) -> dict[str, mx.array]:
        """All of it in its shapes, computed."""
        shaped = {key: array.reshape(self._shapes[key]) for key, array in self._flat.items()}
        mx.eval(shaped)
        return shaped


def _of(key: str, numbers: slice) -> slice:
    """Where an array holds what belongs to these numbers of the parameter."""
    if not key.endswith(f".{SCALES}"):
        return numbers
    return slice(numbers.start // BLOCK, -(-numbers.stop // BLOCK))
