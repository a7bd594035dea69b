"""Machines by what is published of them, to reckon what a run takes there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Chip:
    """A machine: bytes that MLX may use, bytes a second from memory, operations a second of its fastest products.

    `reached` is what generator and trainer were seen to make of these limits; None where that was not measured.
    """

    name: str
    backend: Literal["cuda", "metal"]
    memory: int
    bandwidth: float
    flops: float
    reached: float | None = None


GB = 2**30
CHIPS = (
    # NVIDIA's data sheet: 141 GB, 4.8 TB/s, 989 TFLOP/s in bfloat16 without sparsity. Qwen3-0.6B reached 5 % to 14 %
    # of it (RESULTS.md against `Costs`): it waits for launches there, and larger models are nearer the limits.
    Chip("H200", "cuda", 131 * GB, 4.8e12, 989e12, reached=0.07),
    # Apple's bandwidths. Apple publishes no operations: cores × 128 × 2 × 1.6 GHz. By default Metal lends a process
    # three quarters of a large memory and two thirds of a small one.
    Chip("M4 Max 128 GB", "metal", 96 * GB, 546e9, 16.4e12),
    Chip("M4 16 GB", "metal", 16 * GB * 2 // 3, 120e9, 4.1e12),
)
