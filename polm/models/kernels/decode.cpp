// A step of decoding in bfloat16, for CPUs that multiply pairs of bfloat16 (AVX512-BF16): a token of each of a few rows.
//
// Such a step reads every weight and every key and value once, and does little with them: it is as fast as memory. So
// weights are taken as they lie, and what comes next is fetched ahead while what is there is multiplied. All layers are
// one call: for a small model, what is around the kernels takes longer than they do.

#include <type_traits>

#include "pairs.h"

EXPORT int polm_has_pairs(void) {
#ifdef POLM_PAIRS
    return 1;
#else
    return 0;
#endif
}

#ifdef POLM_PAIRS

namespace {

const int64_t STEP = 32;   // numbers of one load
const int64_t BLOCK = 16;  // columns that all rows are multiplied with before the next come
const int64_t AHEAD = 2;   // blocks between what is multiplied and what is fetched
const int64_t SMALL = 1 << 16;

inline __m512bh load(const bf16 *x) { return (__m512bh)_mm512_loadu_si512(x); }

inline __m512bh load(const bf16 *x, __mmask32 there) { return (__m512bh)_mm512_maskz_loadu_epi16(there, x); }

// Lane i of the result is the sum of the lanes of sums[i].
inline __m512 add_lanes(const __m512 *sums) {
    __m512 two[8], four[4], eight[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        __m512 a = sums[2 * i], b = sums[2 * i + 1];
        two[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        __m512d a = _mm512_castps_pd(two[2 * i]), b = _mm512_castps_pd(two[2 * i + 1]);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        __m512 a = four[2 * i], b = four[2 * i + 1];
        eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    __m512 a = _mm512_shuffle_f32x4(eight[0], eight[1], 0x88), b = _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd);
    return _mm512_add_ps(a, b);
}

inline void put(float *target, float x) { *target = x; }

inline void put(bf16 *target, float x) {
    *target = (bf16)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(x)), 0);
}

// ---- y [rows, columns] = x [rows, depth] w [columns, depth]^T (+ bias) -----------------------------------------------

// What one tile reads and writes; `rows` and `columns` are those that are left, of which it takes the first.
template <class Y> struct Part {
    const bf16 *x, *w;
    const float *bias;
    Y *y;
    int64_t depth, stride, rows, columns;
    bool add;  // to what y holds (float only)

    Part at(int64_t r, int64_t c) const {
        return {x + r * depth, w + c * depth, bias ? bias + c : nullptr, y + r * stride + c, depth, stride, rows - r,
                columns - c, add};
    }
};

template <int ROWS, int COLUMNS, bool FETCH, class Y> inline void multiply_tile(const Part<Y> &part) {
    static_assert(ROWS * COLUMNS == LANES, "the sums of a tile are one vector");
    const int64_t rows = std::min<int64_t>(ROWS, part.rows), columns = std::min<int64_t>(COLUMNS, part.columns);
    const bf16 *left[ROWS], *right[COLUMNS];
    __m512 sums[LANES];
    // Rows and columns that are not there repeat the last; nobody reads their sums.
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) left[r] = part.x + std::min<int64_t>(r, rows - 1) * part.depth;
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) right[c] = part.w + std::min<int64_t>(c, columns - 1) * part.depth;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) sums[i] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + STEP <= part.depth; k += STEP) {
        __m512bh b[COLUMNS];
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; ++c) {
            if (FETCH) _mm_prefetch((const char *)(right[c] + AHEAD * BLOCK * part.depth + k), _MM_HINT_T1);
            b[c] = load(right[c] + k);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            __m512bh a = load(left[r] + k);
#pragma GCC unroll 4
            for (int c = 0; c < COLUMNS; ++c) sums[r * COLUMNS + c] = _mm512_dpbf16_ps(sums[r * COLUMNS + c], a, b[c]);
        }
    }
    if (k < part.depth) {
        __mmask32 there = (__mmask32)((1u << (part.depth - k)) - 1u);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int c = 0; c < COLUMNS; ++c)
                sums[r * COLUMNS + c] =
                    _mm512_dpbf16_ps(sums[r * COLUMNS + c], load(left[r] + k, there), load(right[c] + k, there));
    }
    float out[LANES];
    _mm512_storeu_ps(out, add_lanes(sums));
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) {
            Y *target = part.y + r * part.stride + c;
            float sum = out[r * COLUMNS + c] + (part.bias ? part.bias[c] : 0.0f);
            if constexpr (std::is_same_v<Y, float>) sum += part.add ? *target : 0.0f;
            put(target, sum);
        }
}

template <int ROWS, bool FETCH, class Y> void multiply_block(const Part<Y> &part, int64_t columns) {
    const int COLUMNS = LANES / ROWS;
    for (int64_t c = 0; c < columns; c += COLUMNS) multiply_tile<ROWS, COLUMNS, FETCH>(part.at(0, c));
}

