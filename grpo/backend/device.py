"""Facts about the device, and what follows from them. Imports MLX when called."""

from __future__ import annotations

import importlib.metadata
import os
from typing import TYPE_CHECKING, Any

from grpo.backend import blas

if TYPE_CHECKING:
    from collections.abc import Callable


BATCH_MEGABYTES = "100"
"""What a batch of operations on CUDA may read and write: an update takes a third of the memory, and as long."""


def on_gpu() -> bool:
    """Whether MLX computes on a GPU (Metal or CUDA)."""
    import mlx.core as mx

    return bool(mx.default_device().type == mx.DeviceType.gpu)


def setup() -> None:
    """Prepare MLX for this machine; to be called once, before the first model is made.

    On a CPU `mx.compile` calls a C++ compiler at run time: seconds for each function, and an error where there
    is none. Model code calls it too (mlx's own activations), so it is switched off there.

    On CUDA what operations have read and written is freed when the batch of operations that they are in has ended,
    and a batch is of up to gigabytes unless MLX is told otherwise.
    """
    import mlx.core as mx

    from grpo.backend import cuda

    if not on_gpu():
        mx.disable_compile()
    if cuda.available():
        os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", BATCH_MEGABYTES)


def compiled(function: Callable[..., Any], state: Any = None) -> Callable[..., Any]:
    """`function` compiled where that pays, with `state` (a tree of arrays), if any, going in and out of it.

    What is not in `state` or an argument is baked into the trace: adapters are switched by swapping the arrays
    in `state`, which a trace reads anew at each call.
    """
    import mlx.core as mx

    return mx.compile(function, inputs=state, outputs=state) if on_gpu() else function


def describe() -> str:
    """One line: device, memory, MLX version, BLAS."""
    import mlx.core as mx

    info = mx.device_info()
    name = str(info.get("device_name", "CPU")) if on_gpu() else "CPU"
    line = f"{name}, {memory_bytes() / 2**30:.0f} GB, MLX {importlib.metadata.version('mlx')}"
    return line if on_gpu() else f"{line}, BLAS: {blas.describe()}"


def memory_bytes() -> int:
    """Memory that MLX may use: the GPU's, or the machine's."""
    import mlx.core as mx

    size = mx.device_info().get("memory_size") if on_gpu() else None
    return int(size) if size else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
