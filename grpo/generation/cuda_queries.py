"""The first part of the kernels for decode attention: the rows of a block, and their queries, keys and values.

The second part is in `grpo.generation.cuda_sources`.
"""

ROWS = """
    // One block prepares what every block reads: for each row its prefix place, the number of tokens there, and the
    // number of columns that the row has filled; and the rows sorted by place into tiles of TOGETHER rows, filled up
    // with -1.
    __shared__ int counts[MOST], begins[MOST], place_at[MOST];
    int slots = place_of_shape[0], places = lengths_shape[0], all_tiles = slots / TOGETHER + min(slots, places);
    for (int place = threadIdx.x; place < places; place += blockDim.x) counts[place] = 0;
    for (int i = threadIdx.x; i < all_tiles * TOGETHER; i += blockDim.x) tiles[i] = -1;
    __syncthreads();
    for (int row = threadIdx.x; row < slots; row += blockDim.x) {
        int place = place_of[row];
        rows[4 * row] = place;
        rows[4 * row + 1] = lengths[place];
        rows[4 * row + 2] = max(0, min(step[0] - starts[row], own_keys_shape[2] - WIDE));
        rows[4 * row + 3] = 0;
        place_at[row] = place;
        atomicAdd(&counts[place], 1);
    }
    __syncthreads();
    if (threadIdx.x == 0)
        for (int place = 0, begin = 0; place < places; ++place) {
            begins[place] = begin;
            begin += (counts[place] + TOGETHER - 1) / TOGETHER;
        }
    __syncthreads();
    for (int row = threadIdx.x; row < slots; row += blockDim.x) {
        int place = place_at[row], rank = 0;
        for (int other = 0; other < row; ++other) rank += place_at[other] == place;
        tiles[begins[place] * TOGETHER + rank] = row;
    }
"""

BEGIN = """
    constexpr int EACH = D / 32, THREADS = WARPS * 32, QUERIES = TOGETHER * POSITIONS * REPEATS;
    constexpr int BATCH = 16, CHUNKS = (WIDE + POSITIONS - 1) / POSITIONS;
    struct alignas(sizeof(T) * EACH) Vector { T x[EACH]; };
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int split = blockIdx.x % SPLITS, chunk = blockIdx.x / SPLITS % CHUNKS;
    int head = blockIdx.x / (SPLITS * CHUNKS) % HK, group = blockIdx.x / (SPLITS * CHUNKS * HK);
    int room = own_keys_shape[2], prefix = prefix_keys_shape[2];
    int from = chunk * POSITIONS, to = min(WIDE, from + POSITIONS);
    // The rows of this block, the number of columns that each has filled, and where its tiles of 16 columns begin. The
    // tiles of the prompt come first.
    __shared__ int slots[TOGETHER], filled[TOGETHER], begins[TOGETHER + 2];
    int4 of_first = ((const int4*)rows)[TOGETHER > 1 ? max(0, tiles[group * TOGETHER]) : group];
    int place = of_first.x, prompt = of_first.y;
    if (threadIdx.x < TOGETHER) {
        int slot = TOGETHER > 1 ? tiles[group * TOGETHER + threadIdx.x] : group;
        slots[threadIdx.x] = slot;
        filled[threadIdx.x] = slot < 0 ? -to : ((const int4*)rows)[slot].z;
    }
    __syncthreads();
    if (TOGETHER > 1 && slots[0] < 0) return;
    if (threadIdx.x == 0) {
        begins[0] = 0;
        begins[1] = (prompt + 15) / 16;
        for (int r = 0; r < TOGETHER; ++r) begins[r + 2] = begins[r + 1] + (filled[r] + to + 15) / 16;
    }
    __syncthreads();
    int first = begins[TOGETHER + 1] * split / SPLITS, last = begins[TOGETHER + 1] * (split + 1) / SPLITS;
    const T* prompt_keys = prefix_keys + ((size_t)place * HK + head) * prefix * D;
    const T* prompt_values = prefix_values + ((size_t)place * HK + head) * prefix * D;
    auto own = [&](const T* all, int r) { return const_cast<T*>(all) + ((size_t)slots[r] * HK + head) * room * D; };
    // Every block that reads a row's newest columns also writes them.
    auto writes = [&](int r) { return first < begins[r + 2] && last > begins[r + 1] + filled[r] / 16; };
"""

