/* y[m, n] = sum_k x[m, k] * w[n, k] for a few rows of x: a decode step on a CPU.
 *
 * Such a step reads every weight once and does little with it, so what counts is that the
 * weights stream at the speed of memory. Rows of x go in groups of 8, 4, 2 and 1: each weight
 * is loaded (bf16 ones are widened) once a group and multiplied into as many accumulators.
 * A row's sum is taken in one order whatever the group: the result of a row does not depend
 * on which rows stand beside it. (A row alone runs as a pair of itself: for one accumulator
 * compilers tuned for some CPUs avoid fused multiply-adds, which round otherwise.)
 *
 * x: float[m][k]   w: uint16_t (bf16) or float [n][k]   y: float[m][n]; k a multiple of 8.
 */
#include <stdint.h>

typedef float f8 __attribute__((vector_size(32)));
typedef float f8_unaligned __attribute__((vector_size(32), aligned(4)));
typedef uint32_t u8 __attribute__((vector_size(32)));
typedef uint16_t h8_unaligned __attribute__((vector_size(16), aligned(2)));

static inline f8 load_bf16(const uint16_t *p) {
    u8 wide = __builtin_convertvector(*(const h8_unaligned *)p, u8);
    return (f8)(wide << 16);
}

static inline f8 load_f32(const float *p) { return *(const f8_unaligned *)p; }

static inline float sum(f8 a) {
    return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
}

#if defined(__GNUC__) && !defined(__clang__)
#define APART __attribute__((noipa)) /* one body for every caller: one rounding */
#else
#define APART __attribute__((noinline))
#endif

#define GROUP(NAME, TYPE, LOAD, M)                                                              \
    APART static void NAME##_##M(const float *x, const TYPE *w, float *y, long ldx, long ldy, long k, \
                           long n0, long n1) {                                                  \
        for (long j = n0; j < n1; j++) {                                                        \
            const TYPE *row = w + j * k;                                                        \
            f8 acc[M];                                                                          \
            for (int m = 0; m < M; m++) acc[m] = (f8){0};                                       \
            for (long i = 0; i < k; i += 8) {                                                   \
                __builtin_prefetch(row + i + 2048 / sizeof(TYPE));                              \
                f8 weight = LOAD(row + i);                                                      \
                _Pragma("GCC unroll 8") for (int m = 0; m < M; m++) acc[m] +=                   \
                    weight * *(const f8_unaligned *)(x + m * ldx + i);                           \
            }                                                                                   \
            for (int m = 0; m < M; m++) y[m * ldy + j] = sum(acc[m]);                           \
        }                                                                                       \
    }

#define LINEAR(NAME, TYPE, LOAD)                                                                \
    GROUP(NAME, TYPE, LOAD, 2)                                                                  \
    GROUP(NAME, TYPE, LOAD, 4)                                                                  \
    GROUP(NAME, TYPE, LOAD, 8)                                                                  \
    void NAME(const float *x, const TYPE *w, float *y, long m, long n, long k, int threads) {   \
        long tiles = (n + 31) / 32;                                                             \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                       \
        for (long t = 0; t < tiles; t++) {                                                      \
            long n0 = t * 32, n1 = n0 + 32 < n ? n0 + 32 : n, r = 0;                            \
            for (; r + 8 <= m; r += 8) NAME##_8(x + r * k, w, y + r * n, k, n, k, n0, n1);      \
            for (; r + 4 <= m; r += 4) NAME##_4(x + r * k, w, y + r * n, k, n, k, n0, n1);      \
            for (; r + 2 <= m; r += 2) NAME##_2(x + r * k, w, y + r * n, k, n, k, n0, n1);      \
            for (; r < m; r += 1) NAME##_2(x + r * k, w, y + r * n, 0, 0, k, n0, n1);           \
        }                                                                                       \
    }

LINEAR(linear_bf16, uint16_t, load_bf16)
LINEAR(linear_f32, float, load_f32)
