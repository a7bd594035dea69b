"""grpo's CUDA kernels, compiled on first use."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import mlx.core as mx

from grpo.backend.device import on_gpu


def available() -> bool:
    """Whether MLX computes on a CUDA device."""
    return on_gpu() and mx.cuda.is_available()


@cache
def kernel(
    name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str, header: str = ""
) -> Callable[..., Any]:
    """A kernel as a function, from the source of its body. See `mx.fast.cuda_kernel` for the arguments."""
    made: Any = mx.fast.cuda_kernel(
        name=name, input_names=list(inputs), output_names=list(outputs), source=_shortened(source),
        header=_shortened(header),
    )  # fmt: skip
    return cast("Callable[..., Any]", made)


def _shortened(source: str) -> str:
    """Source without comments and indentation, because MLX reads all of it at every launch to find the kernel."""
    lines = (line.split("//")[0].strip() for line in source.splitlines())
    return "\n".join(line for line in lines if line)


@cache
def scalar(value: float) -> mx.array:
    """A number as a kernel's argument: `[1]` fp32."""
    return mx.array([value], mx.float32)


def power_of_two(least: int) -> int:
    """The smallest power of two that is at least `least`. Rounding up saves compilations: one per constant size."""
    return 1 << max(0, least - 1).bit_length()


def constant(name: str, value: float) -> str:
    """A line of a kernel's source that defines a named constant."""
    return f"    constexpr float {name} = {float(value)!r}f;\n"


OVERWRITE = """
    size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x, width = matrix_shape[1];
    if (at < rows_shape[0] * width) const_cast<T*>(matrix)[first[0] * width + at] = rows[at];
    if (at == 0) done[0] = 1;
"""


def overwrite_rows(matrix: mx.array, first: int, rows: mx.array) -> mx.array:
    """Write rows `[n, D]` in place into a matrix `[N, D]` of the same dtype, from row `first` on, unknown to MLX.

    Returns an array: evaluating it writes the rows. Nothing may read them meanwhile.
    """
    done: mx.array
    (done,) = kernel("grpo_overwrite_rows", ("matrix", "rows", "first"), ("done",), OVERWRITE)(
        inputs=[matrix, rows, mx.array([first], mx.int32)],
        template=[("T", matrix.dtype)],
        grid=(rows.size, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[(1,)],
        output_dtypes=[mx.int32],
    )
    return done
