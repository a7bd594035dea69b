"""Keys and values stored in 4 or 8 bits per number: `rollout.kv_bits`.

Each token and head is quantized separately, in groups, with MLX's affine mode: integers, and a scale and a bias per
group. So the content of a column does not depend on other columns, or on when it was written.
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
"""Group sizes: how many numbers of a head share a scale and a bias. The first that divides the head's width is used, or
else the last, with the head padded with zeros. Groups of 32 have a tenth less rounding error than groups of 64, but
need half a bit more per number with a 16-bit dtype."""


@dataclass(frozen=True, slots=True)
class BitPacking:
    """How heads of one width are quantized: bits per number, and how many numbers share a scale and a bias."""

    bits: int
    group: int
    width: int

    @classmethod
    def of(cls, width: int, bits: int) -> BitPacking:
        return cls(bits, next((group for group in GROUPS if width % group == 0), GROUPS[-1]), width)

    @property
    def filled(self) -> int:
        """The width of a head, padded to whole groups."""
        return -(-self.width // self.group) * self.group

    def packed(self, array: mx.array) -> list[mx.array]:
        """Quantize `[…, D]`: integers `[…, filled · bits / 32]` uint32, then scales and biases `[…, filled / group]` in
        the dtype of the input."""
        return list(mx.quantize(padded(array, self.filled, -1), group_size=self.group, bits=self.bits))

    def numbers(self, packed: Sequence[mx.array]) -> mx.array:
        """Dequantize what `packed` returns: `[…, D]`."""
        integers, scales, biases = packed
        return self._cut(mx.dequantize(integers, scales, biases, group_size=self.group, bits=self.bits))

    def times_transposed(self, x: mx.array, packed: Sequence[mx.array]) -> mx.array:
        """`x […, n, D]` times the transpose of the packed numbers `[…, C, D]`: `[…, n, C]`, for the few rows of a slot.

        Without CUDA it does not dequantize the numbers, which takes longer on a CPU. MLX's quantized products were not
        tested on CUDA.
        """
        if available():
            return x @ self.numbers(packed).swapaxes(-1, -2)
        integers, scales, biases = packed
        return mx.quantized_matmul(padded(x, self.filled, -1), integers, scales, biases, True, self.group, self.bits)

    def times(self, x: mx.array, packed: Sequence[mx.array]) -> mx.array:
        """`x […, n, C]` times the packed numbers `[…, C, D]`: `[…, n, D]`. See `times_transposed`."""
        if available():
            return x @ self.numbers(packed)
        integers, scales, biases = packed
        return self._cut(mx.quantized_matmul(x, integers, scales, biases, False, self.group, self.bits))

    def bytes(self, dtype: mx.Dtype) -> int:
        """Bytes of one head, with scales and biases in this dtype."""
        return self.filled * self.bits // 8 + 2 * (self.filled // self.group) * dtype.size

    def _cut(self, array: mx.array) -> mx.array:
        return array if self.filled == self.width else array[..., : self.width]


@dataclass
class PackedLayer(Layer):
    """A layer's quantized keys and values. The inherited buffers hold the integers.

    Methods accept and return plain numbers, `[…, D]` in the model's dtype, except `take` and `put_back`, which copy the
    packed form.
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
    """A `CacheShape` whose numbers are stored in `bits` bits."""

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
    """The shapes of the same layers with keys and values stored in `bits` bits."""
    return [PackedShape(s.heads, s.key_width, s.value_width, s.dtype, bits) for s in shapes]
