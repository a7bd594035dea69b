"""Keys and values kept in 4 or 8 bits a number: `rollout.kv_bits`.

Each head's numbers of one token are quantised by themselves, in groups, by MLX's affine form: integers, and a scale and
a bias for each group. So what a column holds depends neither on its neighbors nor on when it was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from grpo.backend.cuda import available
from grpo.generation.buffers import CacheShape, KeysValues, Layer
from grpo.generation.products import padded, product
from grpo.generation.slots import Size, View

GROUPS = (64, 32)
"""Numbers of a head that share a scale and a bias: the first of these that divides its width, or else the last, and
zeros fill the head up. Groups of 32 round a tenth less than groups of 64, for half a bit a number more in 16 bits."""


@dataclass(frozen=True, slots=True)
class BitPacking:
    """How the numbers of heads of one width are quantised: bits of each, and how many share a scale and a bias."""

    bits: int
    group: int
    width: int

    @classmethod
    def of(cls, width: int, bits: int) -> BitPacking:
        return cls(bits, next((group for group in GROUPS if width % group == 0), GROUPS[-1]), width)

    @property
    def filled(self) -> int:
        """The width that is quantised: that of a head, filled up."""
        return -(-self.width // self.group) * self.group

    def packed(self, array: mx.array) -> list[mx.array]:
        """`[…, D]` as integers `[…, filled · bits / 32]` uint32, scales and biases `[…, filled / group]` of its
        dtype."""
        return list(mx.quantize(padded(array, self.filled, -1), group_size=self.group, bits=self.bits))

    def numbers(self, packed: Sequence[mx.array]) -> mx.array:
        """`[…, D]` from what `packed` returns."""
        integers, scales, biases = packed
        return self._cut(mx.dequantize(integers, scales, biases, group_size=self.group, bits=self.bits))

    def times_transposed(self, x: mx.array, packed: Sequence[mx.array]) -> mx.array:
        """`x […, n, D] @ numbers […, C, D]` transposed, `[…, n, C]`, for the few rows that a slot has.

        Without making the numbers, which takes longer on a CPU. MLX's quantised products were not tried on CUDA.
        """
        if available():
            return x @ self.numbers(packed).swapaxes(-1, -2)
        integers, scales, biases = packed
        return mx.quantized_matmul(padded(x, self.filled, -1), integers, scales, biases, True, self.group, self.bits)

    def times(self, x: mx.array, packed: Sequence[mx.array]) -> mx.array:
        """`x […, n, C] @ numbers […, C, D]`, `[…, n, D]`, in the same way."""
        if available():
            return x @ self.numbers(packed)
        integers, scales, biases = packed
        return self._cut(mx.quantized_matmul(x, integers, scales, biases, False, self.group, self.bits))

    def bytes(self, dtype: mx.Dtype) -> int:
        """Of one head, with scales and biases of this dtype."""
        return self.filled * self.bits // 8 + 2 * (self.filled // self.group) * dtype.size

    def _cut(self, array: mx.array) -> mx.array:
        return array if self.filled == self.width else array[..., : self.width]


@dataclass
class PackedLayer(Layer):
    """A layer's keys and values, quantised. Those of `Layer` are the integers; scales and biases lie beside them.

    What goes in and comes out are numbers, `[…, D]` of the model's dtype, but for what a row keeps outside its slot.
    """

    scales: Layer
    biases: Layer
    of_keys: BitPacking
    of_values: BitPacking

    def arrays(self) -> list[mx.array]:
        return [*Layer.arrays(self), *self.scales.arrays(), *self.biases.arrays()]

    def insert(self, places: mx.array, prompts: KeysValues, first: int = 0) -> None:
        words, scales, biases = self._packed(prompts)
        Layer.insert(self, places, words, first)
        self.scales.insert(places, scales, first)
        self.biases.insert(places, biases, first)

    def prompts(self, places: mx.array, length: int) -> KeysValues:
        where = places, length
        return self.numbers([Layer.prompts(self, *where), self.scales.prompts(*where), self.biases.prompts(*where)])

    def write(self, view: View, keys: mx.array, values: mx.array) -> None:
        words, scales, biases = self._packed((keys, values))
        Layer.write(self, view, *words)
        self.scales.write(view, *scales)
        self.biases.write(view, *biases)

    def grow(self, size: Size) -> None:
        Layer.grow(self, size)
        self.scales.grow(size)
        self.biases.grow(size)

    def keep(self, slots: mx.array, places: mx.array) -> None:
        Layer.keep(self, slots, places)
        self.scales.keep(slots, places)
        self.biases.keep(slots, places)

    def prompt(self, place: int, length: int) -> KeysValues:
        where = place, length
        return self.numbers([Layer.prompt(self, *where), self.scales.prompt(*where), self.biases.prompt(*where)])

    def take(self, slot: int, columns: int) -> list[KeysValues]:
        where = slot, columns
        return [Layer.take(self, *where), self.scales.take(*where), self.biases.take(*where)]

    def put(self, slot: int, row: KeysValues, first: int = 0) -> None:
        self._put(slot, self._packed(row), first)

    def put_back(self, slot: int, taken: Sequence[KeysValues]) -> None:
        self._put(slot, taken, 0)

    def numbers(self, taken: Sequence[KeysValues]) -> KeysValues:
        keys, values = zip(*taken, strict=True)
        return self.of_keys.numbers(keys), self.of_values.numbers(values)

    def scores(self, queries: mx.array, width: int) -> mx.array:
        keys = [keys[:, :, None, :width] for keys in (self.keys, self.scales.keys, self.biases.keys)]
        return self.of_keys.times_transposed(queries, keys)

    def weighed(self, weights: mx.array) -> mx.array:
        scales, biases = self.scales.values, self.biases.values
        values = [values[:, :, None, : weights.shape[-1]] for values in (self.values, scales, biases)]
        return self.of_values.times(weights.astype(scales.dtype), values)

    def prompt_scores(self, queries: mx.array) -> mx.array:
        keys = self.of_keys.numbers([self.prefix_keys, self.scales.prefix_keys, self.biases.prefix_keys])
        return product(queries, keys.swapaxes(-1, -2))

    def prompts_weighed(self, weights: mx.array) -> mx.array:
        values = self.of_values.numbers([self.prefix_values, self.scales.prefix_values, self.biases.prefix_values])
        return product(weights.astype(values.dtype), values)

    def _packed(self, pair: KeysValues) -> list[KeysValues]:
        """Integers, scales and biases, each of keys and of values."""
        return list(zip(self.of_keys.packed(pair[0]), self.of_values.packed(pair[1]), strict=True))

    def _put(self, slot: int, packed: Sequence[KeysValues], first: int) -> None:
        words, scales, biases = packed
        Layer.put(self, slot, words, first)
        self.scales.put(slot, scales, first)
        self.biases.put(slot, biases, first)


@dataclass(frozen=True, slots=True)
class PackedShape(CacheShape):
    """The same in so many bits."""

    bits: int

    @property
    def bytes_per_token(self) -> int:
        return self.heads * sum(packing.bytes(self.dtype) for packing in self._packings)

    @property
    def at_work(self) -> int:
        if available():
            return self.numbers
        return self.heads * max(packing.filled for packing in self._packings) * self.bits // 8

    @property
    def _packings(self) -> tuple[BitPacking, BitPacking]:
        return BitPacking.of(self.key_width, self.bits), BitPacking.of(self.value_width, self.bits)

    def layer(self, size: Size) -> PackedLayer:
        keys, values = self._packings
        words = self._empty(size, (keys.filled * self.bits // 32, values.filled * self.bits // 32), mx.uint32)
        scales, biases = (
            self._empty(size, (keys.filled // keys.group, values.filled // values.group), self.dtype) for _ in range(2)
        )
        return PackedLayer(
            words.prefix_keys, words.prefix_values, words.keys, words.values, scales, biases, keys, values
        )


def packed(shapes: Sequence[CacheShape], bits: int) -> list[CacheShape]:
    """The shapes of the same layers with keys and values in so many bits."""
    return [PackedShape(s.heads, s.key_width, s.value_width, s.dtype, bits) for s in shapes]