template <class Y> void multiply(const Part<Y> &all, int threads) {
    int64_t blocks = (all.columns + BLOCK - 1) / BLOCK;
#pragma omp parallel num_threads(all.columns * all.depth < SMALL ? 1 : threads)
    {
        int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
        for (int64_t b = blocks * me / team; b < blocks * (me + 1) / team; ++b) {
            int64_t columns = std::min(BLOCK, all.columns - b * BLOCK);
            for (int64_t r = 0; r < all.rows;) {
                Part<Y> part = all.at(r, b * BLOCK);
                if (all.rows - r > 4) {
                    r ? multiply_block<8, false>(part, columns) : multiply_block<8, true>(part, columns);
                    r += 8;
                } else {
                    r ? multiply_block<4, false>(part, columns) : multiply_block<4, true>(part, columns);
                    r += 4;
                }
            }
        }
    }
}

// ---- Attention of one new token of each row over the row's past ------------------------------------------------------

struct Past {
    int64_t heads, key_heads, width, length, window;  // window: 0 = none
    float scale;
    int64_t group() const { return heads / key_heads; }
};

// scores [count] of one query over `count` keys that lie side by side, in units of the exponent; returns the largest.
float score_keys(const bf16 *query, const bf16 *keys, int64_t count, const Past &p, float *scores) {
    __m512 top = _mm512_set1_ps(-INFINITY);
    for (int64_t first = 0; first < count; first += LANES) {
        __m512 sums[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) sums[i] = _mm512_setzero_ps();
        int64_t last = count - first - 1;
        for (int64_t d = 0; d < p.width; d += STEP) {
            __m512bh a = load(query + d);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i)
                sums[i] = _mm512_dpbf16_ps(sums[i], a, load(keys + (first + std::min<int64_t>(i, last)) * p.width + d));
        }
        __m512 scaled = _mm512_mul_ps(add_lanes(sums), _mm512_set1_ps(p.scale));
        __mmask16 there = last >= LANES - 1 ? (__mmask16)0xffff : (__mmask16)((1u << (last + 1)) - 1u);
        scaled = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), there, scaled);
        _mm512_storeu_ps(scores + first, scaled);
        top = _mm512_max_ps(scaled, top);
    }
    return _mm512_reduce_max_ps(top);
}

// scores -> exp(scores - top), in place; returns their sum. NaN stays NaN.
float weigh_keys(float *scores, int64_t count, float top) {
    __m512 total = _mm512_setzero_ps();
    for (int64_t first = 0; first < count; first += LANES) {
        int64_t left = count - first;
        __mmask16 there = left >= LANES ? (__mmask16)0xffff : (__mmask16)((1u << left) - 1u);
        __m512 x = _mm512_sub_ps(_mm512_loadu_ps(scores + first), _mm512_set1_ps(top));
        x = _mm512_maskz_mov_ps(there, exp_of(x));
        _mm512_storeu_ps(scores + first, x);
        total = _mm512_add_ps(total, x);
    }
    return _mm512_reduce_add_ps(total);
}

// out [width] = weights [count] values [count, width] times `factor`.
void sum_values(const float *weights, const bf16 *values, int64_t count, int64_t width, float factor, bf16 *out) {
    for (int64_t d = 0; d < width; d += 2 * LANES) {
        __m512 low = _mm512_setzero_ps(), high = low, low2 = low, high2 = low;
        int64_t i = 0;
        for (; i + 2 <= count; i += 2) {  // two chains of sums: the additions wait for each other
            const bf16 *one = values + i * width + d, *other = one + width;
            __m512 a = _mm512_set1_ps(weights[i]), b = _mm512_set1_ps(weights[i + 1]);
            low = _mm512_fmadd_ps(a, widen(one), low);
            high = _mm512_fmadd_ps(a, widen(one + LANES), high);
            low2 = _mm512_fmadd_ps(b, widen(other), low2);
            high2 = _mm512_fmadd_ps(b, widen(other + LANES), high2);
        }
        if (i < count) {
            __m512 a = _mm512_set1_ps(weights[i]);
            low = _mm512_fmadd_ps(a, widen(values + i * width + d), low);
            high = _mm512_fmadd_ps(a, widen(values + i * width + d + LANES), high);
        }
        __m512 by = _mm512_set1_ps(factor);
        narrow(out + d, _mm512_mul_ps(by, _mm512_add_ps(low, low2)));
        narrow(out + d + LANES, _mm512_mul_ps(by, _mm512_add_ps(high, high2)));
    }
}

}  // namespace

EXPORT void polm_few_rows(
    const void *x, const void *w, const float *bias, void *y, int64_t rows, int64_t depth, int64_t columns, int half,
    int threads
) {
    const bf16 *left = (const bf16 *)x, *right = (const bf16 *)w;
    if (half) multiply(Part<bf16>{left, right, bias, (bf16 *)y, depth, columns, rows, columns, false}, threads);
    else multiply(Part<float>{left, right, bias, (float *)y, depth, columns, rows, columns, false}, threads);
}

