// Attention over the token forest in bfloat16, for CPUs that multiply pairs of bfloat16 (AVX512-BF16).
//
// A block is a run of queries of one segment and the ranges of the stream that hold its keys: its ancestors, then its
// own segment up to the block's end. Positions grow by one along that path, so the keys that a query sees are a stretch
// that ends at its own key, of the length of the window if there is one. Scores live in the cache only: the forward pass
// goes over stretches of keys with a running maximum, and the backward pass computes the weights again from the
// logarithm of their sum (Dao 2022, arXiv 2205.14135).
//
// All products are one routine: C [rows, 16 n] = A [rows, 2 p] B, with B packed in panels of 16 columns in which the
// numbers of rows 2i and 2i + 1 of a column stand side by side.

#include "pairs.h"

#ifdef POLM_PAIRS

namespace {

const int64_t STRETCH = 512;  // keys of one stretch: its scores and weights stay in the second-level cache

int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

inline float up(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

// Lanes of the 16 numbers from `first` on that lie in [low, high).
inline __mmask16 lanes(int64_t first, int64_t low, int64_t high) {
    int64_t a = std::clamp<int64_t>(low - first, 0, LANES), b = std::clamp<int64_t>(high - first, 0, LANES);
    return a < b ? (__mmask16)(((1u << b) - 1u) & ~((1u << a) - 1u)) : (__mmask16)0;
}

// ---- The product -----------------------------------------------------------------------------------------------------

template <int ROWS, int PANELS>
inline void multiply_tile(
    const bf16 *a, int64_t lda, const bf16 *b, int64_t panel, int64_t pairs, float *c, int64_t ldc, bool add
) {
    __m512 sum[ROWS][PANELS];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < PANELS; ++v) sum[r][v] = add ? _mm512_loadu_ps(c + r * ldc + v * LANES) : _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; ++p) {
        __m512bh right[PANELS];
#pragma GCC unroll 4
        for (int v = 0; v < PANELS; ++v) right[v] = (__m512bh)_mm512_loadu_si512(b + v * panel + p * 32);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
            int32_t pair;
            std::memcpy(&pair, a + r * lda + 2 * p, 4);
            __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int v = 0; v < PANELS; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, right[v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < PANELS; ++v) _mm512_storeu_ps(c + r * ldc + v * LANES, sum[r][v]);
}

template <int PANELS>
void multiply_rows(
    const bf16 *a, int64_t lda, int64_t rows, const bf16 *b, int64_t panel, int64_t pairs, float *c, int64_t ldc, bool add
) {
    int64_t r = 0;
    for (; r + 6 <= rows; r += 6)
        multiply_tile<6, PANELS>(a + r * lda, lda, b, panel, pairs, c + r * ldc, ldc, add);
    const bf16 *rest = a + r * lda;
    float *out = c + r * ldc;
    switch (rows - r) {
    case 5: multiply_tile<5, PANELS>(rest, lda, b, panel, pairs, out, ldc, add); break;
    case 4: multiply_tile<4, PANELS>(rest, lda, b, panel, pairs, out, ldc, add); break;
    case 3: multiply_tile<3, PANELS>(rest, lda, b, panel, pairs, out, ldc, add); break;
    case 2: multiply_tile<2, PANELS>(rest, lda, b, panel, pairs, out, ldc, add); break;
    case 1: multiply_tile<1, PANELS>(rest, lda, b, panel, pairs, out, ldc, add); break;
    default: break;
    }
}

// C [rows, columns] = A [rows, 2 pairs] B (+ C); `panel` is the distance of B's panels, columns a multiple of 16.
void multiply(
    const bf16 *a, int64_t lda, int64_t rows, const bf16 *b, int64_t panel, int64_t pairs, int64_t columns, float *c,
    int64_t ldc, bool add
) {
    int64_t v = 0, panels = columns / LANES;
    for (; v + 4 <= panels; v += 4) multiply_rows<4>(a, lda, rows, b + v * panel, panel, pairs, c + v * LANES, ldc, add);
    const bf16 *rest = b + v * panel;
    float *out = c + v * LANES;
    switch (panels - v) {
    case 3: multiply_rows<3>(a, lda, rows, rest, panel, pairs, out, ldc, add); break;
    case 2: multiply_rows<2>(a, lda, rows, rest, panel, pairs, out, ldc, add); break;
    case 1: multiply_rows<1>(a, lda, rows, rest, panel, pairs, out, ldc, add); break;
    default: break;
    }
}

// ---- Packing ---------------------------------------------------------------------------------------------------------

// Two rows of 16 numbers side by side, number by number: the pairs of one panel.
inline void interleave(bf16 *target, const bf16 *even, const bf16 *odd) {
    __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)even));
    __m512i high = odd ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)odd)) : _mm512_setzero_si512();
    _mm512_storeu_si512(target, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

// rows [count, width] -> B of a product over the rows: panels of 16 of the width, pairs of rows; odd counts get zeros.
void pack_rows(const bf16 *rows, int64_t stride, int64_t count, int64_t width, bf16 *out, int64_t panel) {
    for (int64_t i = 0; i < count; i += 2)
        for (int64_t d = 0; d < width; d += LANES)
            interleave(
                out + d / LANES * panel + i * LANES, rows + i * stride + d,
                i + 1 < count ? rows + (i + 1) * stride + d : nullptr
            );
}

// rows [count, width] -> B of a product over the width: panels of 16 rows; missing rows are zeros.
void pack_columns(const bf16 *rows, int64_t stride, int64_t count, int64_t width, bf16 *out) {
    uint32_t *target = (uint32_t *)out;
    for (int64_t first = 0; first < count; first += LANES)
        for (int64_t i = 0; i < LANES; ++i) {
            uint32_t *column = target + first * (width / 2) + i;
            if (first + i < count) {
                const bf16 *row = rows + (first + i) * stride;
                for (int64_t p = 0; p < width / 2; ++p) std::memcpy(column + p * LANES, row + 2 * p, 4);
            } else {
                for (int64_t p = 0; p < width / 2; ++p) column[p * LANES] = 0;
            }
        }
}

// A packed B of `pairs` pairs of rows -> its rows as columns, [width, 2 pairs].
void turn_pairs(const bf16 *packed, int64_t pairs, int64_t width, bf16 *out) {
    const __m512i steps = _mm512_mullo_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(LANES)
    );
    const uint32_t *in = (const uint32_t *)packed;
    for (int64_t d = 0; d < width; ++d) {
        const uint32_t *column = in + d / LANES * pairs * LANES + d % LANES;
        for (int64_t p = 0; p < pairs; p += LANES) {
            __mmask16 there = lanes(p, 0, pairs);
            __m512i sixteen = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, steps, column + p * LANES, 4);
            _mm512_mask_storeu_epi32(out + d * 2 * pairs + 2 * p, there, sixteen);
        }
    }
}

