// Row kernels for CPUs: what a decoder does between its matrix products, one pass over memory each.
//
// Built on first use by polm/models/kernels/build.py, with the processor's own vector instructions, and called through
// a plain C interface. Numbers are float or bfloat16 in memory and float inside. Each kernel splits its rows among
// `threads` threads in fixed parts, so that a result depends on the number of threads and on nothing else.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>

namespace {

typedef uint16_t bf16;

inline float up(float x) { return x; }

inline float up(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline void put(float &target, float x) { target = x; }

// To the nearest, ties to even; NaN stays NaN.
inline void put(bf16 &target, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    target = (bf16)((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

// exp with a relative error of about 1e-7 (the polynomial of Cephes); written out so that compilers vectorise it.
inline float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f;  // rounds to an integer in the low bits
    float n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}

// The rows of thread `me` of `all`.
struct Part {
    int64_t begin, end;
    Part(int64_t rows, int me, int all) : begin(rows * me / all), end(rows * (me + 1) / all) {}
};

int team(int threads, int64_t numbers) { return numbers < 1 << 13 ? 1 : threads; }

// ---- RMSNorm: y = w x / sqrt(mean(x^2) + eps) ------------------------------------------------------------------------

template <class X, class Y>
void norm_forward(const X *x, const float *w, float eps, Y *y, float *rstd, int64_t rows, int64_t width, int threads) {
#pragma omp parallel num_threads(team(threads, rows * width))
    {
        Part part(rows, omp_get_thread_num(), omp_get_num_threads());
        for (int64_t t = part.begin; t < part.end; ++t) {
            const X *in = x + t * width;
            Y *out = y + t * width;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < width; ++i) sum += up(in[i]) * up(in[i]);
            float inverse = 1.0f / std::sqrt(sum / width + eps);
            rstd[t] = inverse;
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) put(out[i], up(in[i]) * inverse * w[i]);
        }
    }
}

// dx = rstd (w g - n mean(w g n)) with n = x rstd; dw = sum over rows of g n.
template <class X, class Y>
void norm_backward(
    const Y *g, const X *x, const float *w, const float *rstd, X *dx, float *dw, int64_t rows, int64_t width, int threads
) {
    int all = team(threads, rows * width);
    std::vector<float> sums((size_t)(all * width), 0.0f);
#pragma omp parallel num_threads(all)
    {
        int me = omp_get_thread_num();
        Part part(rows, me, omp_get_num_threads());
        float *mine = sums.data() + me * width;
        for (int64_t t = part.begin; t < part.end; ++t) {
            const X *in = x + t * width;
            const Y *grad = g + t * width;
            X *out = dx + t * width;
            float inverse = rstd[t], dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < width; ++i) {
                float gn = up(grad[i]) * up(in[i]) * inverse;
                mine[i] += gn;
                dot += gn * w[i];
            }
            dot /= width;
#pragma omp simd
            for (int64_t i = 0; i < width; ++i)
                put(out[i], inverse * (up(grad[i]) * w[i] - up(in[i]) * inverse * dot));
        }
    }
    for (int64_t i = 0; i < width; ++i) {
        float sum = 0.0f;
        for (int me = 0; me < all; ++me) sum += sums[(size_t)(me * width + i)];
        dw[i] = sum;
    }
}

// ---- RMSNorm of each head (or none), then the rotary embedding -------------------------------------------------------

// x, y [rows, heads, width]; cosine, sine [rows, width]; w [width] or null for no norm; rstd [rows, heads].
template <class X>
void rotate_forward(
    const X *x, const float *w, float eps, const float *cosine, const float *sine, X *y, float *rstd, int64_t rows,
    int64_t heads, int64_t width, int threads
) {
    int64_t half = width / 2;
#pragma omp parallel num_threads(team(threads, rows * heads * width))
    {
        Part part(rows, omp_get_thread_num(), omp_get_num_threads());
        std::vector<float> normed((size_t)width);
        float *n = normed.data();
        for (int64_t t = part.begin; t < part.end; ++t) {
            const float *c = cosine + t * width, *s = sine + t * width;
            for (int64_t h = 0; h < heads; ++h) {
                const X *in = x + (t * heads + h) * width;
                X *out = y + (t * heads + h) * width;
                if (w) {
                    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                    for (int64_t i = 0; i < width; ++i) sum += up(in[i]) * up(in[i]);
                    float inverse = 1.0f / std::sqrt(sum / width + eps);
                    rstd[t * heads + h] = inverse;
#pragma omp simd
                    for (int64_t i = 0; i < width; ++i) n[i] = up(in[i]) * inverse * w[i];
                } else {
#pragma omp simd
                    for (int64_t i = 0; i < width; ++i) n[i] = up(in[i]);
                }
#pragma omp simd
                for (int64_t i = 0; i < half; ++i) {
                    put(out[i], n[i] * c[i] - n[i + half] * s[i]);
                    put(out[i + half], n[i + half] * c[i + half] + n[i] * s[i + half]);
                }
            }
        }
    }
}

template <class X>
void rotate_backward(
    const X *g, const X *x, const float *w, const float *cosine, const float *sine, const float *rstd, X *dx, float *dw,
    int64_t rows, int64_t heads, int64_t width, int threads
) {
    int64_t half = width / 2;
    int all = team(threads, rows * heads * width);
    std::vector<float> sums((size_t)(all * width), 0.0f);
#pragma omp parallel num_threads(all)
    {
        int me = omp_get_thread_num();
        Part part(rows, me, omp_get_num_threads());
        float *mine = sums.data() + me * width;
        std::vector<float> turned((size_t)width);
        float *n = turned.data();
        for (int64_t t = part.begin; t < part.end; ++t) {
            const float *c = cosine + t * width, *s = sine + t * width;
            for (int64_t h = 0; h < heads; ++h) {
                const X *grad = g + (t * heads + h) * width, *in = x + (t * heads + h) * width;
                X *out = dx + (t * heads + h) * width;
#pragma omp simd
                for (int64_t i = 0; i < half; ++i) {
                    n[i] = up(grad[i]) * c[i] + up(grad[i + half]) * s[i + half];
                    n[i + half] = up(grad[i + half]) * c[i + half] - up(grad[i]) * s[i];
                }
                if (!w) {
#pragma omp simd
                    for (int64_t i = 0; i < width; ++i) put(out[i], n[i]);
                    continue;
                }
                float inverse = rstd[t * heads + h], dot = 0.0f;
#pragma omp simd reduction(+ : dot)
                for (int64_t i = 0; i < width; ++i) {
                    float gn = n[i] * up(in[i]) * inverse;
                    mine[i] += gn;
                    dot += gn * w[i];
                }
                dot /= width;
#pragma omp simd
                for (int64_t i = 0; i < width; ++i) put(out[i], inverse * (n[i] * w[i] - up(in[i]) * inverse * dot));
            }
        }
    }
    if (!w) return;
    for (int64_t i = 0; i < width; ++i) {
        float sum = 0.0f;
        for (int me = 0; me < all; ++me) sum += sums[(size_t)(me * width + i)];
        dw[i] = sum;
    }
}

// ---- SwiGLU: y = silu(gate) up ---------------------------------------------------------------------------------------

template <class X>
void swiglu_forward(const X *gate, const X *upper, X *y, int64_t count, int threads) {
#pragma omp parallel num_threads(team(threads, count))
    {
        Part part(count, omp_get_thread_num(), omp_get_num_threads());
#pragma omp simd
        for (int64_t i = part.begin; i < part.end; ++i) {
            float a = up(gate[i]);
            put(y[i], a / (1.0f + fast_exp(-a)) * up(upper[i]));
        }
    }
}

template <class X>
void swiglu_backward(const X *g, const X *gate, const X *upper, X *dgate, X *dupper, int64_t count, int threads) {
#pragma omp parallel num_threads(team(threads, count))
    {
        Part part(count, omp_get_thread_num(), omp_get_num_threads());
#pragma omp simd
        for (int64_t i = part.begin; i < part.end; ++i) {
            float a = up(gate[i]), s = 1.0f / (1.0f + fast_exp(-a)), grad = up(g[i]);
            put(dupper[i], grad * a * s);
            put(dgate[i], grad * up(upper[i]) * s * (1.0f + a * (1.0f - s)));
        }
    }
}

// ---- The head: log-probabilities of a few ids a row, and their gradient ---------------------------------------------

// Logits z are divided by the temperature; k ids a row. Gives log-probabilities of the ids, the log of the sum of
// exponentials, and the entropy unless it is null.
template <class X>
inline void head_row_forward(
    const X *in, const int64_t *ids, float inverse_temperature, float *logprobs, float *lse, float *entropy, int64_t vocab,
    int64_t k
) {
    float most = up(in[0]);
#pragma omp simd reduction(max : most)
    for (int64_t v = 0; v < vocab; ++v) most = up(in[v]) > most ? up(in[v]) : most;
    most *= inverse_temperature;
    float sum = 0.0f, weighted = 0.0f;
    // Short stretches into one float each and these into doubles: 256k terms of one sign would lose digits.
    double total = 0.0, total_weighted = 0.0;
    for (int64_t first = 0; first < vocab; first += 4096) {
        int64_t end = first + 4096 < vocab ? first + 4096 : vocab;
        sum = weighted = 0.0f;
        if (entropy) {
#pragma omp simd reduction(+ : sum, weighted)
            for (int64_t v = first; v < end; ++v) {
                float d = up(in[v]) * inverse_temperature - most, e = fast_exp(d);
                sum += e;
                weighted += e * d;
            }
        } else {
#pragma omp simd reduction(+ : sum)
            for (int64_t v = first; v < end; ++v) sum += fast_exp(up(in[v]) * inverse_temperature - most);
        }
        total += sum;
        total_weighted += weighted;
    }
    float log_total = (float)std::log(total);
    *lse = most + log_total;
    if (entropy) *entropy = log_total - (float)(total_weighted / total);
    for (int64_t i = 0; i < k; ++i) logprobs[i] = up(in[ids[i]]) * inverse_temperature - *lse;
}

// In place: a row of logits becomes their gradient. With p the distribution, g_k the gradient of logprob k and h that of
// the entropy H: sum_k g_k (1[v = id_k] - p_v) - h p_v (log p_v + H), over the temperature. The logits may be a part of the
// vocabulary; ids outside of it are left out. `at` is room for k numbers.
template <class X>
inline void head_row_backward(
    X *row, const int64_t *ids, float inverse_temperature, float log_total, const float *entropy, const float *grad,
    const float *grad_entropy, int64_t vocab, int64_t k, float *at
) {
    auto inside = [&](int64_t id) { return id >= 0 && id < vocab; };
    float sum = 0.0f;
    for (int64_t i = 0; i < k; ++i) sum += grad[i];
    float h = grad_entropy ? *grad_entropy : 0.0f, own = grad_entropy ? *entropy : 0.0f;
    auto pull = [&](float logit) {
        float logp = logit * inverse_temperature - log_total;
        return -fast_exp(logp) * (sum + h * (logp + own));
    };
    // The gradients at the ids are taken before the logits are gone, and added in float.
    for (int64_t i = 0; i < k; ++i) at[i] = inside(ids[i]) ? pull(up(row[ids[i]])) : 0.0f;
    if (grad_entropy) {
#pragma omp simd
        for (int64_t v = 0; v < vocab; ++v) put(row[v], pull(up(row[v])) * inverse_temperature);
    } else {
        float factor = -sum * inverse_temperature;
#pragma omp simd
        for (int64_t v = 0; v < vocab; ++v)
            put(row[v], factor * fast_exp(up(row[v]) * inverse_temperature - log_total));
    }
    for (int64_t i = 0; i < k; ++i) {
        if (!inside(ids[i])) continue;
        float here = at[i];
        for (int64_t j = 0; j < k; ++j)  // an id may stand more than once
            if (ids[j] == ids[i]) here += grad[j];
        put(row[ids[i]], here * inverse_temperature);
    }
}

// z [rows, vocab]; ids, logprobs [rows, k]; lse, entropy [rows] (entropy or null).
template <class X>
void head_forward(
    const X *z, const int64_t *ids, float inverse_temperature, float *logprobs, float *lse, float *entropy, int64_t rows,
    int64_t vocab, int64_t k, int threads
) {
#pragma omp parallel num_threads(team(threads, rows * vocab))
    {
        Part part(rows, omp_get_thread_num(), omp_get_num_threads());
        for (int64_t t = part.begin; t < part.end; ++t)
            head_row_forward(
                z + t * vocab, ids + t * k, inverse_temperature, logprobs + t * k, lse + t, entropy ? entropy + t : nullptr,
                vocab, k
            );
    }
}

// z becomes its gradient; grad [rows, k], grad_entropy [rows] or null.
template <class X>
void head_backward(
    X *z, const int64_t *ids, float inverse_temperature, const float *lse, const float *entropy, const float *grad,
    const float *grad_entropy, int64_t rows, int64_t vocab, int64_t k, int threads
) {
#pragma omp parallel num_threads(team(threads, rows * vocab))
    {
        Part part(rows, omp_get_thread_num(), omp_get_num_threads());
        std::vector<float> at((size_t)k);
        for (int64_t t = part.begin; t < part.end; ++t)
            head_row_backward(
                z + t * vocab, ids + t * k, inverse_temperature, lse[t], entropy ? entropy + t : nullptr, grad + t * k,
                grad_entropy ? grad_entropy + t : nullptr, vocab, k, at.data()
            );
    }
}

// Both for gradients that are known beforehand: a row is still in the cache when its gradient is written.
template <class X>
void head_gradient(
    X *z, const int64_t *ids, float inverse_temperature, float *logprobs, const float *grad, int64_t rows, int64_t vocab,
    int64_t k, int threads
) {
#pragma omp parallel num_threads(team(threads, rows * vocab))
    {
        Part part(rows, omp_get_thread_num(), omp_get_num_threads());
        std::vector<float> at((size_t)k);
        for (int64_t t = part.begin; t < part.end; ++t) {
            float lse;
            X *row = z + t * vocab;
            head_row_forward(row, ids + t * k, inverse_temperature, logprobs + t * k, &lse, nullptr, vocab, k);
            head_row_backward(
                row, ids + t * k, inverse_temperature, lse, nullptr, grad + t * k, nullptr, vocab, k, at.data()
            );
        }
    }
}

}  // namespace

