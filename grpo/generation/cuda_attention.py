"""Decode attention as CUDA kernels.

MLX writes into a buffer only when no step in flight holds it, so a pipelined loop of stock operations copies all keys
and values at every step. The kernels write them into their ring themselves instead, behind MLX's back: nobody else may
write those buffers while a step is in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from grpo.backend.cuda import available, kernel, scalar
from grpo.generation.blocks import Block, Blocks
from grpo.generation.buffers import CacheShape, Layer
from grpo.generation.slots import View, Where

WARPS = 8
WIDTHS = (32, 64, 128, 256)
"""Widths of a head that a warp reads in vectors."""
MOST_REPEATS = 8
"""Query heads for each head of keys that fit a block's registers."""
SHARED_BYTES = 48 * 1024
"""Shared memory that a block may declare."""

PREPARED = """
    // Queries, keys and values come ready.
    for (int x = threadIdx.x; x < REPEATS * D; x += THREADS)
        (&query[0][0])[x] = (float)queries[((size_t)row * HK + head) * REPEATS * D + x] * scale[0];
    for (int i = threadIdx.x; i < D; i += THREADS) {
        own_keys[(size_t)column * D + i] = keys[((size_t)row * HK + head) * D + i];
        own_values[(size_t)column * D + i] = values[((size_t)row * HK + head) * D + i];
    }
"""

JOINED = """
    // Queries, keys and values come as one row of a product; a warp norms and rotates one head.
    int pairs = frequencies_shape[0];
    float position = (float)(prompt + step[0] - start);
    for (int item = warp; item < REPEATS + 2; item += WARPS) {
        bool is_key = item == REPEATS, is_value = item > REPEATS;
        int which = item < REPEATS ? head * REPEATS + item : HK * REPEATS + head + (is_value ? HK : 0);
        const T* from = qkv + ((size_t)row * (HK * REPEATS + 2 * HK) + which) * D;
        T* to = is_key ? own_keys + (size_t)column * D : own_values + (size_t)column * D;
        if (is_value) {
            for (int i = lane; i < D; i += 32) to[i] = from[i];
            continue;
        }
        float* normed = is_key ? key : query[item];
        float square = 0.f;
        for (int i = lane; i < D; i += 32) {
            float x = (float)from[i];
            normed[i] = x;
            square += x * x;
        }
        if (NORM) {
            for (int offset = 16; offset; offset >>= 1) square += __shfl_xor_sync(0xffffffffu, square, offset);
            float inverse = rsqrtf(square / D + eps[0]);
            for (int i = lane; i < D; i += 32) normed[i] *= inverse * (float)weight[which * D + i];
        }
        __syncwarp();
        for (int pair = lane; pair < pairs; pair += 32) {
            int one = TRADITIONAL ? 2 * pair : pair, other = TRADITIONAL ? 2 * pair + 1 : pair + pairs;
            float cosine, sine, x = normed[one], y = normed[other];
            sincosf(position * frequencies[pair], &sine, &cosine);
            normed[one] = x * cosine - y * sine;
            normed[other] = x * sine + y * cosine;
        }
        __syncwarp();
        for (int i = lane; i < D; i += 32) {
            if (is_key) to[i] = (T)normed[i];
            else normed[i] *= scale[0];
        }
    }
"""

BEGIN = """
    // One block for each row and head of keys.
    constexpr int EACH = D / 32, AT_ONCE = 4, THREADS = WARPS * 32;
    struct alignas(sizeof(T) * EACH) Vector { T x[EACH]; };
    __shared__ float query[REPEATS][D], key[D];
    int row = blockIdx.x / HK, head = blockIdx.x % HK, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int ring = ring_keys_shape[2], prefix = prefix_keys_shape[2];
    int place = place_of[row], prompt = lengths[place], start = starts[row];
    int own = min(step[0] - start + 1, ring), column = step[0] % ring, first = start % ring;
    size_t in_ring = ((size_t)row * HK + head) * ring * D, in_prefix = ((size_t)place * HK + head) * prefix * D;
    T* own_keys = const_cast<T*>(ring_keys) + in_ring;
    T* own_values = const_cast<T*>(ring_values) + in_ring;
"""

