/* What a step does beside its linear layers, in fp32 on a CPU: norm, rotation and cache write,
 * attention over the paged cache, gated activation.
 *
 * Each is one pass over its data where plain torch makes several, and a decode step, whose
 * tensors are small, spends more time between torch's operators than in them. The arithmetic
 * of a row does not depend on which rows stand beside it.
 */
#include <math.h>
#include <stdint.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

typedef float f8 __attribute__((vector_size(32)));
typedef float f8_unaligned __attribute__((vector_size(32), aligned(4)));
typedef int32_t i8 __attribute__((vector_size(32)));

#define LOAD(p) (*(const f8_unaligned *)(p))
#define STORE(p, v) (*(f8_unaligned *)(p) = (v))

#if defined(__GNUC__) && !defined(__clang__)
#define APART __attribute__((noipa)) /* one body for every caller: one rounding */
#else
#define APART __attribute__((noinline))
#endif

enum { PARALLEL_ROWS = 16, PARALLEL_TOKENS = 512, MAX_GROUP = 16, MAX_BLOCK = 256 };

static inline float sum(f8 a) {
    return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
}

static inline f8 where(i8 chosen, f8 yes, f8 no) {
    return (f8)(((i8)yes & chosen) | ((i8)no & ~chosen));
}

/* e^x within 2 ulp, for x beyond +-87 that of +-87: x = n ln 2 + r, a polynomial in r, n into
 * the exponent. */
static inline f8 exp8(f8 x) {
    const f8 low = (f8){0} - 87.0f, high = (f8){0} + 87.0f;
    const f8 round = (f8){0} + 12582912.0f; /* adding 1.5 * 2^23 rounds to an integer */
    x = where(x > low, x, low);
    x = where(x < high, x, high);
    f8 shifted = x * 1.44269504088896341f + round;
    f8 n = shifted - round;
    f8 r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    f8 p = (f8){0} + 1.9841270e-4f;
    p = p * r + 1.3888889e-3f;
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (f8)(((i8)shifted - (i8)round + 127) << 23);
}

/* out = x / rms(x) * weight for n values, n a multiple of 8; out may be x. */
static inline void normalize(const float *x, const float *weight, float eps, float *out, long n) {
    f8 squares = {0};
    for (long i = 0; i < n; i += 8) squares += LOAD(x + i) * LOAD(x + i);
    float inverse = 1.0f / sqrtf(sum(squares) / (float)n + eps);
    for (long i = 0; i < n; i += 8) STORE(out + i, LOAD(x + i) * inverse * LOAD(weight + i));
}

APART static void norm_row(const float *x, const float *residual, const float *weight, float eps,
                           float *normed, float *total, long n) {
    if (residual) {
        for (long i = 0; i < n; i += 8) STORE(total + i, LOAD(x + i) + LOAD(residual + i));
        x = total;
    }
    normalize(x, weight, eps, normed, n);
}

/* x, residual (or NULL), normed, total (x + residual): float[rows][n]; weight: float[n]. */
void rms_norm(const float *x, const float *residual, const float *weight, float eps, float *normed,
              float *total, long rows, long n, int threads) {
    _Pragma("omp parallel for if (rows > PARALLEL_ROWS) num_threads(threads)")
    for (long r = 0; r < rows; r++)
        norm_row(x + r * n, residual ? residual + r * n : 0, weight, eps, normed + r * n,
                 total + r * n, n);
}

APART static void gate_row(const float *gate, const float *up, float *out, long n) {
    for (long i = 0; i < n; i += 8) {
        f8 g = LOAD(gate + i);
        STORE(out + i, g / (1.0f + exp8(-g)) * LOAD(up + i));
    }
}

/* gate_up: float[rows][2 n], out: float[rows][n]; n a multiple of 8. */
void silu_mul(const float *gate_up, float *out, long rows, long n, int threads) {
    _Pragma("omp parallel for if (rows > PARALLEL_ROWS) num_threads(threads)")
    for (long r = 0; r < rows; r++)
        gate_row(gate_up + r * 2 * n, gate_up + r * 2 * n + n, out + r * n, n);
}

/* The pool's layer [block][2][kv_heads][token][dim], dims dense; strides in floats. */
typedef struct {
    float *data;
    long block, kv, head, token;
} Cache;

static inline void rotate(float *x, const float *cos, const float *sin, long half) {
    for (long i = 0; i < half; i++) {
        float first = x[i], second = x[half + i];
        x[i] = first * cos[i] - second * sin[i];
        x[half + i] = second * cos[i] + first * sin[i];
    }
}

