"""Sampling in CUDA kernels, which read the logits in place: no fp32 copy of `[S, V]` is ever made.

The first kernel finds the threshold of the filters. The second draws a token from each part of the vocabulary with the
Gumbel trick. The third compares the draws of the parts and computes the logprobs of the token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx

from grpo.backend.cuda import kernel, scalar
from grpo.backend.maths import largest_power_of_two

THREADS = 512
BLOCKS = 528
"""Number of blocks that fill a device. With fewer rows, several blocks share a row's vocabulary."""
MOST_PARTS, LEAST_TOKENS = 16, 4096
"""Largest number of parts of a vocabulary, and smallest number of tokens in a part."""

COMMON = """
    constexpr int AT_ONCE = 4, WARPS = THREADS / 32;
    __shared__ float shared[WARPS];
    int row = blockIdx.x / PARTS, size = logits_shape[1], warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int part = blockIdx.x % PARTS, share = (size / PARTS + 4) / 4 * 4;
    int start = min(size, part * share), stop = min(size, start + share);
    const T* from = logits + (size_t)row * size;
    auto plain = [&](int at) { return UNIT ? (float)from[at] : (float)from[at] / temperature[0]; };
    auto shaped = [&](int at) {
        float x = (float)from[at];
        if (PENALISED && seen[(size_t)row * size + at]) x = x > 0.f ? x / penalty[0] : x * penalty[0];
        if (!UNIT) x /= temperature[0];
        if (EARLY && stops[at] && decoded[row] < MIN_TOKENS) x = -INFINITY;
        return x;
    };
    auto reduced = [&](float value, auto combine, float nothing) {
        for (int offset = 16; offset; offset >>= 1) value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
        __syncthreads();
        if (lane == 0) shared[warp] = value;
        __syncthreads();
        value = lane < WARPS ? shared[lane] : nothing;
        for (int offset = 16; offset; offset >>= 1) value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
        return value;
    };
    auto larger = [](float a, float b) { return fmaxf(a, b); };
    auto smaller = [](float a, float b) { return fminf(a, b); };
    auto sum = [](float a, float b) { return a + b; };
    auto each = [&](auto value, auto visit) {
        for (int begin = start + threadIdx.x; begin < stop; begin += THREADS * AT_ONCE) {
            float now[AT_ONCE];
            for (int u = 0; u < AT_ONCE; ++u) {
                int at = begin + u * THREADS;
                now[u] = at < stop ? value(at) : -INFINITY;
            }
            for (int u = 0; u < AT_ONCE; ++u) visit(now[u], begin + u * THREADS);
        }
    };
    float top = -INFINITY;
    each(shaped, [&](float x, int) { top = fmaxf(top, x); });
    top = reduced(top, larger, -INFINITY);
"""

THRESHOLD = (
    COMMON
    + """
    // Each pass makes the bracket around the threshold eight times narrower: it finds the number of tokens, or their
    // probability, above each of eight candidates. When few tokens are left in the bracket, their ranks are counted.
    constexpr int CANDIDATES = 8, MOST = 1024, PASSES = 3, TRIES = 8;
    constexpr float RANGE = 32.f;
    __shared__ float members[MOST], member_weights[MOST];
    __shared__ int listed;
    auto lowest_of = [&](bool mass, float target) {
        float begin = 0.f, end = RANGE, before = 0.f;
        auto narrow = [&]() {
            float above[CANDIDATES], step = (end - begin) / CANDIDATES;
            for (int c = 0; c < CANDIDATES; ++c) above[c] = 0.f;
            each(shaped, [&](float x, int) {
                float distance = top - x, weight = mass ? __expf(-distance) : 1.f;
                if (distance >= end || distance < begin) return;
                for (int c = 0; c < CANDIDATES; ++c) above[c] += distance < begin + (c + 1) * step ? weight : 0.f;
            });
            float reached = before, from = begin;
            for (int c = 0; c < CANDIDATES; ++c) {
                float to = c == CANDIDATES - 1 ? end : begin + (c + 1) * step;
                float through = before + reduced(above[c], sum, 0.f);
                if (through >= target) { begin = from; end = to; before = reached; return true; }
                reached = through;
                from = to;
            }
            return false;
        };
        for (int pass = 0; pass < PASSES; ++pass)
            if (!narrow()) return -INFINITY;
        for (int attempt = 0; attempt < TRIES; ++attempt) {
            __syncthreads();
            if (threadIdx.x == 0) listed = 0;
            __syncthreads();
            each(shaped, [&](float x, int) {
                float distance = top - x;
                if (distance < begin || distance >= end) return;
                int place = atomicAdd(&listed, 1);
                if (place < MOST) { members[place] = x; member_weights[place] = mass ? __expf(-distance) : 1.f; }
            });
            __syncthreads();
            if (listed <= MOST || !narrow()) break;  // after all tries, the tokens that are left are nearly equal
        }
        int many = min(listed, MOST);
        float mine = INFINITY;
        for (int i = threadIdx.x; i < many; i += THREADS) {
            float above = before;
            for (int j = 0; j < many; ++j) above += members[j] > members[i] ? member_weights[j] : 0.f;
            if (above < target) mine = fminf(mine, members[i]);
        }
        return reduced(mine, smaller, INFINITY);
    };
    float lowest = -INFINITY;
    if (K > 0 && K < size) lowest = lowest_of(false, (float)K);
    if (P) {
        float all = 0.f;
        each(shaped, [&](float x, int) { all += x >= lowest ? __expf(x - top) : 0.f; });
        lowest = fmaxf(lowest, lowest_of(true, top_p[0] * reduced(all, sum, 0.f)));
    }
    if (threadIdx.x == 0) out[row] = fmaxf(lowest, top + log_min_p[0]);
"""
)