// ---- What a block is -------------------------------------------------------------------------------------------------

struct Forest {
    int64_t heads, key_heads, width, window;  // window: 0 = none
    float scale;
    const int64_t *queries;  // [blocks, 2] stream ranges
    const int64_t *offsets;  // [blocks + 1] into ranges
    const int64_t *ranges;   // [.., 2] stream ranges of keys
};

struct Block {
    int64_t first, count, keys;
    const int64_t *ranges;
    int64_t num_ranges;

    Block(const Forest &f, int64_t b)
        : first(f.queries[2 * b]), count(f.queries[2 * b + 1] - f.queries[2 * b]), keys(0),
          ranges(f.ranges + 2 * f.offsets[b]), num_ranges(f.offsets[b + 1] - f.offsets[b]) {
        for (int64_t r = 0; r < num_ranges; ++r) keys += ranges[2 * r + 1] - ranges[2 * r];
    }

    // The keys that query i sees are [low, high).
    int64_t high(int64_t i) const { return keys - count + i + 1; }
    int64_t low(int64_t i, int64_t window) const { return window ? std::max<int64_t>(0, high(i) - window) : 0; }

    // The first key that any query of the block sees; everything before it can be left out.
    int64_t begin(int64_t window) const { return low(0, window); }

    // Rows [keys, width] of one head, in the order of the path.
    void gather(const bf16 *x, int64_t key_heads, int64_t head, int64_t width, bf16 *out) const {
        for (int64_t r = 0; r < num_ranges; ++r)
            for (int64_t t = ranges[2 * r]; t < ranges[2 * r + 1]; ++t, out += width)
                std::memcpy(out, x + (t * key_heads + head) * width, (size_t)width * 2);
    }
};

