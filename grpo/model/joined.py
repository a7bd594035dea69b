"""Joins arrays from the parts of several processes one at a time, so that no process ever holds all of them.

A checkpoint of spread weights (`grpo.model.fsdp`) contains the optimizer's whole state, which may be larger than the
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
"""Names of dtypes in the safetensors format."""
ALIGNMENT = 8
"""The header's length is a multiple of this many bytes, as the format recommends."""


class Joined(Mapping[str, mx.array]):
    """Whole arrays, sorted by name. Each array is joined from the processes' parts when it is read, and not stored.

    All processes must read all arrays in this order, each exactly once. `finish` reads the remaining arrays.
    """

    def __init__(self, shards: Shards, parts: Mapping[str, mx.array]) -> None:
        self._shards, self._parts = shards, dict(sorted(parts.items()))
        self.unread = list(self._parts)

    def __getitem__(self, path: str) -> mx.array:
        whole = self._shards.whole_of(path, self._parts[path])
        self.unread.remove(path)
        return whole

    def __contains__(self, path: object) -> bool:
        """Whether there is an array of this name. Nothing is exchanged."""
        return path in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def outlines(self) -> dict[str, mx.array]:
        """Arrays with the shapes and dtypes of the whole arrays, never to be evaluated. Nothing is exchanged."""
        return self._shards.outlines(self._parts)

    def finish(self) -> None:
        """Read the arrays that this process has not read yet, because the other processes wait for its parts."""
        for path in list(self.unread):
            mx.eval(self[path])


def write_joined(path: Path, arrays: Joined) -> None:
    """Write a safetensors file, one array at a time. Raises OSError if the file cannot be written."""
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
    """The bytes of an array in row-major order."""
    plain = mx.contiguous(array.reshape(-1))
    plain = plain.view(mx.uint16) if plain.dtype == mx.bfloat16 else plain  # NumPy has no bfloat16
    mx.eval(plain)
    return np.asarray(plain).tobytes()