DRAW = (
    COMMON
    + """
    // Philox 4x32-10 (Salmon 2011, doi 10.1145/2063384.2063405): four numbers from a row's key, the step and an index.
    auto philox = [&](unsigned place, unsigned* r) {
        unsigned k0 = keys[2 * row], k1 = keys[2 * row + 1], c0 = place, c1 = decoded[row], c2 = 0, c3 = 0;
        for (int round = 0; round < 10; ++round) {
            unsigned h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
            unsigned h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
            c0 = h1 ^ c1 ^ k0; c1 = l1; c2 = h0 ^ c3 ^ k1; c3 = l0;
            k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
        }
        r[0] = c0; r[1] = c1; r[2] = c2; r[3] = c3;
    };
    float cut = FILTERED ? lowest[row] : -INFINITY, best = -INFINITY, all = 0.f, kept = 0.f;
    int winner = 0;
    float plain_top = top;
    if (PENALISED || EARLY) {
        plain_top = -INFINITY;
        each(plain, [&](float x, int) { plain_top = fmaxf(plain_top, x); });
        plain_top = reduced(plain_top, larger, -INFINITY);
    }
    // A part without a token that may be drawn has no maximum, and draws nothing.
    float shaped_top = top > -INFINITY ? top : 0.f, whole_top = plain_top > -INFINITY ? plain_top : 0.f;
    for (int place = start / 4 + threadIdx.x; place * 4 < stop; place += THREADS) {
        unsigned random[4];
        philox(place, random);
        for (int u = 0; u < 4; ++u) {
            int at = place * 4 + u;
            if (at >= stop) break;
            float x = shaped(at);
            if (LOGPROBS) {
                all += __expf((PENALISED || EARLY ? plain(at) : x) - whole_top);
                if ((FILTERED || PENALISED || EARLY) && x >= cut) kept += __expf(x - shaped_top);
            }
            // A Gumbel number is -log(-log(1 - u)), and -log(1 - u) >= u: most tokens lose without a logarithm.
            float uniform = ((float)random[u] + 0.5f) * 0x1p-32f;
            if (x < cut || x == -INFINITY || uniform > 1.001f * __expf(x - best)) continue;
            // -log(1 - u) keeps its precision where it counts: small exponentials, which are large Gumbels.
            float gumbel = x - logf(-log1pf(-uniform));
            if (gumbel > best) { best = gumbel; winner = at; }
        }
    }
    __shared__ float bests[WARPS];
    __shared__ int winners[WARPS];
    for (int offset = 16; offset; offset >>= 1) {
        float other = __shfl_xor_sync(0xffffffffu, best, offset);
        int theirs = __shfl_xor_sync(0xffffffffu, winner, offset);
        if (other > best || (other == best && theirs < winner)) { best = other; winner = theirs; }
    }
    if (lane == 0) { bests[warp] = best; winners[warp] = winner; }
    if (LOGPROBS) { all = reduced(all, sum, 0.f); kept = reduced(kept, sum, 0.f); }
    __syncthreads();
    if (threadIdx.x) return;
    for (int w = 1; w < WARPS; ++w)
        if (bests[w] > best || (bests[w] == best && winners[w] < winner)) { best = bests[w]; winner = winners[w]; }
    float* mine = parts + (size_t)blockIdx.x * 8;
    mine[0] = best; mine[1] = plain_top; mine[2] = all; mine[3] = shaped_top; mine[4] = kept;
    if (best > -INFINITY) { mine[5] = plain(winner); mine[6] = shaped(winner); }
    winners_of[blockIdx.x] = winner;
"""
)