// ---- The C interface: `half` says that the activations are bfloat16 -------------------------------------------------

#define EXPORT extern "C" __attribute__((visibility("default")))

// x is float (the residual stream), y bfloat16 if `half`.
EXPORT void polm_norm_forward(
    const float *x, const float *w, float eps, void *y, float *rstd, int64_t rows, int64_t width, int half, int threads
) {
    if (half) norm_forward(x, w, eps, (bf16 *)y, rstd, rows, width, threads);
    else norm_forward(x, w, eps, (float *)y, rstd, rows, width, threads);
}

EXPORT void polm_norm_backward(
    const void *g, const float *x, const float *w, const float *rstd, float *dx, float *dw, int64_t rows, int64_t width,
    int half, int threads
) {
    if (half) norm_backward((const bf16 *)g, x, w, rstd, dx, dw, rows, width, threads);
    else norm_backward((const float *)g, x, w, rstd, dx, dw, rows, width, threads);
}

EXPORT void polm_rotate_forward(
    const void *x, const float *w, float eps, const float *cosine, const float *sine, void *y, float *rstd, int64_t rows,
    int64_t heads, int64_t width, int half, int threads
) {
    if (half) rotate_forward((const bf16 *)x, w, eps, cosine, sine, (bf16 *)y, rstd, rows, heads, width, threads);
    else rotate_forward((const float *)x, w, eps, cosine, sine, (float *)y, rstd, rows, heads, width, threads);
}

