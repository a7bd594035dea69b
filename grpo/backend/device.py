"""Facts about the device, and MLX settings that depend on them. Functions import MLX when they are called."""

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
"""glibc's settings by number, in bytes: `M_MMAP_THRESHOLD` (its maximum), above which arrays are not part of the heap;
`M_TRIM_THRESHOLD`, the bytes that may be free at the heap's end; `M_TOP_PAD`, by which the heap grows additionally."""
OUT_OF_MEMORY = ("out of memory", "insufficient memory", "unable to allocate", "attempting to allocate", "[malloc")
"""Parts of the error messages of CUDA's, Metal's and MLX's allocators."""
GPU_MEMORY = ("max_recommended_working_set_size", "memory_size", "total_memory")
"""Keys of `mx.device_info` for a GPU's memory: Metal's limit for a process, Metal's total, and CUDA's total."""
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def preset() -> None:
    """Set, before MLX is imported, the size of its batches of operations on CUDA and the folder for its kernels.

    The arrays that a batch reads and writes stay in memory until it has finished, by default gigabytes. With smaller
    batches an update takes a third of the memory, and no more time. (Metal has its own limit for each machine.)
    """
    if sys.platform == "linux":
        os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", BATCH_MEGABYTES)
        kernels.keep()


def on_gpu() -> bool:
    """Whether MLX computes on a GPU (Metal or CUDA)."""
    import mlx.core as mx

    return bool(mx.default_device().type == mx.DeviceType.gpu)


def setup() -> None:
    """Prepare MLX for this machine. Call it once, before the first model is created.

    On a CPU, `mx.compile` runs a C++ compiler: seconds for each function, and an error without a compiler. Model code
    calls it too (MLX's activations), so it is switched off on a CPU.
    """
    import mlx.core as mx

    if not on_gpu():
        mx.disable_compile()
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Make the C library reuse memory that MLX frees on a CPU, where MLX has no cache.

    Otherwise the system clears the pages of every new array of some megabytes, with one page fault each: operations on
    30 MB took 44 ms instead of 6, a fifth of an update's time. Only glibc has these settings.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        for parameter, size in KEPT.items():
            library.mallopt(parameter, size)


def compiled(function: Callable[..., Any], state: Any = None) -> Callable[..., Any]:
    """`function`, compiled on a GPU, with `state` (a tree of arrays) as additional input and output.

    Arrays that are neither in `state` nor arguments become constants of the trace. Adapters are switched by swapping
    the arrays in `state`, which are read again at each call. After each call, `state` contains other Python objects for
    the same arrays: see `same_objects`.
    """
    import mlx.core as mx

    return mx.compile(function, inputs=state, outputs=state) if on_gpu() else function


@contextmanager
def same_objects(module: nn.Module) -> Iterator[None]:
    """Restore the module's arrays, as Python objects, after the block, in which nothing may train.

    Decoders recognize weights by object identity. Other objects would look like new weights, and the decoders would
    join all layers again.
    """
    before = module.parameters()
    try:
        yield
    finally:
        module.update(before)


def apart(*arrays: mx.array) -> Any:
    """Broadcast arrays against each other, and keep a compiled function from fusing their readers with their sources.

    For small arrays that are computed once per update: MLX already has a kernel for each operation. A fused kernel
    would save microseconds, but CUDA takes seconds to build it.
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
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def memory_bytes() -> int:
    """Bytes of memory that MLX may use: the GPU's, or the machine's, or the container's limit if that is less.

    On a Mac, Metal lets a process use two thirds or three quarters of the memory, unless the owner has raised the limit
    (`sysctl iogpu.wired_limit_mb`).
    """
    import mlx.core as mx

    info = mx.device_info() if on_gpu() else {}
    size = next((info[key] for key in GPU_MEMORY if info.get(key)), None)
    return int(size) if size else min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_limits()])


def _limits() -> list[int]:
    """Bytes that Linux's control groups (version 2 or 1) allow a container. A process that exceeds them is killed."""
    texts = [path.read_text().strip() for path in map(Path, MEMORY_LIMITS) if path.is_file()]
    return [int(text) for text in texts if text.isdigit()]  # without a limit the text is "max"


def limit_memory(limit: int | None) -> None:
    """Limit the bytes of MLX's arrays, and of its cache of freed arrays. None restores MLX's limits.

    A GPU's allocator releases cached memory if both together would exceed the limit. On a CPU there is no cache.
    """
    import mlx.core as mx

    if limit is not None:
        _former.append((mx.set_memory_limit(limit), mx.set_cache_limit(limit)))
    elif _former:
        memory, cache = _former[0]  # MLX's own limits
        mx.set_memory_limit(memory)
        mx.set_cache_limit(cache)
        _former.clear()


_former: list[tuple[int, int]] = []
"""MLX's limits for memory and cache before each call that changed them."""


def out_of_memory(error: RuntimeError) -> bool:
    """Whether MLX raised this error because memory ran out. MLX has no exception class for it."""
    return any(words in str(error).lower() for words in OUT_OF_MEMORY)