APART static void rope_row(float *heads, const float *cos, const float *sin, long half,
                           const float *q_weight, const float *k_weight, float eps, float *k_out,
                           float *v_out, long head_stride, long num_q, long num_kv, long dim) {
    for (long h = 0; h < num_q + num_kv; h++) {
        float *x = heads + h * dim;
        const float *weight = h < num_q ? q_weight : k_weight;
        if (weight) normalize(x, weight, eps, x, dim);
        rotate(x, cos, sin, half);
    }
    if (!k_out) return;
    const float *k = heads + num_q * dim, *v = k + num_kv * dim;
    for (long h = 0; h < num_kv; h++)
        for (long i = 0; i < dim; i++) {
            k_out[h * head_stride + i] = k[h * dim + i];
            v_out[h * head_stride + i] = v[h * dim + i];
        }
}

/* qkv: float[rows][(num_q + 2 num_kv) * dim], q and k rotated in place (and normed before, where
 * there are weights); cos, sin: float[positions][half]; slots: block * block_size + offset,
 * negative for padding. dim a multiple of 8 where there are weights. */
void rope_and_cache(float *qkv, const float *cos, const float *sin, const int64_t *positions,
                    const int64_t *slots, float *cache, const long *strides, const float *q_weight,
                    const float *k_weight, float eps, long rows, long num_q, long num_kv, long dim,
                    long half, long block_size, int threads) {
    Cache to = {cache, strides[0], strides[1], strides[2], strides[3]};
    _Pragma("omp parallel for if (rows > PARALLEL_ROWS) num_threads(threads)")
    for (long r = 0; r < rows; r++) {
        float *k = 0;
        if (slots[r] >= 0)
            k = to.data + slots[r] / block_size * to.block + slots[r] % block_size * to.token;
        rope_row(qkv + r * (num_q + 2 * num_kv) * dim, cos + positions[r] * half,
                 sin + positions[r] * half, half, q_weight, k_weight, eps, k, k ? k + to.kv : 0,
                 to.head, num_q, num_kv, dim);
    }
}

/* The sums of eight vectors, each in the order of `sum`. */
static inline f8 sums(f8 a, f8 b, f8 c, f8 d, f8 e, f8 f, f8 g, f8 h) {
#ifdef __AVX__
#define HALVES(x) _mm_add_ps(_mm256_castps256_ps128((__m256)(x)), _mm256_extractf128_ps((__m256)(x), 1))
#define EVEN_ODD(x, y) _mm_add_ps(_mm_shuffle_ps(x, y, 0x44), _mm_shuffle_ps(x, y, 0xee))
    __m128 ab = EVEN_ODD(HALVES(a), HALVES(b)), cd = EVEN_ODD(HALVES(c), HALVES(d));
    __m128 ef = EVEN_ODD(HALVES(e), HALVES(f)), gh = EVEN_ODD(HALVES(g), HALVES(h));
    return (f8)_mm256_set_m128(_mm_hadd_ps(ef, gh), _mm_hadd_ps(ab, cd));
#else
    return (f8){sum(a), sum(b), sum(c), sum(d), sum(e), sum(f), sum(g), sum(h)};
#endif
}

/* scores[t] = scale * q . k[t] for a block's `size` keys, eight at a time: enough sums in flight
 * to hide the latency of each. Keys past the sequence are multiplied too, and masked later. */
static inline void dot_keys(const float *q, const float *k, long stride, long size, long dim,
                            float scale, float *scores) {
    long t = 0;
    for (; t + 8 <= size; t += 8) {
        const float *at = k + t * stride;
        f8 a = {0}, b = {0}, c = {0}, d = {0}, e = {0}, f = {0}, g = {0}, h = {0};
        for (long i = 0; i < dim; i += 8) {
            f8 x = LOAD(q + i);
            a += x * LOAD(at + i);
            b += x * LOAD(at + stride + i);
            c += x * LOAD(at + 2 * stride + i);
            d += x * LOAD(at + 3 * stride + i);
            e += x * LOAD(at + 4 * stride + i);
            f += x * LOAD(at + 5 * stride + i);
            g += x * LOAD(at + 6 * stride + i);
            h += x * LOAD(at + 7 * stride + i);
        }
        STORE(scores + t, scale * sums(a, b, c, d, e, f, g, h));
    }
    for (; t < size; t++) {
        f8 s = {0};
        for (long i = 0; i < dim; i += 8) s += LOAD(q + i) * LOAD(k + t * stride + i);
        scores[t] = scale * sum(s);
    }
}