template <class T> T *room(std::vector<T> &buffer, int64_t count) {
    if ((int64_t)buffer.size() < count) buffer.resize((size_t)count);
    return buffer.data();
}

struct Space {
    std::vector<bf16> keys, values, packed_keys, packed_values, weights, slopes, packed_slopes, turned, q_columns, q_rows,
        g_columns, g_rows;
    std::vector<float> scores, slopes_f, out, most, total, delta, grad_keys, grad_values;
};

// ---- Forward ---------------------------------------------------------------------------------------------------------

// One row of scores of a stretch -> weights, with the row's running maximum and sum; returns what its old sums shrink by.
float soften(
    const float *scores, bf16 *weights, int64_t padded, int64_t low, int64_t high, float scale, float &most, float &total
) {
    __m512 factor = _mm512_set1_ps(scale), peak = _mm512_set1_ps(most);
    for (int64_t i = 0; i < padded; i += LANES) {
        __m512 s = _mm512_mul_ps(_mm512_loadu_ps(scores + i), factor);
        peak = _mm512_mask_max_ps(peak, lanes(i, low, high), peak, s);
    }
    float now = _mm512_reduce_max_ps(peak);
    __m512 top = _mm512_set1_ps(now), sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < padded; i += LANES) {
        __m512 s = _mm512_fmsub_ps(_mm512_loadu_ps(scores + i), factor, top);
        __m512 e = _mm512_maskz_mov_ps(lanes(i, low, high), exp_of(s));
        sum = _mm512_add_ps(sum, e);
        narrow(weights + i, e);
    }
    float shrink = most == now ? 1.0f : std::exp(most - now);
    total = total * shrink + _mm512_reduce_add_ps(sum);
    most = now;
    return shrink;
}

void forward_block(
    const Forest &f, int64_t b, int64_t j, const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *lse, Space &s
) {
    Block block(f, b);
    const int64_t width = f.width, group = f.heads / f.key_heads, even = round_up(block.keys, 2);
    const int64_t columns = round_up(block.keys, LANES), panel = even * LANES;
    bf16 *keys = room(s.keys, even * width), *values = room(s.values, even * width);
    block.gather(k, f.key_heads, j, width, keys);
    block.gather(v, f.key_heads, j, width, values);
    bf16 *packed_keys = room(s.packed_keys, columns * width), *packed_values = room(s.packed_values, even * width);
    pack_columns(keys, width, block.keys, width, packed_keys);
    pack_rows(values, width, block.keys, width, packed_values, panel);
    float *scores = room(s.scores, block.count * STRETCH), *sums = room(s.out, block.count * width);
    bf16 *weights = room(s.weights, block.count * STRETCH);
    float *most = room(s.most, block.count), *total = room(s.total, block.count);
    for (int64_t g = 0; g < group; ++g) {
        const int64_t head = j * group + g;
        std::fill(sums, sums + block.count * width, 0.0f);
        std::fill(most, most + block.count, -3.0e38f);
        std::fill(total, total + block.count, 0.0f);
        for (int64_t at = block.begin(f.window) / LANES * LANES; at < block.keys; at += STRETCH) {
            const int64_t some = std::min(STRETCH, block.keys - at), padded = round_up(some, LANES);
            multiply(
                q + (block.first * f.heads + head) * width, f.heads * width, block.count, packed_keys + at * width,
                LANES * width, width / 2, padded, scores, STRETCH, false
            );
            for (int64_t i = 0; i < block.count; ++i) {
                float shrink = soften(
                    scores + i * STRETCH, weights + i * STRETCH, padded, block.low(i, f.window) - at, block.high(i) - at,
                    f.scale, most[i], total[i]
                );
                if (shrink != 1.0f)
                    for (int64_t d = 0; d < width; ++d) sums[i * width + d] *= shrink;
            }
            multiply(
                weights, STRETCH, block.count, packed_values + at * LANES, panel, round_up(some, 2) / 2, width, sums, width,
                true
            );
        }
        for (int64_t i = 0; i < block.count; ++i) {
            const int64_t row = (block.first + i) * f.heads + head;
            const __m512 inverse = _mm512_set1_ps(1.0f / total[i]);
            for (int64_t d = 0; d < width; d += LANES)
                narrow(out + row * width + d, _mm512_mul_ps(_mm512_loadu_ps(sums + i * width + d), inverse));
            lse[row] = most[i] + std::log(total[i]);
        }
    }
}