PREPARED = """
    // Queries, keys and values are normalized and rotated already: [S, heads, WIDE, D].
    for (int r = 0; r < TOGETHER; ++r) {
        if (slots[r] < 0) continue;
        size_t of_head = (size_t)slots[r] * HK + head;
        for (int x = threadIdx.x; x < REPEATS * (to - from) * D; x += THREADS) {
            int m = x / D, position = from + m / REPEATS;
            size_t which = of_head * REPEATS + m % REPEATS;
            set_query(r * POSITIONS * REPEATS + m, x % D, (float)queries[(which * WIDE + position) * D + x % D]);
        }
        for (int x = threadIdx.x; writes(r) && x < to * D; x += THREADS) {
            own(own_keys, r)[(size_t)filled[r] * D + x] = keys[of_head * WIDE * D + x];
            own(own_values, r)[(size_t)filled[r] * D + x] = values[of_head * WIDE * D + x];
        }
    }
"""

JOINED = """
    // Queries, keys and values come as one product without the adapters' B. A warp handles one head of one position: it
    // adds x @ A @ B, normalizes and rotates.
    __shared__ float staged[WARPS][D];
    int pairs = frequencies_shape[0], queries = REPEATS * (to - from), items = queries + 2 * to;
    for (int item = warp; item < TOGETHER * items; item += WARPS) {
        int r = item / items, what = item % items;
        bool is_query = what < queries, is_value = what >= queries + to;
        if (slots[r] < 0 || !(is_query || writes(r))) continue;
        int position = is_query ? from + what / REPEATS : (what - queries) % to;
        int which = is_query ? head * REPEATS + what % REPEATS : HK * REPEATS + head + (is_value ? HK : 0);
        int dim = lane * EACH, column = which * D + dim;
        size_t n = (size_t)slots[r] * WIDE + position;
        Vector from_product = *(const Vector*)(product + n * product_shape[1] + column);
        float x[EACH], square = 0.f;
        for (int i = 0; i < EACH; ++i) x[i] = (float)from_product.x[i] + (BIAS ? (float)bias[column + i] : 0.f);
        if (RQ + RK + RV > 0) {
            const T* halves = low + n * low_shape[1] + LOW + (is_query ? 0 : is_value ? RQ + RK : RQ);
            int ranks = is_query ? RQ : is_value ? RV : RK;
            for (int begin = 0; begin < ranks; begin += BATCH) {
                Vector lines[BATCH];
                float factors[BATCH];
                #pragma unroll
                for (int u = 0; u < BATCH; ++u) {
                    int rank = min(begin + u, ranks - 1);
                    lines[u] = *(const Vector*)(b + (size_t)rank * ((HK * REPEATS + 2 * HK) * D) + column);
                    factors[u] = begin + u < ranks ? (float)halves[rank] : 0.f;
                }
                #pragma unroll
                for (int u = 0; u < BATCH; ++u)
                    for (int i = 0; i < EACH; ++i) x[i] += factors[u] * (float)lines[u].x[i];
            }
        }
        T* to_keys = own(own_keys, r) + (size_t)(filled[r] + position) * D + dim;
        T* to_values = own(own_values, r) + (size_t)(filled[r] + position) * D + dim;
        if (is_value) {
            for (int i = 0; i < EACH; ++i) to_values[i] = (T)x[i];
            continue;
        }
        if (NORM) {
            for (int i = 0; i < EACH; ++i) square += x[i] * x[i];
            for (int offset = 16; offset; offset >>= 1) square += __shfl_xor_sync(0xffffffffu, square, offset);
            float inverse = rsqrtf(square / D + EPS);
            for (int i = 0; i < EACH; ++i) x[i] *= inverse * (float)weight[column + i];
        }
        float* mine = staged[warp];
        __syncwarp();
        for (int i = 0; i < EACH; ++i) mine[dim + i] = x[i];
        __syncwarp();
        float angle = (float)(prompt + filled[r] + position);
        for (int pair = lane; pair < pairs; pair += 32) {
            int one = TRADITIONAL ? 2 * pair : pair, other = TRADITIONAL ? 2 * pair + 1 : pair + pairs;
            float cosine, sine, left = mine[one], right = mine[other];
            sincosf(angle * frequencies[pair], &sine, &cosine);
            mine[one] = left * cosine - right * sine;
            mine[other] = left * sine + right * cosine;
        }
        __syncwarp();
        for (int i = 0; i < EACH; ++i) {
            if (is_query) set_query(r * POSITIONS * REPEATS + what, dim + i, mine[dim + i]);
            else to_keys[i] = (T)mine[dim + i];
        }
    }
"""
