"""Facts about the device, and what follows from them. Imports MLX when called."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.backend import blas, kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import mlx.core as mx
    import mlx.nn as nn


BATCH_MEGABYTES = "100"
KEPT = {-3: 32 * 2**20, -1: 512 * 2**20, -2: 16 * 2**20}
"""glibc's settings and their bytes: `M_MMAP_THRESHOLD` (the most it takes), from where an array is no part of the heap;
`M_TRIM_THRESHOLD`, how much may be free at the heap's end; `M_TOP_PAD`, by how much more the heap grows."""
OUT_OF_MEMORY = ("out of memory", "insufficient memory", "unable to allocate", "attempting to allocate", "[malloc")
"""What CUDA, Metal and MLX's allocators say."""
GPU_MEMORY = ("max_recommended_working_set_size", "memory_size", "total_memory")
"""The words of `mx.device_info` for a GPU's memory: Metal's for what a process may use and for all, and CUDA's."""
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def preset() -> None:
    """Tell MLX, before it is imported, how much a batch of operations on CUDA may do, and where to keep its kernels.

    What a batch reads and writes is held until it has ended, and unless MLX is told otherwise that is gigabytes: this
    takes a third of the memory for an update, and no more time. (Metal has a limit of its own, by machine.)
    """
    if sys.platform == "linux":
        os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", BATCH_MEGABYTES)
        kernels.keep()


def on_gpu() -> bool:
    """Whether MLX computes on a GPU (Metal or CUDA)."""
    import mlx.core as mx

    return bool(mx.default_device().type == mx.DeviceType.gpu)


def setup() -> None:
    """Prepare MLX for this machine; to be called once, before the first model is made.

    On a CPU `mx.compile` calls a C++ compiler at run time: seconds for each function, and an error where there
    is none. Model code calls it too (mlx's own activations), so it is switched off there.
    """
    import mlx.core as mx

    if not on_gpu():
        mx.disable_compile()
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Have the C library keep what MLX frees on a CPU, which has no cache of its own there, for the next arrays.

    Otherwise an array of some megabytes begins with pages that the system clears, one fault for each: operations on 30
    MB took 44 ms in place of 6, and a fifth of an update went there. Only glibc has these settings.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        for parameter, size in KEPT.items():
            library.mallopt(parameter, size)


def compiled(function: Callable[..., Any], state: Any = None) -> Callable[..., Any]:
    """`function` compiled where that pays, with `state` (a tree of arrays), if any, going in and out of it.

    What is not in `state` or an argument is baked into the trace: adapters are switched by swapping the arrays
    in `state`, which a trace reads anew at each call. Each call leaves other Python objects in `state` for the same
    arrays: see `same_objects`.
    """
    import mlx.core as mx

    return mx.compile(function, inputs=state, outputs=state) if on_gpu() else function


@contextmanager
def same_objects(module: nn.Module) -> Iterator[None]:
    """Leave the module's arrays, as Python objects, as they were before the block, in which nothing may train.

    Whoever knows weights by their objects, as decoders do, would take others for new weights, and join all layers anew.
    """
    before = module.parameters()
    try:
        yield
    finally:
        module.update(before)


def apart(*arrays: mx.array) -> Any:
    """The arrays, broadcast against each other, so that a compiled function does not fuse what reads them with them.

    For small arrays that are made once an update: MLX has a kernel for each operation, and a fused one would save
    microseconds that a CUDA machine pays for with seconds, when it builds it.
    """
    import mlx.core as mx

    if not on_gpu():
        return arrays
    together = mx.broadcast_arrays(*arrays)
    return mx.depends(together, together)


def describe() -> str:
    """One line: device, memory, MLX version, BLAS."""
    import importlib.metadata

    import mlx.core as mx

    info = mx.device_info()
    name = str(info.get("device_name", "CPU")) if on_gpu() else "CPU"
    line = f"{name}, {memory_bytes() / 2**30:.0f} GB, MLX {importlib.metadata.version('mlx')}"
    return line if on_gpu() else f"{line}, BLAS: {blas.describe()}"


def cpu_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def memory_bytes() -> int:
    """Memory that MLX may use: the GPU's, or the machine's or as much of it as the container has.

    Of a Mac's memory Metal lets a process use two thirds or three quarters, unless its owner has allowed more (`sysctl
    iogpu.wired_limit_mb`).
    """
    import mlx.core as mx

    info = mx.device_info() if on_gpu() else {}
    size = next((info[word] for word in GPU_MEMORY if info.get(word)), None)
    return int(size) if size else min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_limits()])


def _limits() -> list[int]:
    """Bytes that Linux's control groups, version 2 or 1, allow a container; who takes more is killed without a word."""
    said = [path.read_text().strip() for path in map(Path, MEMORY_LIMITS) if path.is_file()]
    return [int(text) for text in said if text.isdigit()]  # or "max"


def limit_memory(limit: int | None) -> None:
    """Limit the bytes of MLX's arrays, and of its cache of freed arrays. None restores the limits that MLX chose.

    A GPU's allocator gives up cached memory where both together would be more. A CPU has no cache.
    """
    import mlx.core as mx

    if limit is not None:
        _former.append((mx.set_memory_limit(limit), mx.set_cache_limit(limit)))
    elif _former:
        memory, cache = _former[0]  # what MLX chose
        mx.set_memory_limit(memory)
        mx.set_cache_limit(cache)
        _former.clear()


_former: list[tuple[int, int]] = []
"""MLX's limits, of memory and of its cache, before each that was set."""


def out_of_memory(error: RuntimeError) -> bool:
    """Whether MLX raised this because the memory did not suffice. It has no class of its own for that."""
    return any(words in str(error).lower() for words in OUT_OF_MEMORY)