// ---- Backward --------------------------------------------------------------------------------------------------------

// Of one key and all queries: weights p = exp(scale s - lse) and slopes p (dp - delta) scale, [padded queries] each.
void slope(
    const float *scores, const float *pulls, const float *lse, const float *delta, float scale, int64_t padded, int64_t low,
    int64_t high, bf16 *weights, bf16 *slopes
) {
    __m512 factor = _mm512_set1_ps(scale);
    for (int64_t i = 0; i < padded; i += LANES) {
        __mmask16 seen = lanes(i, low, high);
        __m512 p = exp_of(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i), factor, _mm512_loadu_ps(lse + i)));
        p = _mm512_maskz_mov_ps(seen, p);
        __m512 d = _mm512_sub_ps(_mm512_loadu_ps(pulls + i), _mm512_loadu_ps(delta + i));
        d = _mm512_maskz_mul_ps(seen, _mm512_mul_ps(p, factor), d);
        narrow(weights + i, p);
        narrow(slopes + i, d);
    }
}

// Queries stand in columns here: scores [keys, queries]. The gradients of the block's keys and values are added to
// `dk` and `dv` [stream, key heads, width], which belong to this thread for this tree and key head.
void backward_block(
    const Forest &f, int64_t b, int64_t j, const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *out, const float *lse,
    const bf16 *grad, bf16 *dq, float *dk, float *dv, Space &s
) {
    Block block(f, b);
    const int64_t width = f.width, group = f.heads / f.key_heads, even = round_up(block.keys, 2);
    const int64_t columns = round_up(block.count, LANES), pairs = round_up(block.count, 2) / 2, panel = pairs * 32;
    const int64_t begin = block.begin(f.window) / 2 * 2;
    bf16 *keys = room(s.keys, even * width), *values = room(s.values, even * width);
    block.gather(k, f.key_heads, j, width, keys);
    block.gather(v, f.key_heads, j, width, values);
    std::fill(keys + block.keys * width, keys + even * width, (bf16)0);
    bf16 *pairs_of_keys = room(s.packed_keys, even * width), *turned = room(s.turned, even * width);
    pack_rows(keys, width, even, width, pairs_of_keys, even * LANES);
    turn_pairs(pairs_of_keys, even / 2, width, turned);  // keys [width, even]
    float *grad_keys = room(s.grad_keys, even * width), *grad_values = room(s.grad_values, even * width);
    std::fill(grad_keys, grad_keys + even * width, 0.0f);
    std::fill(grad_values, grad_values + even * width, 0.0f);
    bf16 *q_columns = room(s.q_columns, columns * width), *g_columns = room(s.g_columns, columns * width);
    bf16 *q_rows = room(s.q_rows, 2 * pairs * width), *g_rows = room(s.g_rows, 2 * pairs * width);
    float *scores = room(s.scores, STRETCH * columns), *pulls = room(s.slopes_f, STRETCH * columns);
    bf16 *weights = room(s.weights, STRETCH * columns), *slopes = room(s.slopes, STRETCH * columns);
    bf16 *packed = room(s.packed_slopes, STRETCH * columns);
    float *back = room(s.out, columns * width);  // gradients of the queries [width, columns]
    float *total = room(s.total, columns), *delta = room(s.delta, columns);
    const __m512i down = _mm512_mullo_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32((int)columns)
    );
    for (int64_t g = 0; g < group; ++g) {
        const int64_t head = j * group + g, stride = f.heads * width, start = block.first * stride + head * width;
        pack_columns(q + start, stride, block.count, width, q_columns);
        pack_columns(grad + start, stride, block.count, width, g_columns);
        pack_rows(q + start, stride, block.count, width, q_rows, panel);
        pack_rows(grad + start, stride, block.count, width, g_rows, panel);
        std::fill(total, total + columns, 0.0f);
        std::fill(delta, delta + columns, 0.0f);
        for (int64_t i = 0; i < block.count; ++i) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t d = 0; d < width; d += LANES)
                sum = _mm512_fmadd_ps(widen(grad + start + i * stride + d), widen(out + start + i * stride + d), sum);
            delta[i] = _mm512_reduce_add_ps(sum);
            total[i] = lse[(block.first + i) * f.heads + head];
        }
        std::fill(back, back + columns * width, 0.0f);
        for (int64_t at = begin; at < block.keys; at += STRETCH) {
            const int64_t some = std::min(STRETCH, block.keys - at), even_some = round_up(some, 2);
            multiply(
                keys + at * width, width, some, q_columns, LANES * width, width / 2, columns, scores, columns, false
            );
            multiply(
                values + at * width, width, some, g_columns, LANES * width, width / 2, columns, pulls, columns, false
            );
            for (int64_t i = 0; i < some; ++i) {
                // Query c sees key `at + i` from c = at + i - (keys - count) on, and for as many as the window is wide.
                const int64_t low = std::max<int64_t>(0, at + i - (block.keys - block.count));
                const int64_t end = f.window ? at + i - (block.keys - block.count) + f.window : block.count;
                slope(
                    scores + i * columns, pulls + i * columns, total, delta, f.scale, columns, low,
                    std::min(end, block.count), weights + i * columns, slopes + i * columns
                );
            }
            if (even_some > some) std::fill(slopes + some * columns, slopes + even_some * columns, (bf16)0);
            for (int64_t i = 0; i < even_some; i += 2)
                for (int64_t c = 0; c < columns; c += LANES)
                    interleave(
                        packed + c / LANES * even_some * LANES + i * LANES, slopes + i * columns + c,
                        slopes + (i + 1) * columns + c
                    );
            multiply(weights, columns, some, g_rows, panel, pairs, width, grad_values + at * width, width, true);
            multiply(slopes, columns, some, q_rows, panel, pairs, width, grad_keys + at * width, width, true);
            multiply(
                turned + at, even, width, packed, even_some * LANES, even_some / 2, columns, back, columns, true
            );
        }
        for (int64_t i = 0; i < block.count; ++i)
            for (int64_t d = 0; d < width; d += LANES)
                narrow(dq + start + i * stride + d, _mm512_i32gather_ps(down, back + d * columns + i, 4));
    }
    int64_t i = 0;
    for (int64_t r = 0; r < block.num_ranges; ++r)
        for (int64_t t = block.ranges[2 * r]; t < block.ranges[2 * r + 1]; ++t, ++i) {
            float *to_key = dk + (t * f.key_heads + j) * width, *to_value = dv + (t * f.key_heads + j) * width;
            for (int64_t d = 0; d < width; ++d) {
                to_key[d] += grad_keys[i * width + d];
                to_value[d] += grad_values[i * width + d];
            }
        }
}

}  // namespace