EXPORT void polm_rotate_backward(
    const void *g, const void *x, const float *w, const float *cosine, const float *sine, const float *rstd, void *dx,
    float *dw, int64_t rows, int64_t heads, int64_t width, int half, int threads
) {
    if (half)
        rotate_backward(
            (const bf16 *)g, (const bf16 *)x, w, cosine, sine, rstd, (bf16 *)dx, dw, rows, heads, width, threads
        );
    else
        rotate_backward(
            (const float *)g, (const float *)x, w, cosine, sine, rstd, (float *)dx, dw, rows, heads, width, threads
        );
}

EXPORT void polm_swiglu_forward(
    const void *gate, const void *upper, void *y, int64_t count, int half, int threads
) {
    if (half) swiglu_forward((const bf16 *)gate, (const bf16 *)upper, (bf16 *)y, count, threads);
    else swiglu_forward((const float *)gate, (const float *)upper, (float *)y, count, threads);
}

EXPORT void polm_swiglu_backward(
    const void *g, const void *gate, const void *upper, void *dgate, void *dupper, int64_t count, int half, int threads
) {
    if (half)
        swiglu_backward(
            (const bf16 *)g, (const bf16 *)gate, (const bf16 *)upper, (bf16 *)dgate, (bf16 *)dupper, count, threads
        );
    else
        swiglu_backward(
            (const float *)g, (const float *)gate, (const float *)upper, (float *)dgate, (float *)dupper, count, threads
        );
}

