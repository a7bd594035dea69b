"""Which caches the CUDA kernels take, as far as a machine without CUDA can tell."""

import mlx.core as mx
import pytest

from grpo.backend import cuda
from grpo.generation import cuda_attention
from grpo.generation.buffers import CacheShape


@pytest.mark.parametrize(
    ("query_heads", "heads", "width", "served"),
    [
        (16, 8, 128, True),
        (64, 8, 128, True),
        (8, 2, 256, True),
        (8, 1, 256, False),
        (16, 1, 128, False),
        (8, 8, 80, False),
    ],
)
def test_kernels_serve_what_fits_a_block(monkeypatch, query_heads: int, heads: int, width: int, served: bool) -> None:
    monkeypatch.setattr(cuda_attention, "available", lambda: True)
    assert cuda_attention.serves([CacheShape(heads, width, width, mx.bfloat16)], query_heads) is served


def test_without_cuda_there_are_no_kernels() -> None:
    assert mx.cuda.is_available() or not cuda_attention.serves([CacheShape(8, 128, 128, mx.bfloat16)], 16)


def test_kernels_are_compiled_without_comments_and_indentation() -> None:
    source = """
    // Why.
    int a = 1;  // what

        #pragma unroll
    a += 2;
    """
    assert cuda._shortened(source) == "int a = 1;\n#pragma unroll\na += 2;"


def test_sizes_in_kernels_are_few() -> None:
    assert [cuda.power_of_two(size) for size in (0, 1, 2, 3, 5, 64, 65)] == [1, 1, 2, 4, 8, 64, 128]