// q, out [rows, heads, width]; k, v [rows, key heads, width], which are put at `positions` [rows] of the row's keys and
// values [slots, key heads, length, width] before it attends to all of them up to there.
EXPORT void polm_decode_attention(
    const void *q, const void *k, const void *v, void *keys, void *values, const int64_t *positions, void *out,
    int64_t rows, int64_t heads, int64_t key_heads, int64_t width, int64_t length, int64_t window, float scale, int threads
) {
    Past p{heads, key_heads, width, length, window, scale};
    size_t bytes = (size_t)width * sizeof(bf16);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores((size_t)(length + LANES));
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < rows * key_heads; ++task) {
            int64_t row = task / key_heads, place = positions[row];
            bf16 *own_keys = (bf16 *)keys + task * length * width, *own_values = (bf16 *)values + task * length * width;
            std::memcpy(own_keys + place * width, (const bf16 *)k + task * width, bytes);
            std::memcpy(own_values + place * width, (const bf16 *)v + task * width, bytes);
            int64_t first = window ? std::max<int64_t>(0, place - window + 1) : 0, count = place + 1 - first;
            for (int64_t g = 0; g < p.group(); ++g) {
                int64_t head = task * p.group() + g;
                float top = score_keys((const bf16 *)q + head * width, own_keys + first * width, count, p, scores.data());
                float total = weigh_keys(scores.data(), count, top);
                sum_values(scores.data(), own_values + first * width, count, width, 1.0f / total, (bf16 *)out + head * width);
            }
        }
    }
}

// ---- All layers ------------------------------------------------------------------------------------------------------

// Of rows.cpp.
extern "C" void polm_norm_forward(
    const float *x, const float *w, float eps, void *y, float *rstd, int64_t rows, int64_t width, int half, int threads
);
extern "C" void polm_rotate_forward(
    const void *x, const float *w, float eps, const float *cosine, const float *sine, void *y, float *rstd, int64_t rows,
    int64_t heads, int64_t width, int half, int threads
);
extern "C" void polm_swiglu_forward(const void *gate, const void *upper, void *y, int64_t count, int half, int threads);

// What Python hands over as a row of addresses (`decode.LAYER`); biases and norms of heads may be null.
struct Layer {
    const float *norm, *query_norm, *key_norm, *later_norm;
    const bf16 *query, *key, *value, *out, *gate, *upper, *down;
    const float *query_bias, *key_bias, *value_bias, *out_bias, *gate_bias, *upper_bias, *down_bias;
    bf16 *keys, *values;
};

// x [rows, hidden] float goes through all layers, in place: the residual stream. cosine, sine [rows, width].
EXPORT void polm_decode_layers(
    float *x, const int64_t *addresses, const int64_t *windows, const int64_t *positions, const float *cosine,
    const float *sine, int64_t layers, int64_t rows, int64_t hidden, int64_t heads, int64_t key_heads, int64_t width,
    int64_t inner, int64_t length, float eps, float scale, int threads
) {
    int64_t all = heads * width, own = key_heads * width;
    std::vector<bf16> normed((size_t)(rows * hidden)), q((size_t)(rows * all)), k((size_t)(rows * own)), v(k.size());
    std::vector<bf16> attended(q.size()), gate((size_t)(rows * inner)), upper(gate.size());
    std::vector<float> rstd((size_t)(rows * heads));
    auto product = [&](const bf16 *from, const bf16 *w, const float *bias, bf16 *y, int64_t depth, int64_t columns) {
        multiply(Part<bf16>{from, w, bias, y, depth, columns, rows, columns, false}, threads);
    };
    auto add_product = [&](const bf16 *from, const bf16 *w, const float *bias, int64_t depth) {
        multiply(Part<float>{from, w, bias, x, depth, hidden, rows, hidden, true}, threads);
    };
    for (int64_t i = 0; i < layers; ++i) {
        Layer layer;
        std::memcpy(&layer, addresses + i * (int64_t)(sizeof(Layer) / sizeof(int64_t)), sizeof(Layer));
        polm_norm_forward(x, layer.norm, eps, normed.data(), rstd.data(), rows, hidden, 1, threads);
        product(normed.data(), layer.query, layer.query_bias, q.data(), hidden, all);
        product(normed.data(), layer.key, layer.key_bias, k.data(), hidden, own);
        product(normed.data(), layer.value, layer.value_bias, v.data(), hidden, own);
        polm_rotate_forward(
            q.data(), layer.query_norm, eps, cosine, sine, q.data(), rstd.data(), rows, heads, width, 1, threads
        );
        polm_rotate_forward(
            k.data(), layer.key_norm, eps, cosine, sine, k.data(), rstd.data(), rows, key_heads, width, 1, threads
        );
        polm_decode_attention(
            q.data(), k.data(), v.data(), layer.keys, layer.values, positions, attended.data(), rows, heads, key_heads,
            width, length, windows[i], scale, threads
        );
        add_product(attended.data(), layer.out, layer.out_bias, all);
        polm_norm_forward(x, layer.later_norm, eps, normed.data(), rstd.data(), rows, hidden, 1, threads);
        product(normed.data(), layer.gate, layer.gate_bias, gate.data(), hidden, inner);
        product(normed.data(), layer.upper, layer.upper_bias, upper.data(), hidden, inner);
        polm_swiglu_forward(gate.data(), upper.data(), gate.data(), rows * inner, 1, threads);
        add_product(gate.data(), layer.down, layer.down_bias, inner);
    }
}

#endif
