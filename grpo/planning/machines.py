"""Machines and their published figures, which estimates of a run's cost use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from grpo.errors import UserError

Backend = Literal["cuda", "metal"]
Known = Literal["measured", "scaled", "bound"]
"""How a time is known: `measured` (fitted to measurements on this machine), `scaled` (from another machine's
measurements), or `bound` (a lower bound only)."""

GB = 2**30


@dataclass(frozen=True, slots=True)
class Machine:
    """What a plan must know about a machine: bytes of memory, and whether it has a GPU, and a CUDA GPU.

    `limited`: the memory is the recipe's limit (`memory.limit_gb`), so the plan may use nearly all of it. `host`: bytes
    of the host's memory that offloaded inputs of layers may take (None: unknown).
    """

    memory: int
    gpu: bool
    cuda: bool
    limited: bool = False
    host: int | None = None

    @property
    def usable(self) -> int:
        """Bytes that a plan may use."""
        return int((OF_A_LIMIT if self.limited else FREE) * self.memory)


def within(there: int, limit: float | None) -> int:
    """Bytes that a run may take, out of `there`: the recipe's limit (in GB), or all.

    Raises UserError for a limit above `there`.
    """
    if limit is None:
        return there
    if limit * GB > there:
        raise UserError(
            f"memory.limit_gb: {limit:g} GB is more than the machine has for MLX ({there / GB:.1f} GB): lower it, or "
            "remove it to plan with all memory"
        )
    return int(limit * GB)


FREE = 0.9
"""The share of a machine's memory that a plan may use: the rest is for other programs."""
OF_A_LIMIT = 0.97
"""The share of a recipe's limit that a plan may use: measurements vary a little."""


@dataclass(frozen=True, slots=True)
class Chip:
    """A machine: the bytes that MLX may use, the memory bandwidth in bytes per second, and the operations per second of
    its fastest matrix products. `times` says how step times on it are known."""

    name: str
    backend: Backend
    memory: int
    bandwidth: float
    flops: float
    times: Known


def cuda(name: str, gigabytes: float, bandwidth: float, teraflops: float, times: Known = "scaled") -> Chip:
    """A graphics card, from GiB of memory, GB/s, and teraflops of dense bfloat16 products summed in float32."""
    return Chip(name, "cuda", memory_of(gigabytes, "cuda"), bandwidth * 1e9, teraflops * 1e12, times)


def metal(name: str, gigabytes: float, bandwidth: float, teraflops: float) -> Chip:
    """A Mac, from the gigabytes that it is sold with."""
    return Chip(name, "metal", memory_of(gigabytes, "metal"), bandwidth * 1e9, teraflops * 1e12, "bound")


def memory_of(gigabytes: float, backend: Backend) -> int:
    """Bytes of a machine's memory that MLX may use: all of a card's; of a Mac's, what Metal lets a process use (two
    thirds, or three quarters above 36 GB)."""
    if backend == "cuda":
        return int(gigabytes * GB)
    return int(gigabytes * GB * 3 / 4) if gigabytes > 36 else int(gigabytes * GB) * 2 // 3


CHIPS = (
    # NVIDIA's data sheets and white papers (Ada, GA102). 141 GB are 131 GiB; a card's driver keeps some of 24.
    cuda("H200", 131, 4800, 989, "measured"),
    cuda("RTX 4090 24 GB", 23.5, 1008, 165),
    cuda("RTX 3090 24 GB", 23.5, 936, 71),
    # Apple's bandwidths. Apple publishes no operations: cores × 128 × 2 × 1.6 GHz.
    metal("M4 Max 128 GB", 128, 546, 16.4),
    metal("M4 Max 64 GB", 64, 546, 16.4),
    metal("M4 Pro 48 GB", 48, 273, 8.2),
    metal("M4 Max 36 GB", 36, 410, 13.1),
    metal("M4 32 GB", 32, 120, 4.1),
    metal("M4 16 GB", 16, 120, 4.1),
)
PER_BYTE: dict[Backend, float] = {"cuda": 75.0, "metal": 30.0}
"""Default operations per byte of bandwidth: an RTX 3090's (cuda) and an M4 Max's (metal)."""


def described(memory: float, bandwidth: float, teraflops: float | None, backend: Backend) -> Chip:
    """A machine with `memory` GiB, `bandwidth` GB/s and `teraflops` (None: a typical ratio to the bandwidth)."""
    teraflops = PER_BYTE[backend] * bandwidth / 1e3 if teraflops is None else teraflops
    name = f"{memory:g} GB, {bandwidth:g} GB/s"
    return cuda(name, memory, bandwidth, teraflops) if backend == "cuda" else metal(name, memory, bandwidth, teraflops)
