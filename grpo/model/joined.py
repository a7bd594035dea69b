"""Whole arrays of which several processes have parts, one at a time: no process ever holds them all.

A checkpoint of spread weights (`grpo.model.fsdp`) has the whole state of the optimizer, which may be larger than the
memory of any machine of the run.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from grpo.model.shards import Shards

NAMES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.int8: "I8",
    mx.uint16: "U16",
    mx.int16: "I16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.uint64: "U64",
    mx.int64: "I64",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.float32: "F32",
}
"""Dtypes, as the safetensors format calls them."""
ALIGNMENT = 8
"""Bytes of which the header's length is a multiple, as the format recommends."""


class Joined(Mapping[str, mx.array]):
    """The whole arrays of everybody's parts, sorted by name. Each is joined when it is read, and not kept.

    All processes must read all arrays in this order, each once. `finish` reads the rest.
    """

    def __init__(self, shards: Shards, parts: Mapping[str, mx.array]) -> None:
        self._shards, self._parts = shards, dict(sorted(parts.items()))
        self.unread = list(self._parts)

    def __getitem__(self, path: str) -> mx.array:
        whole = self._shards.whole_of(path, self._parts[path])
        self.unread.remove(path)
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def outlines(self) -> dict[str, mx.array]:
        """Arrays of the whole arrays' shapes and dtypes, never to be computed. Nothing is exchanged."""
        return self._shards.outlines(self._parts)

    def finish(self) -> None:
        """Read what this process has not read, so that the others get it."""
        for path in list(self.unread):
            mx.eval(self[path])


def write_joined(path: Path, arrays: Joined) -> None:
    """Write a safetensors file, an array at a time. Raises OSError where it cannot be written."""
    header, begin = {}, 0
    for name, outline in arrays.outlines().items():
        end = begin + outline.nbytes
        header[name] = {"dtype": NAMES[outline.dtype], "shape": outline.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in arrays:
            file.write(_bytes(arrays[name]))


def _bytes(array: mx.array) -> bytes:
    """The numbers of an array, row by row."""
    plain = mx.contiguous(array.reshape(-1))
    plain = plain.view(mx.uint16) if plain.dtype == mx.bfloat16 else plain  # NumPy has no bfloat16
    mx.eval(plain)
    return np.asarray(plain).tobytes()