ATTEND = """
    // Its warps stride over the prompt's columns and the row's own, four at a time, each with a running softmax for
    // every query head, and are put together at the end.
    __syncthreads();
    float mine[REPEATS][EACH], total[REPEATS][EACH], highest[REPEATS], sums[REPEATS];
    for (int r = 0; r < REPEATS; ++r) {
        highest[r] = -1e30f;
        sums[r] = 0.f;
        for (int i = 0; i < EACH; ++i) { mine[r][i] = query[r][lane * EACH + i]; total[r][i] = 0.f; }
    }
    int columns = prompt + own;
    for (int begin = warp * AT_ONCE; begin < columns; begin += WARPS * AT_ONCE) {
        Vector k[AT_ONCE], v[AT_ONCE];
        for (int u = 0; u < AT_ONCE; ++u) {
            int at = min(begin + u, columns - 1), in_row = first + at - prompt;
            bool of_prompt = at < prompt;
            size_t offset = (size_t)(of_prompt ? at : in_row < ring ? in_row : in_row - ring) * D + lane * EACH;
            k[u] = *(const Vector*)((of_prompt ? prefix_keys + in_prefix : own_keys) + offset);
            v[u] = *(const Vector*)((of_prompt ? prefix_values + in_prefix : own_values) + offset);
        }
        for (int r = 0; r < REPEATS; ++r) {
            float score[AT_ONCE], now = highest[r];
            for (int u = 0; u < AT_ONCE; ++u) {
                float dot = 0.f;
                for (int i = 0; i < EACH; ++i) dot += mine[r][i] * (float)k[u].x[i];
                for (int offset = 16; offset; offset >>= 1) dot += __shfl_xor_sync(0xffffffffu, dot, offset);
                score[u] = begin + u < columns ? dot : -1e30f;
                now = fmaxf(now, score[u]);
            }
            float fade = __expf(highest[r] - now);
            highest[r] = now;
            sums[r] *= fade;
            for (int i = 0; i < EACH; ++i) total[r][i] *= fade;
            for (int u = 0; u < AT_ONCE; ++u) {
                float share = begin + u < columns ? __expf(score[u] - now) : 0.f;
                sums[r] += share;
                for (int i = 0; i < EACH; ++i) total[r][i] += share * (float)v[u].x[i];
            }
        }
    }
    __shared__ float highests[WARPS][REPEATS], weights[WARPS][REPEATS], totals[WARPS][REPEATS][D];
    for (int r = 0; r < REPEATS; ++r) {
        if (lane == 0) { highests[warp][r] = highest[r]; weights[warp][r] = sums[r]; }
        for (int i = 0; i < EACH; ++i) totals[warp][r][lane * EACH + i] = total[r][i];
    }
    __syncthreads();
    for (int x = threadIdx.x; x < REPEATS * D; x += THREADS) {
        int r = x / D, d = x % D;
        float top = -1e30f, all = 0.f, sum = 0.f;
        for (int w = 0; w < WARPS; ++w) top = fmaxf(top, highests[w][r]);
        for (int w = 0; w < WARPS; ++w) {
            float fade = __expf(highests[w][r] - top);
            all += weights[w][r] * fade;
            sum += totals[w][r][d] * fade;
        }
        out[(((size_t)row * HK + head) * REPEATS + r) * D + d] = (T)(sum / all);
    }
"""


class CudaAttention:
    """See `grpo.generation.attention.Attention`."""

    overlaps, widest = True, 1

    def attend(
        self, layer: Layer, queries: mx.array, keys: mx.array, values: mx.array, scale: float, view: View | Where
    ) -> mx.array:
        rows, query_heads, _, width = queries.shape
        heads = keys.shape[1]
        inputs = {
            "queries": queries,
            "keys": keys,
            "values": values,
            **_inputs(layer, view.where),
            "scale": scalar(scale),
        }
        template = [("T", queries.dtype), ("D", width), ("HK", heads), ("REPEATS", query_heads // heads)]
        out = _run("grpo_attend", BEGIN + PREPARED + ATTEND, inputs, template, rows * heads, queries.dtype)
        return out.reshape(queries.shape)

    def attend_joined(self, layer: Layer, qkv: mx.array, block: Block, blocks: Blocks, view: View | Where) -> mx.array:
        norm, heads = block.qk_norm, blocks.heads
        inputs = {
            "qkv": qkv,
            "weight": norm.weight if norm else blocks.norm.weight,
            "eps": scalar(norm.eps if norm else 0.0),
            "frequencies": blocks.frequencies,
            **_inputs(layer, view.where),
            "scale": scalar(blocks.scale),
        }
        template = [
            ("T", qkv.dtype), ("D", blocks.width), ("HK", heads), ("REPEATS", blocks.query_heads // heads),
            ("NORM", norm is not None), ("TRADITIONAL", blocks.traditional),
        ]  # fmt: skip
        return _run("grpo_attend_joined", BEGIN + JOINED + ATTEND, inputs, template, qkv.shape[0] * heads, qkv.dtype)


def _inputs(layer: Layer, where: Where) -> dict[str, mx.array]:
    names = ("prefix_keys", "prefix_values", "ring_keys", "ring_values")
    buffers = dict(zip(names, layer.arrays(), strict=True))
    return {**buffers, **where._asdict()}


def _run(
    name: str, source: str, inputs: dict[str, mx.array], template: list[tuple[str, Any]], blocks: int, dtype: mx.Dtype
) -> mx.array:
    """One block for each row and head of keys; out comes `[S, HQ · D]`."""
    sizes = dict(template)
    out: mx.array
    (out,) = kernel(name, tuple(inputs), ("out",), source)(
        inputs=list(inputs.values()),
        template=[*template, ("WARPS", WARPS)],
        grid=(blocks * WARPS * 32, 1, 1),
        threadgroup=(WARPS * 32, 1, 1),
        output_shapes=[(blocks // sizes["HK"], sizes["HK"] * sizes["REPEATS"] * sizes["D"])],
        output_dtypes=[dtype],
    )
    return out


def serves(shapes: Sequence[CacheShape], query_heads: int) -> bool:
    """Whether there is a CUDA device, and the kernels can handle caches of these shapes."""
    return available() and all(
        shape.key_width == shape.value_width
        and shape.key_width in WIDTHS
        and query_heads // shape.heads <= MOST_REPEATS
        and _shared_bytes(query_heads // shape.heads, shape.key_width) <= SHARED_BYTES
        for shape in shapes
    )


def _shared_bytes(repeats: int, width: int) -> int:
    """What `query`, `key`, `totals`, `highests` and `weights` take."""
    return 4 * (repeats * width + width + WARPS * repeats * width + 2 * WARPS * repeats)
