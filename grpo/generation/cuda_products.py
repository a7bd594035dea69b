"""A CUDA kernel for matrix products with few rows.

For every product, MLX asks cuBLAS for an algorithm, which takes the host longer than the device needs for a few rows.
In this kernel, the order of summation does not depend on the number of rows (up to `MOST_ROWS`). So a row's product is
the same to the bit in steps of one token and in steps of several tokens.
"""

from __future__ import annotations

import mlx.core as mx

from grpo.backend.cuda import available, kernel, power_of_two
from grpo.generation.cuda_sources import HEADER

MOST_ROWS = 64
WARPS = 8

PRODUCT = """
    // A block computes MANY * 16 outputs of all rows, and its warps share the K numbers of a row. The order of these
    // numbers does not matter, so every lane reads 8 adjacent numbers as one vector.
    using grpo_kernels::multiply;
    constexpr int THREADS = WARPS * 32;
    int rows = x_shape[0], outs = matrix_shape[0];
    __shared__ float sums[WARPS][16][TILES * 8 + 1];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, first = blockIdx.x * MANY * 16;
    float sum[MANY][TILES][4];
    #pragma unroll
    for (int i = 0; i < MANY * TILES * 4; ++i) sum[i / (TILES * 4)][i / 4 % TILES][i % 4] = 0.f;
    #pragma unroll 4
    for (int k = warp * 32 + 8 * t; k < K; k += WARPS * 32) {
        uint4 a[MANY][2];
        #pragma unroll
        for (int i = 0; i < MANY * 2; ++i)
            a[i / 2][i % 2] = *(const uint4*)(matrix + (size_t)min(first + 8 * i + g, outs - 1) * K + k);
        #pragma unroll
        for (int n = 0; n < TILES; ++n) {
            uint4 b = *(const uint4*)(x + (size_t)min(n * 8 + g, rows - 1) * K + k);
            #pragma unroll
            for (int i = 0; i < MANY; ++i) {
                multiply<T>(sum[i][n], a[i][0].x, a[i][1].x, a[i][0].y, a[i][1].y, b.x, b.y);
                multiply<T>(sum[i][n], a[i][0].z, a[i][1].z, a[i][0].w, a[i][1].w, b.z, b.w);
            }
        }
    }
    #pragma unroll
    for (int i = 0; i < MANY; ++i) {
        __syncthreads();
        #pragma unroll
        for (int n = 0; n < TILES; ++n)
            #pragma unroll
            for (int c = 0; c < 4; ++c) sums[warp][g + 8 * (c / 2)][n * 8 + 2 * t + c % 2] = sum[i][n][c];
        __syncthreads();
        for (int at = threadIdx.x; at < 16 * rows; at += THREADS) {
            int output = first + 16 * i + at % 16, row = at / 16;
            float all = 0.f;
            for (int w = 0; w < WARPS; ++w) all += sums[w][at % 16][row];
            if (output < outs) out[(size_t)row * outs + output] = (T)all;
        }
    }
"""


def serves(x: mx.array, matrix: mx.array) -> bool:
    """Whether the kernel supports the product of `x` `[N, K]` and `matrix` `[outs, K]`."""
    few = x.ndim == 2 and x.shape[0] <= MOST_ROWS and x.shape[1] % 32 == 0
    return few and available() and x.dtype == matrix.dtype and matrix.dtype in (mx.bfloat16, mx.float16)


def product(x: mx.array, matrix: mx.array) -> mx.array:
    """`x` `[N, K]` times the transpose of `matrix` `[outs, K]`."""
    (rows, width), outs = x.shape, matrix.shape[0]
    many = 2 if rows > 16 and outs >= 4096 else 1
    out: mx.array
    (out,) = kernel("grpo_product", ("x", "matrix"), ("out",), PRODUCT, HEADER)(
        inputs=[x, matrix],
        template=[
            ("T", matrix.dtype), ("TILES", power_of_two(-(-rows // 8))), ("K", width), ("MANY", many), ("WARPS", WARPS),
        ],
        grid=(-(-outs // (16 * many)) * WARPS * 32, 1, 1),
        threadgroup=(WARPS * 32, 1, 1),
        output_shapes=[(rows, outs)],
        output_dtypes=[matrix.dtype],
    )  # fmt: skip
    return out