COMPARE = """
    // One thread per row: the best of its parts' draws, and the total weight of all parts.
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= winners_of_shape[0] / PARTS) return;
    const float* of = parts + (size_t)row * PARTS * 8;
    int first = 0;
    float plain_top = -INFINITY, top = -INFINITY, all = 0.f, kept = 0.f;
    for (int p = 0; p < PARTS; ++p) {
        if (of[8 * p] > of[8 * first]) first = p;
        plain_top = fmaxf(plain_top, of[8 * p + 1]);
        if (of[8 * p] > -INFINITY) top = fmaxf(top, of[8 * p + 3]);
    }
    for (int p = 0; p < PARTS; ++p) {
        if (of[8 * p + 1] > -INFINITY) all += of[8 * p + 2] * __expf(of[8 * p + 1] - plain_top);
        if (of[8 * p] > -INFINITY) kept += of[8 * p + 4] * __expf(of[8 * p + 3] - top);
    }
    tokens[row] = winners_of[row * PARTS + first];
    logprobs[row] = of[8 * first + 5] - plain_top - logf(all);
    sampler_logprobs[row] = of[8 * first + 6] - top - logf(kept);
"""


@dataclass(frozen=True, slots=True)
class Logits:
    """Logits `[S, V]` in the model's dtype, and how to reshape them before a token is drawn.

    seen `[S, V]` bool marks the tokens that get the repetition penalty, or is None; stops `[V]` bool marks the tokens
    that a row must not draw before it has decoded min_tokens tokens; decoded `[S]` int32 counts these.
    """

    values: mx.array
    temperature: float
    decoded: mx.array
    stops: mx.array
    min_tokens: int = 0
    seen: mx.array | None = None
    penalty: float = 1.0

    def inputs(self) -> dict[str, mx.array]:
        seen = self.stops if self.seen is None else self.seen
        return {
            "logits": self.values, "temperature": scalar(self.temperature), "decoded": self.decoded,
            "stops": self.stops, "seen": seen, "penalty": scalar(self.penalty),
        }  # fmt: skip

    def template(self) -> list[tuple[str, object]]:
        return [
            ("T", self.values.dtype), ("THREADS", THREADS), ("UNIT", self.temperature == 1.0),
            ("PENALISED", self.seen is not None), ("EARLY", self.min_tokens > 0), ("MIN_TOKENS", self.min_tokens),
        ]  # fmt: skip


def threshold(logits: Logits, top_k: int, top_p: float, min_p: float) -> mx.array:
    """`grpo.generation.filters.threshold` for the reshaped logits, without sorting them: `[S, 1]` fp32."""
    rows = logits.values.shape[0]
    inputs = {
        **logits.inputs(), "top_p": scalar(top_p), "log_min_p": scalar(math.log(min_p) if min_p else -math.inf),
    }  # fmt: skip
    lowest: mx.array
    (lowest,) = kernel("grpo_threshold", tuple(inputs), ("out",), THRESHOLD)(
        inputs=list(inputs.values()),
        template=[*logits.template(), ("PARTS", 1), ("K", top_k), ("P", top_p < 1)],
        grid=(rows * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(rows, 1)],
        output_dtypes=[mx.float32],
    )
    return lowest


def draw(
    logits: Logits, lowest: mx.array | None, keys: mx.array, logprobs: bool
) -> tuple[mx.array, mx.array, mx.array]:
    """Draw tokens `[S]` uint32 whose reshaped logits are not below `lowest` `[S, 1]`, with keys `[S, 2]` uint32.

    Also returns the tokens' logprobs at the temperature and under the distribution that they were drawn from, both
    `[S]` fp32. Without `logprobs`, these two arrays are not computed and hold arbitrary values.
    """
    rows, size = logits.values.shape
    most = max(1, min(MOST_PARTS, BLOCKS // rows, size // LEAST_TOKENS))
    parts = largest_power_of_two(most)
    inputs = {**logits.inputs(), "keys": keys, "lowest": scalar(0.0) if lowest is None else lowest}
    drawn = kernel("grpo_draw", tuple(inputs), ("parts", "winners_of"), DRAW)(
        inputs=list(inputs.values()),
        template=[*logits.template(), ("PARTS", parts), ("FILTERED", lowest is not None), ("LOGPROBS", logprobs)],
        grid=(rows * parts * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(rows * parts, 8), (rows * parts,)],
        output_dtypes=[mx.float32, mx.int32],
    )
    outputs = ("tokens", "logprobs", "sampler_logprobs")
    tokens, plain, sampled = kernel("grpo_compare_draws", ("parts", "winners_of"), outputs, COMPARE)(
        inputs=drawn,
        template=[("PARTS", parts)],
        grid=(-(-rows // 32) * 32, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(rows,), (rows,), (rows,)],
        output_dtypes=[mx.uint32, mx.float32, mx.float32],
    )
    return tokens, plain, sampled