EXPORT void polm_head_forward(
    const void *z, const int64_t *ids, float inverse_temperature, float *logprobs, float *lse, float *entropy,
    int64_t rows, int64_t vocab, int64_t k, int half, int threads
) {
    if (half)
        head_forward(
            (const bf16 *)z, ids, inverse_temperature, logprobs, lse, entropy, rows, vocab, k, threads
        );
    else
        head_forward(
            (const float *)z, ids, inverse_temperature, logprobs, lse, entropy, rows, vocab, k, threads
        );
}

EXPORT void polm_head_backward(
    void *z, const int64_t *ids, float inverse_temperature, const float *lse, const float *entropy, const float *grad,
    const float *grad_entropy, int64_t rows, int64_t vocab, int64_t k, int half, int threads
) {
    if (half)
        head_backward(
            (bf16 *)z, ids, inverse_temperature, lse, entropy, grad, grad_entropy, rows, vocab, k, threads
        );
    else
        head_backward(
            (float *)z, ids, inverse_temperature, lse, entropy, grad, grad_entropy, rows, vocab, k, threads
        );
}

EXPORT void polm_head_gradient(
    void *z, const int64_t *ids, float inverse_temperature, float *logprobs, const float *grad, int64_t rows,
    int64_t vocab, int64_t k, int half, int threads
) {
    if (half) head_gradient((bf16 *)z, ids, inverse_temperature, logprobs, grad, rows, vocab, k, threads);
    else head_gradient((float *)z, ids, inverse_temperature, logprobs, grad, rows, vocab, k, threads);
}
