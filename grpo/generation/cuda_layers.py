"""CUDA kernels for the operations between a layer's products. They also apply the adapters' B."""

from __future__ import annotations

import mlx.core as mx

from grpo.backend.cuda import constant, kernel
from grpo.generation.blocks import Norm
from grpo.generation.cuda_attention import half_inputs, half_template
from grpo.generation.joined import Half

THREADS = 256

ADD_AND_NORM = """
    // One block for each row: hidden + x @ W + x @ A @ B, and its norm.
    constexpr int BATCH = 16, EACH = (H + THREADS * VECTOR - 1) / (THREADS * VECTOR), WARPS = THREADS / 32;
    struct alignas(sizeof(T) * VECTOR) Vector { T x[VECTOR]; };
    __shared__ float squares[WARPS];
    size_t row = blockIdx.x;
    const T* halves = low + row * low_shape[1] + LOW;
    float kept[EACH][VECTOR], square = 0.f;
    #pragma unroll
    for (int e = 0; e < EACH; ++e) {
        int at = (e * THREADS + threadIdx.x) * VECTOR;
        if (at >= H) continue;
        Vector one = *(const Vector*)(product + row * product_shape[1] + at);
        Vector other = *(const Vector*)(hidden + row * H + at), sum;
        for (int i = 0; i < VECTOR; ++i) kept[e][i] = (float)one.x[i] + (BIAS ? (float)bias[at + i] : 0.f);
        for (int begin = 0; begin < R; begin += BATCH) {
            Vector lines[BATCH];
            float factors[BATCH];
            #pragma unroll
            for (int u = 0; u < BATCH; ++u) {
                int r = min(begin + u, R - 1);
                lines[u] = *(const Vector*)(b + (size_t)r * H + at);
                factors[u] = begin + u < R ? (float)halves[r] : 0.f;
            }
            #pragma unroll
            for (int u = 0; u < BATCH; ++u)
                for (int i = 0; i < VECTOR; ++i) kept[e][i] += factors[u] * (float)lines[u].x[i];
        }
        for (int i = 0; i < VECTOR; ++i) {
            sum.x[i] = (T)(kept[e][i] + (float)other.x[i]);
            kept[e][i] = (float)sum.x[i];
            square += kept[e][i] * kept[e][i];
        }
        *(Vector*)(added + row * H + at) = sum;
    }
    for (int offset = 16; offset; offset >>= 1) square += __shfl_xor_sync(0xffffffffu, square, offset);
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = square;
    __syncthreads();
    square = 0.f;
    for (int w = 0; w < WARPS; ++w) square += squares[w];
    float inverse = rsqrtf(square / H + EPS);
    #pragma unroll
    for (int e = 0; e < EACH; ++e) {
        int at = (e * THREADS + threadIdx.x) * VECTOR;
        if (at >= H) continue;
        Vector done, by = *(const Vector*)(weight + at);
        for (int i = 0; i < VECTOR; ++i) done.x[i] = (T)(kept[e][i] * inverse * (float)by.x[i]);
        *(Vector*)(normed + row * H + at) = done;
    }
"""

GATED = """
    // A thread computes VECTOR columns of ROWS rows: silu(gate) · up, from x @ W + x @ A @ B.
    constexpr int BATCH = 16, ACROSS = (I + THREADS * VECTOR - 1) / (THREADS * VECTOR);
    struct alignas(sizeof(T) * VECTOR) Vector { T x[VECTOR]; };
    int at = (blockIdx.x % ACROSS * THREADS + threadIdx.x) * VECTOR, begin = blockIdx.x / ACROSS * ROWS;
    if (at >= I) return;
    float sums[2][ROWS][VECTOR];
    #pragma unroll
    for (int half = 0; half < 2; ++half) {
        int column = half * I + at;
        #pragma unroll
        for (int n = 0; n < ROWS; ++n) {
            size_t row = min(begin + n, product_shape[0] - 1);
            Vector line = *(const Vector*)(product + row * product_shape[1] + column);
            for (int i = 0; i < VECTOR; ++i)
                sums[half][n][i] = (float)line.x[i] + (BIAS ? (float)bias[column + i] : 0.f);
        }
        int ranks = half ? RU : RG;
        for (int first = 0; first < ranks; first += BATCH) {
            Vector lines[BATCH];
            #pragma unroll
            for (int u = 0; u < BATCH; ++u)
                lines[u] = *(const Vector*)(b + (size_t)min(first + u, ranks - 1) * 2 * I + column);
            #pragma unroll
            for (int n = 0; n < ROWS; ++n) {
                size_t row = min(begin + n, product_shape[0] - 1);
                const T* halves = low + row * low_shape[1] + LOW + (half ? RG : 0);
                #pragma unroll
                for (int u = 0; u < BATCH; ++u) {
                    float factor = first + u < ranks ? (float)halves[first + u] : 0.f;
                    for (int i = 0; i < VECTOR; ++i) sums[half][n][i] += factor * (float)lines[u].x[i];
                }
            }
        }
    }
    #pragma unroll
    for (int n = 0; n < ROWS; ++n) {
        if (begin + n >= product_shape[0]) return;
        Vector done;
        for (int i = 0; i < VECTOR; ++i) {
            float gate = sums[0][n][i];
            done.x[i] = (T)(gate / (1.f + __expf(-gate)) * sums[1][n][i]);
        }
        *(Vector*)(out + (size_t)(begin + n) * I + at) = done;
    }
"""


def add_and_norm(hidden: mx.array, half: Half, norm: Norm) -> tuple[mx.array, mx.array]:
    """`hidden` `[N, H]` plus a product, and the norm of this sum, both `[N, H]` in the dtype of `hidden`."""
    rows, width = hidden.shape
    inputs = {"hidden": hidden, **half_inputs(half), "weight": norm.weight}
    source = constant("EPS", norm.eps) + ADD_AND_NORM
    added: mx.array
    normed: mx.array
    added, normed = kernel("grpo_add_and_norm", tuple(inputs), ("added", "normed"), source)(
        inputs=list(inputs.values()),
        template=[
            *half_template(half), ("T", hidden.dtype), ("H", width), ("R", half.ranks[0]),
            ("VECTOR", _vector(width, half)), ("THREADS", THREADS),
        ],
        grid=(rows * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[hidden.shape, hidden.shape],
        output_dtypes=[hidden.dtype, hidden.dtype],
    )  # fmt: skip
    return added, normed


def gated(half: Half, width: int) -> mx.array:
    """silu(gate) · up, `[N, width]`, from the joined product of gate and up."""
    rows, inputs = half.base.shape[0], half_inputs(half)
    together = 1 if rows < 128 else 2 if rows < 512 else 4
    vector = _vector(width, half)
    across = -(-width // (vector * THREADS))
    out: mx.array
    (out,) = kernel("grpo_gated", tuple(inputs), ("out",), GATED)(
        inputs=list(inputs.values()),
        template=[
            *half_template(half), ("T", half.base.dtype), ("I", width), ("RG", half.ranks[0]), ("RU", half.ranks[1]),
            ("ROWS", together), ("VECTOR", vector), ("THREADS", THREADS),
        ],
        grid=(across * -(-rows // together) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(rows, width)],
        output_dtypes=[half.base.dtype],
    )  # fmt: skip
    return out


def _vector(width: int, half: Half) -> int:
    """The number of values that a thread reads as one vector. Every row of every input must be aligned to it."""
    return 4 if width % 4 == 0 and half.base.shape[1] % 4 == 0 else 1
