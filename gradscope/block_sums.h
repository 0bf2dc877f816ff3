/* One pass over a block of floats, given by their bits: sum of squares, range and, where it is asked for, zeros.

   A template: every inclusion with BLOCK_SUMS, WORD, REAL, WORD_MAX and MAGNITUDE defined makes one function
       static void BLOCK_SUMS(const WORD *x, size_t n, block_sums *out)
   and COUNT_ZEROS says whether it counts them.  The lanes are independent sums, so that the compiler may vectorise
   them without being allowed to reorder anything; a float's square is exact in double, so that fused multiply-add
   changes nothing. */

#ifndef GRADSCOPE_BLOCK_SUMS
#define GRADSCOPE_BLOCK_SUMS
#include <stdint.h>
#include <string.h>

/* One build that runs everywhere and uses wide vectors where it finds them.  It needs ifunc: gcc or clang 14, glibc,
   x86-64. */
#if defined(__GNUC__) && (!defined(__clang__) || __clang_major__ >= 14) && defined(__x86_64__) && defined(__GLIBC__)
#define VECTORS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORS
#endif
#if defined(_MSC_VER)
#define RESTRICT __restrict
#else
#define RESTRICT restrict
#endif
#define BLOCK_LANES 32

/* ``least`` is the bits of the smallest non-zero magnitude minus one, UINT64_MAX where there is none. */
typedef struct {
    double squares;
    uint64_t most, least, zeros;
} block_sums;
#endif

#ifdef BLOCK_SUMS
VECTORS static void BLOCK_SUMS(const WORD *RESTRICT x, size_t n, block_sums *out)
{
    double acc[BLOCK_LANES] = {0};
    WORD hi[BLOCK_LANES] = {0}, lo[BLOCK_LANES];
#if COUNT_ZEROS
    WORD zero[BLOCK_LANES] = {0};
#endif
    size_t i, whole = n - n % BLOCK_LANES;
    int j, w;
    for (j = 0; j < BLOCK_LANES; j++) lo[j] = WORD_MAX;
    for (i = 0; i < whole; i += BLOCK_LANES)
        for (j = 0; j < BLOCK_LANES; j++) {
            WORD m = x[i + j] & MAGNITUDE, below = m - 1;
            REAL f;
            memcpy(&f, &m, sizeof f);
            acc[j] += (double)f * (double)f;
            hi[j] = hi[j] > m ? hi[j] : m;
            lo[j] = lo[j] < below ? lo[j] : below;
#if COUNT_ZEROS
            zero[j] += m == 0;
#endif
        }
    for (; i < n; i++) {
        WORD m = x[i] & MAGNITUDE, below = m - 1;
        REAL f;
        memcpy(&f, &m, sizeof f);
        acc[i - whole] += (double)f * (double)f;
        hi[0] = hi[0] > m ? hi[0] : m;
        lo[0] = lo[0] < below ? lo[0] : below;
#if COUNT_ZEROS
        zero[0] += m == 0;
#endif
    }
    for (w = BLOCK_LANES / 2; w; w /= 2)
        for (j = 0; j < w; j++) {
            acc[j] += acc[j + w];
            hi[j] = hi[j] > hi[j + w] ? hi[j] : hi[j + w];
            lo[j] = lo[j] < lo[j + w] ? lo[j] : lo[j + w];
#if COUNT_ZEROS
            zero[j] += zero[j + w];
#endif
        }
    out->squares = acc[0];
    out->most = hi[0];
    out->least = lo[0] == WORD_MAX ? UINT64_MAX : lo[0];
#if COUNT_ZEROS
    out->zeros = zero[0];
#endif
}
#undef BLOCK_SUMS
#undef WORD
#undef REAL
#undef WORD_MAX
#undef MAGNITUDE
#undef COUNT_ZEROS
#endif