// q, out [stream, heads, width]; k, v [stream, key heads, width]; lse [stream, heads]. Rows of no block are not written.
EXPORT void polm_attention_forward(
    const void *q, const void *k, const void *v, void *out, float *lse, const int64_t *queries, const int64_t *offsets,
    const int64_t *ranges, int64_t blocks, int64_t heads, int64_t key_heads, int64_t width, int64_t window, float scale,
    int threads
) {
    Forest f{heads, key_heads, width, window, scale, queries, offsets, ranges};
#pragma omp parallel num_threads(threads)
    {
        Space space;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < blocks * key_heads; ++task)
            forward_block(
                f, task / key_heads, task % key_heads, (const bf16 *)q, (const bf16 *)k, (const bf16 *)v, (bf16 *)out, lse,
                space
            );
    }
}

// dq as q; dk, dv float and zero at first. `trees` [num_trees + 1] are the first blocks of the trees: a tree and key head
// is one task, since its blocks share keys, so that sums are taken in one order.
EXPORT void polm_attention_backward(
    const void *q, const void *k, const void *v, const void *out, const float *lse, const void *grad, void *dq, float *dk,
    float *dv, const int64_t *queries, const int64_t *offsets, const int64_t *ranges, const int64_t *trees,
    int64_t num_trees, int64_t heads, int64_t key_heads, int64_t width, int64_t window, float scale, int threads
) {
    Forest f{heads, key_heads, width, window, scale, queries, offsets, ranges};
#pragma omp parallel num_threads(threads)
    {
        Space space;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < num_trees * key_heads; ++task)
            for (int64_t b = trees[task / key_heads]; b < trees[task / key_heads + 1]; ++b)
                backward_block(
                    f, b, task % key_heads, (const bf16 *)q, (const bf16 *)k, (const bf16 *)v, (const bf16 *)out, lse,
                    (const bf16 *)grad, (bf16 *)dq, dk, dv, space
                );
    }
}

#endif
