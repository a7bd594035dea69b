"""A driver of CUDA that locks memory by word alone, and kernels that a CPU runs at once."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from grpo.backend import pinned


class Driver:
    """Locks `room` bytes at most."""

    def __init__(self, room: int) -> None:
        self.room, self.locked = room, list[tuple[int, int]]()

    def cuMemHostRegister_v2(self, place: ctypes.c_void_p, size: ctypes.c_size_t, flags: int) -> int:
        if sum(one for _, one in self.locked) + size.value > self.room:
            return 2
        assert place.value is not None
        self.locked.append((place.value, size.value))
        return 0

    def cuGetErrorName(self, code: int, name: Any) -> None:
        name._obj.value = b"CUDA_ERROR_OUT_OF_MEMORY"


def copying(name: str, *_: Any) -> Callable[..., list[mx.array]]:
    """In the place of `grpo.backend.cuda.kernel`: the two kernels, which copy when they are called."""

    def put(inputs: list[mx.array], **_: Any) -> list[mx.array]:
        x, (address, size) = np.array(inputs[0]), inputs[1].tolist()
        assert x.nbytes == size
        ctypes.memmove(address, x.ctypes.data, size)
        return [mx.array([1])]

    def get(inputs: list[mx.array], output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
        address, size = inputs[1].tolist()
        there = np.frombuffer((ctypes.c_char * size).from_address(address), np.float32)
        assert output_dtypes == [mx.float32]
        return [mx.array(there.reshape(output_shapes[0]))]

    return {"grpo_put_on_host": put, "grpo_get_from_host": get}[name]


def locking(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A driver that is there in this test, and locks three pieces."""
    made = Driver(3 * pinned.PIECE)
    monkeypatch.setattr(pinned, "_driver", lambda: made)
    monkeypatch.setattr(pinned, "MOST", 8 * pinned.PIECE)
    monkeypatch.setattr(pinned, "available", lambda: 2 * pinned.LEAST)
    return made
