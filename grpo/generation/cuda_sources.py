"""The source of the kernels for decode attention, in parts that `grpo.generation.cuda_attention` puts together.

A block attends for one head of keys and for `TOGETHER` rows of one prompt, which it reads once for all of them. It
handles as many of the step's positions as it has room for (`POSITIONS` of `WIDE`). If there are too few rows to fill
the device, `SPLITS` blocks share the columns. Scalars are written into the source: MLX keeps arrays of up to 8 bytes in
host memory, and blocks would wait for that.
"""

HEADER = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace grpo_kernels {

// D += A · B on the tensor cores, by one warp: A is 16 × 16, B is 16 × 8.
template <typename T>
__device__ inline void multiply(float* d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1);

template <>
__device__ inline void multiply<__nv_bfloat16>(
    float* d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <>
__device__ inline void multiply<__half>(
    float* d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The transpose of a warp's 8 × 8 matrix of 16-bit numbers.
__device__ inline unsigned transposed(unsigned x) {
    unsigned y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

template <typename T>
__device__ inline unsigned packed(float low, float high) {
    union { T pair[2]; unsigned word; } both;
    both.pair[0] = (T)low;
    both.pair[1] = (T)high;
    return both.word;
}

}  // namespace grpo_kernels
"""

PLAIN_BEGIN = """
    __shared__ float query[QUERIES][D];
    static_assert(TOGETHER == 1 && SPLITS == 1 && POSITIONS == 1, "one query of each head");
    auto set_query = [&](int m, int d, float x) { query[m][d] = x * SCALE; };
"""

PLAIN = """
    // In fp32, or for narrow heads: warps stride over the prompt's columns and the row's own columns, four at a time.
    // Each warp keeps a running softmax for every query head; the results of the warps are combined at the end.
    constexpr int AT_ONCE = 4;
    int columns = prompt + filled[0] + to;
    const T* row_keys = own(own_keys, 0);
    const T* row_values = own(own_values, 0);
    __syncthreads();
    float mine[REPEATS][EACH], total[REPEATS][EACH], highest[REPEATS], sums[REPEATS];
    for (int r = 0; r < REPEATS; ++r) {
        highest[r] = -1e30f;
        sums[r] = 0.f;
        for (int i = 0; i < EACH; ++i) { mine[r][i] = query[r][lane * EACH + i]; total[r][i] = 0.f; }
    }
    for (int begin = warp * AT_ONCE; begin < columns; begin += WARPS * AT_ONCE) {
        Vector k[AT_ONCE], v[AT_ONCE];
        for (int u = 0; u < AT_ONCE; ++u) {
            int at = min(begin + u, columns - 1);
            size_t offset = (size_t)(at < prompt ? at : at - prompt) * D + lane * EACH;
            k[u] = *(const Vector*)((at < prompt ? prompt_keys : row_keys) + offset);
            v[u] = *(const Vector*)((at < prompt ? prompt_values : row_values) + offset);
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
        out[((((size_t)group * WIDE + from) * HK + head) * REPEATS + r) * D + d] = (T)(sum / all);
    }
"""

TENSOR_BEGIN = """
    using grpo_kernels::multiply;
    using grpo_kernels::packed;
    using grpo_kernels::transposed;
    constexpr int TILES = (QUERIES + 7) / 8;
    __shared__ alignas(16) T query[TILES * 8][D + 8];
    for (int x = threadIdx.x; x < TILES * 8 * (D + 8); x += THREADS) (&query[0][0])[x] = (T)0.f;
    __syncthreads();
    auto set_query = [&](int m, int d, float x) { query[m][d] = (T)x; };
"""

TENSOR = """
    // A warp handles 16 columns at a time: their keys times the queries, then their values, transposed, times the
    // shares. A dot product does not depend on the order of a head's numbers, so every lane reads 8 adjacent numbers of
    // a column as one vector.
    __syncthreads();
    constexpr int PARTS = D / 32, HALVES = D / 64;
    constexpr float NOTHING = -1e30f;
    int g = lane / 4, t = lane % 4;
    constexpr float factor = SCALE * 1.44269504f;
    uint4 q[TILES][PARTS];
    float total[TILES][HALVES][4][4], highest[TILES][2], sums[TILES][2];
    int owner[TILES][2], limits[TILES][2];
    #pragma unroll
    for (int n = 0; n < TILES; ++n) {
        #pragma unroll
        for (int c = 0; c < PARTS; ++c) q[n][c] = *(const uint4*)&query[n * 8 + g][32 * c + 8 * t];
        #pragma unroll
        for (int i = 0; i < 2; ++i) {
            highest[n][i] = NOTHING;
            sums[n][i] = 0.f;
            int m = n * 8 + 2 * t + i;
            owner[n][i] = m / (POSITIONS * REPEATS);
            limits[n][i] = owner[n][i] < TOGETHER ? filled[owner[n][i]] + from + m / REPEATS % POSITIONS + 1 : 0;
        }
        #pragma unroll
        for (int x = 0; x < HALVES * 16; ++x) total[n][x / 16][x / 4 % 4][x % 4] = 0.f;
    }
    for (int tile = first + warp; tile < last; tile += WARPS) {
        uint4 k[2][PARTS], v[4][HALVES];
        int segment = 0;
        while (tile >= begins[segment + 1]) ++segment;
        int r = segment - 1, base = (tile - begins[segment]) * 16, end = segment ? min(room, filled[r] + to) : prompt;
        const T* some_keys = segment ? own(own_keys, r) : prompt_keys;
        const T* some_values = segment ? own(own_values, r) : prompt_values;
        #pragma unroll
        for (int u = 0; u < 2; ++u) {
            const T* source = some_keys + (size_t)min(base + g + 8 * u, end - 1) * D;
            #pragma unroll
            for (int c = 0; c < PARTS; ++c) k[u][c] = *(const uint4*)(source + 32 * c + 8 * t);
        }
        #pragma unroll
        for (int u = 0; u < 4; ++u) {
            const T* source = some_values + (size_t)min(base + 2 * t + u % 2 + 8 * (u / 2), end - 1) * D;
            #pragma unroll
            for (int h = 0; h < HALVES; ++h) v[u][h] = *(const uint4*)(source + 64 * h + 8 * g);
        }
        #pragma unroll
        for (int n = 0; n < TILES; ++n) {
            // The scores of queries 2t and 2t + 1 with column g (0, 1) and with column g + 8 (2, 3).
            float s[4] = {0.f, 0.f, 0.f, 0.f}, fades[2];
            #pragma unroll
            for (int c = 0; c < PARTS; ++c) {
                multiply<T>(s, k[0][c].x, k[1][c].x, k[0][c].y, k[1][c].y, q[n][c].x, q[n][c].y);
                multiply<T>(s, k[0][c].z, k[1][c].z, k[0][c].w, k[1][c].w, q[n][c].z, q[n][c].w);
            }
            #pragma unroll
            for (int i = 0; i < 2; ++i) {
                int limit = segment == 0 ? prompt : owner[n][i] == r ? limits[n][i] : 0;
                float one = base + g < limit ? s[i] * factor : NOTHING;
                float other = base + g + 8 < limit ? s[i + 2] * factor : NOTHING;
                float now = fmaxf(one, other);
                for (int offset = 4; offset < 32; offset <<= 1)
                    now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, offset));
                now = fmaxf(now, highest[n][i]);
                fades[i] = exp2f(highest[n][i] - now);
                highest[n][i] = now;
                s[i] = one > NOTHING ? exp2f(one - now) : 0.f;
                s[i + 2] = other > NOTHING ? exp2f(other - now) : 0.f;
                sums[n][i] = sums[n][i] * fades[i] + s[i] + s[i + 2];
            }
            unsigned b0 = transposed(packed<T>(s[0], s[1])), b1 = transposed(packed<T>(s[2], s[3]));
            #pragma unroll
            for (int h = 0; h < HALVES; ++h) {
                #pragma unroll
                for (int j = 0; j < 4; ++j) {
                    float* sum = total[n][h][j];
                    sum[0] *= fades[0]; sum[1] *= fades[1]; sum[2] *= fades[0]; sum[3] *= fades[1];
                    unsigned a = (&v[0][h].x)[j], b = (&v[1][h].x)[j], c = (&v[2][h].x)[j], d = (&v[3][h].x)[j];
                    multiply<T>(
                        sum, __byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632), __byte_perm(c, d, 0x5410),
                        __byte_perm(c, d, 0x7632), b0, b1);
                }
            }
        }
    }
    __shared__ float highests[WARPS][QUERIES], weights[WARPS][QUERIES], totals[WARPS][QUERIES][D];
    #pragma unroll
    for (int n = 0; n < TILES; ++n) {
        #pragma unroll
        for (int i = 0; i < 2; ++i) {
            int m = n * 8 + 2 * t + i;
            for (int offset = 4; offset < 32; offset <<= 1)
                sums[n][i] += __shfl_xor_sync(0xffffffffu, sums[n][i], offset);
            if (m >= QUERIES) continue;
            if (g == 0) { highests[warp][m] = highest[n][i]; weights[warp][m] = sums[n][i]; }
            #pragma unroll
            for (int x = 0; x < HALVES * 8; ++x)
                totals[warp][m][64 * (x / 8) + 8 * g + x % 8] = total[n][x / 8][x % 8 / 2][i + x % 2 * 2];
        }
    }
    __syncthreads();
    size_t block = (size_t)blockIdx.x * QUERIES;
    for (int x = threadIdx.x; x < QUERIES * D; x += THREADS) {
        int m = x / D, d = x % D, slot = slots[m / (POSITIONS * REPEATS)], position = from + m / REPEATS % POSITIONS;
        if (slot < 0 || position >= to) continue;
        float top = NOTHING, all = 0.f, sum = 0.f;
        for (int w = 0; w < WARPS; ++w) top = fmaxf(top, highests[w][m]);
        for (int w = 0; w < WARPS; ++w) {
            float fade = exp2f(highests[w][m] - top);
            all += weights[w][m] * fade;
            sum += totals[w][m][d] * fade;
        }
"""

ALONE = """
        size_t n = (size_t)slot * WIDE + position;
        out[((n * HK + head) * REPEATS + m % REPEATS) * D + d] = (T)(sum / all);
    }
"""

TOGETHER = """
        parts[(block + m) * D + d] = sum;
        if (d == 0) { marks[2 * (block + m)] = top; marks[2 * (block + m) + 1] = all; }
    }
    // Of the blocks that share the columns, the last to arrive combines their parts and resets the counter to 0.
    __shared__ bool latest;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int* counter = const_cast<int*>(arrived) + blockIdx.x / SPLITS;
        latest = atomicAdd(counter, 1) == SPLITS - 1;
        if (latest) *counter = 0;
    }
    __syncthreads();
    if (!latest) return;
    __threadfence();
    block -= (size_t)split * QUERIES;
    for (int x = threadIdx.x; x < QUERIES * D; x += THREADS) {
        int m = x / D, d = x % D, slot = slots[m / (POSITIONS * REPEATS)], position = from + m / REPEATS % POSITIONS;
        if (slot < 0 || position >= to) continue;
        float top = NOTHING, all = 0.f, sum = 0.f;
        for (int s = 0; s < SPLITS; ++s) top = fmaxf(top, __ldcg(marks + 2 * (block + s * QUERIES + m)));
        for (int s = 0; s < SPLITS; ++s) {
            size_t at = block + s * QUERIES + m;
            float fade = exp2f(__ldcg(marks + 2 * at) - top);
            all += __ldcg(marks + 2 * at + 1) * fade;
            sum += __ldcg(parts + at * D + d) * fade;
        }
        size_t n = (size_t)slot * WIDE + position;
        out[((n * HK + head) * REPEATS + m % REPEATS) * D + d] = (T)(sum / all);
    }
"""
