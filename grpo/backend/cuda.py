"""CUDA kernels of our own, compiled when they are first run."""

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
def kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str) -> Callable[..., Any]:
    """The body of a kernel as a function; see `mx.fast.cuda_kernel` for its arguments."""
    made: Any = mx.fast.cuda_kernel(name=name, input_names=list(inputs), output_names=list(outputs), source=source)
    return cast("Callable[..., Any]", made)


@cache
def scalar(value: float) -> mx.array:
    """A number as a kernel takes it: `[1]` fp32."""
    return mx.array([value], mx.float32)