/* out = out * kept + sum over t of weights[t] * v[t], WIDTH vectors of eight at a time. */
#define ADD_VALUES(WIDTH)                                                                       \
    for (; i + 8 * WIDTH <= dim; i += 8 * WIDTH) {                                              \
        f8 acc[WIDTH];                                                                          \
        _Pragma("GCC unroll 8") for (int j = 0; j < WIDTH; j++) acc[j] =                        \
            LOAD(out + i + 8 * j) * kept;                                                       \
        for (long t = 0; t < n; t++)                                                            \
            _Pragma("GCC unroll 8") for (int j = 0; j < WIDTH; j++) acc[j] +=                   \
                weights[t] * LOAD(v + t * stride + i + 8 * j);                                  \
        _Pragma("GCC unroll 8") for (int j = 0; j < WIDTH; j++) STORE(out + i + 8 * j, acc[j]); \
    }

static inline void add_values(float *out, float kept, const float *weights, const float *v,
                              long stride, long n, long dim) {
    long i = 0;
    ADD_VALUES(8)
    ADD_VALUES(1)
}

/* One sequence, one KV head and the `group` heads of q that share it: a block at a time with a
 * running maximum and sum (online softmax: Milakov and Gimelshein, 2018). */
APART static void attend(const float *q, Cache kv, const int32_t *table, long length, long head,
                         long group, long dim, long block_size, float scale, float *out) {
    float most[MAX_GROUP], total[MAX_GROUP], scores[MAX_BLOCK + 8];
    for (long g = 0; g < group; g++) {
        most[g] = -INFINITY;
        total[g] = 0;
        for (long i = 0; i < dim; i++) out[g * dim + i] = 0;
    }
    for (long start = 0; start < length; start += block_size) {
        const float *k = kv.data + table[start / block_size] * kv.block + head * kv.head;
        const float *v = k + kv.kv;
        long n = length - start < block_size ? length - start : block_size;
        for (long g = 0; g < group; g++) {
            float *mine = out + g * dim;
            dot_keys(q + g * dim, k, kv.token, block_size, dim, scale, scores);
            for (long t = n; t < n + 8; t++) scores[t] = -INFINITY;
            float high = most[g];
            for (long t = 0; t < n; t++) high = scores[t] > high ? scores[t] : high;
            /* of what was summed before, against the new maximum */
            float kept = start ? exp8((f8){0} + (most[g] - high))[0] : 0;
            f8 p = {0};
            for (long t = 0; t < n; t += 8) {
                f8 raw = LOAD(scores + t), e = exp8(raw - high);
                e = where(raw > -INFINITY, e, (f8){0});
                STORE(scores + t, e);
                p += e;
            }
            total[g] = total[g] * kept + sum(p);
            most[g] = high;
            add_values(mine, kept, scores, v, kv.token, n, dim);
        }
    }
    for (long g = 0; g < group; g++)
        for (long i = 0; i < dim; i += 8)
            STORE(out + g * dim + i, LOAD(out + g * dim + i) / total[g]);
}

/* q: float[rows][num_q][dim], q_stride floats from row to row; tables: int32[rows][table_width];
 * lengths: int32[rows], 0 for padding, whose output is zero; out: float[rows][num_q][dim].
 * dim a multiple of 8, num_q / num_kv up to MAX_GROUP, block_size up to MAX_BLOCK. */
void decode_attention(const float *q, long q_stride, float *cache, const long *strides,
                      const int32_t *tables, long table_width, const int32_t *lengths, float *out,
                      long rows, long num_q, long num_kv, long dim, long block_size, float scale,
                      int threads) {
    Cache kv = {cache, strides[0], strides[1], strides[2], strides[3]};
    long group = num_q / num_kv, tasks = rows * num_kv, tokens = 0;
    for (long r = 0; r < rows; r++) tokens += lengths[r];
    _Pragma("omp parallel for schedule(dynamic) if (tokens > PARALLEL_TOKENS) num_threads(threads)")
    for (long task = 0; task < tasks; task++) {
        long r = task / num_kv, head = task % num_kv;
        float *mine = out + (r * num_q + head * group) * dim;
        if (lengths[r])
            attend(q + r * q_stride + head * group * dim, kv, tables + r * table_width, lengths[r],
                   head, group, dim, block_size, scale, mine);
        else
            for (long i = 0; i < group * dim; i++) mine[i] = 0;
    }
}
