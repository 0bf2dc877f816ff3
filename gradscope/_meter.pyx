# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Gradients where they lie -> totals and magnitude bins of a clip group, in one call; weights -> norms.

Made for many small tensors at every step of a training run, where ``_kernels`` is made for large ones, once.

Fine bins are the 14 bits below the sign of a float64 (11 exponent, 3 mantissa): 8 an octave.  A float32 falls into
them by its top 11 bits, and since its magnitude is linear in the low 20 bits, the sums of these and of their squares
are the exact first and second moment of a bin.  Types of 16 bits and fewer go by way of float32.
What is stored of the fine bins, and in which code, ``emit_bins`` decides; ``gradscope.trace.bins`` reads it.
"""

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from libc.math cimport NAN, sqrt
from libc.stdint cimport UINT32_MAX, UINT64_MAX, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset

import threading

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>

    #define GM_PART 256
    #define GM_LANES 4
    #define GM_ONE (1ull << 40)
    #define GM_ABS64 0x7fffffffffffffffull
    #define GM_INF64 0x7ff0000000000000ull

    #define BLOCK_SUMS gm_block32
    #define WORD uint32_t
    #define REAL float
    #define WORD_MAX UINT32_MAX
    #define MAGNITUDE 0x7fffffffu
    #define COUNT_ZEROS 1
    #include "block_sums.h"
    #define BLOCK_SUMS gm_block64
    #define WORD uint64_t
    #define REAL double
    #define WORD_MAX UINT64_MAX
    #define MAGNITUDE GM_ABS64
    #define COUNT_ZEROS 1
    #include "block_sums.h"

    /* A number that one thread counts up and another reads; what was written before it is there when it is.
       GM_NEXT counts up, and returns what it was. */
    #if defined(__GNUC__)
    #define GM_PUBLISH(counter, value) __atomic_store_n(counter, value, __ATOMIC_RELEASE)
    #define GM_READ(counter) __atomic_load_n(counter, __ATOMIC_ACQUIRE)
    #define GM_NEXT(counter) __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED)
    #else
    #include <intrin.h>
    #define GM_PUBLISH(counter, value) _InterlockedExchange64((volatile __int64 *)(counter), (__int64)(value))
    #define GM_READ(counter) (uint64_t)_InterlockedOr64((volatile __int64 *)(counter), 0)
    #define GM_NEXT(counter) (uint64_t)_InterlockedExchangeAdd64((volatile __int64 *)(counter), 1)
    #endif

    /* What each element adds to its entry: 2**40 + low bits, and the square of these. */
    VECTORS static void gm_addends(const uint32_t *RESTRICT x, size_t n, uint32_t *RESTRICT bin,
                                      uint64_t *RESTRICT add)
    {
        size_t i;
        for (i = 0; i < n; i++) {
            uint32_t m = x[i] & 0x7fffffffu;
            uint64_t low = m & 0xfffffu;
            bin[i] = m >> 20;
            add[2 * i] = GM_ONE + low;
            add[2 * i + 1] = low * low;
        }
    }

    #if defined(__GNUC__)
    typedef uint64_t gm_pair __attribute__((vector_size(16), aligned(8), may_alias));
    #define GM_ADD(to, from) { *(gm_pair *)(to) += *(const gm_pair *)(from); }
    #else
    #define GM_ADD(to, from) { (to)[0] += (from)[0]; (to)[1] += (from)[1]; }
    #endif

    /* Four entries to a bin, so that equal neighbours do not wait for each other's store. */
    static void gm_tally32_anywhere(const uint32_t *x, size_t n, uint64_t *table)
    {
        uint32_t bin[GM_PART];
        uint64_t add[2 * GM_PART];
        size_t at, i, size;
        for (at = 0; at < n; at += GM_PART) {
            size = n - at < GM_PART ? n - at : GM_PART;
            gm_addends(x + at, size, bin, add);
            for (i = 0; i + 4 <= size; i += 4) {
                GM_ADD(table + 8 * bin[i], add + 2 * i)
                GM_ADD(table + 8 * bin[i + 1] + 2, add + 2 * i + 2)
                GM_ADD(table + 8 * bin[i + 2] + 4, add + 2 * i + 4)
                GM_ADD(table + 8 * bin[i + 3] + 6, add + 2 * i + 6)
            }
            for (; i < size; i++) GM_ADD(table + 8 * bin[i], add + 2 * i)
        }
    }

    #if defined(__GNUC__) && defined(__x86_64__)
    #include <immintrin.h>
    /* The same without leaving the registers, in 0.7 of the time.  n is a multiple of 4. */
    __attribute__((target("avx2"))) static void gm_tally32_avx2(const uint32_t *x, size_t n, uint64_t *table)
    {
        const __m128i magnitude = _mm_set1_epi32(0x7fffffff), low_bits = _mm_set1_epi32(0xfffff);
        const __m256i one = _mm256_set1_epi64x((long long)GM_ONE);
        size_t i;
        for (i = 0; i < n; i += 4) {
            __m128i m = _mm_and_si128(_mm_loadu_si128((const __m128i *)(x + i)), magnitude);
            __m128i bin = _mm_srli_epi32(m, 20);
            __m256i low = _mm256_cvtepu32_epi64(_mm_and_si128(m, low_bits));
            __m256i square = _mm256_mul_epu32(low, low), count = _mm256_add_epi64(low, one);
            __m256i even = _mm256_unpacklo_epi64(count, square), odd = _mm256_unpackhi_epi64(count, square);
            uint64_t first = (uint64_t)_mm_cvtsi128_si64(bin), last = (uint64_t)_mm_extract_epi64(bin, 1);
            __m128i *to0 = (__m128i *)(table + 8 * (first & 0xfff)), *to1 = (__m128i *)(table + 8 * (first >> 32)) + 1;
            __m128i *to2 = (__m128i *)(table + 8 * (last & 0xfff)) + 2, *to3 = (__m128i *)(table + 8 * (last >> 32)) + 3;
            _mm_storeu_si128(to0, _mm_add_epi64(_mm_loadu_si128(to0), _mm256_castsi256_si128(even)));
            _mm_storeu_si128(to1, _mm_add_epi64(_mm_loadu_si128(to1), _mm256_castsi256_si128(odd)));
            _mm_storeu_si128(to2, _mm_add_epi64(_mm_loadu_si128(to2), _mm256_extracti128_si256(even, 1)));
            _mm_storeu_si128(to3, _mm_add_epi64(_mm_loadu_si128(to3), _mm256_extracti128_si256(odd, 1)));
        }
    }

    static void gm_tally32(const uint32_t *x, size_t n, uint64_t *table)
    {
        size_t whole = __builtin_cpu_supports("avx2") ? n - n % 4 : 0;
        gm_tally32_avx2(x, whole, table);
        gm_tally32_anywhere(x + whole, n - whole, table);
    }
    #else
    #define gm_tally32 gm_tally32_anywhere
    #endif

    /* Moments of the position within a bin, from 0 to 1. */
    typedef struct { uint64_t count; double sum, squares; } gm_bin;

    static void gm_tally64(const uint64_t *x, size_t n, gm_bin *table)
    {
        size_t i;
        for (i = 0; i < n; i++) {
            gm_bin *bin = table + (x[i] >> 49 & 0x3fff);
            double at = (double)(int64_t)(x[i] & 0x1ffffffffffffull) * 0x1p-49;
            bin->count += 1;
            bin->sum += at;
            bin->squares += at * at;
        }
    }

    VECTORS static void gm_widen_bfloat16(const uint16_t *RESTRICT x, size_t n, uint32_t *RESTRICT out)
    {
        size_t i;
        for (i = 0; i < n; i++) out[i] = (uint32_t)x[i] << 16;
    }

    /* Integers and normal floats alone, so that it does not matter whether the processor takes subnormals for zeros. */
    VECTORS static void gm_widen_float16(const uint16_t *RESTRICT x, size_t n, uint32_t *RESTRICT out)
    {
        size_t i;
        for (i = 0; i < n; i++) {
            uint32_t m = x[i] & 0x7fffu, normal = (m << 13) + (112u << 23), high = normal + (112u << 23), small;
            float f = (float)(int32_t)m * 0x1p-24f;
            memcpy(&small, &f, 4);
            out[i] = (m >= 0x7c00u ? high : m < 0x400u ? small : normal) | (uint32_t)(x[i] & 0x8000u) << 16;
        }
    }

    static void gm_widen_byte(const uint8_t *x, size_t n, const uint32_t *value, uint32_t *out)
    {
        size_t i;
        for (i = 0; i < n; i++) out[i] = value[x[i] & 0x7f] | (uint32_t)(x[i] & 0x80) << 24;
    }

    /* The sums of squares of a - b, of floats and of doubles. */
    VECTORS static double gm_difference32(const float *RESTRICT a, const float *RESTRICT b, size_t n)
    {
        double acc[BLOCK_LANES] = {0};
        size_t i, whole = n - n % BLOCK_LANES;
        int j, w;
        for (i = 0; i < whole; i += BLOCK_LANES)
            for (j = 0; j < BLOCK_LANES; j++) {
                double d = (double)a[i + j] - (double)b[i + j];
                acc[j] += d * d;
            }
        for (; i < n; i++) {
            double d = (double)a[i] - (double)b[i];
            acc[i - whole] += d * d;
        }
        for (w = BLOCK_LANES / 2; w; w /= 2)
            for (j = 0; j < w; j++) acc[j] += acc[j + w];
        return acc[0];
    }

    VECTORS static double gm_difference64(const double *RESTRICT a, const double *RESTRICT b, size_t n)
    {
        double acc[BLOCK_LANES] = {0};
        size_t i, whole = n - n % BLOCK_LANES;
        int j, w;
        for (i = 0; i < whole; i += BLOCK_LANES)
            for (j = 0; j < BLOCK_LANES; j++) {
                double d = a[i + j] - b[i + j];
                acc[j] += d * d;
            }
        for (; i < n; i++) {
            double d = a[i] - b[i];
            acc[i - whole] += d * d;
        }
        for (w = BLOCK_LANES / 2; w; w /= 2)
            for (j = 0; j < w; j++) acc[j] += acc[j + w];
        return acc[0];
    }
    """
    ctypedef struct block_sums:
        double squares
        uint64_t most
        uint64_t least
        uint64_t zeros
    ctypedef struct gm_bin:
        uint64_t count
        double sum
        double squares
    const uint64_t GM_ABS64
    const uint64_t GM_INF64
    void GM_PUBLISH(uint64_t *counter, uint64_t value) nogil
    uint64_t GM_READ(uint64_t *counter) nogil
    uint64_t GM_NEXT(uint64_t *counter) nogil
    void gm_block32(const uint32_t *x, size_t n, block_sums *out) nogil
    void gm_block64(const uint64_t *x, size_t n, block_sums *out) nogil
    void gm_tally32(const uint32_t *x, size_t n, uint64_t *table) nogil
    void gm_tally64(const uint64_t *x, size_t n, gm_bin *table) nogil
    void gm_widen_bfloat16(const uint16_t *x, size_t n, uint32_t *out) nogil
    void gm_widen_float16(const uint16_t *x, size_t n, uint32_t *out) nogil
    void gm_widen_byte(const uint8_t *x, size_t n, const uint32_t *value, uint32_t *out) nogil
    double gm_difference32(const float *a, const float *b, size_t n) nogil
    double gm_difference64(const double *a, const double *b, size_t n) nogil


cdef enum:
    FLOAT64 = 0
    FLOAT32 = 1
    FLOAT16 = 2
    BFLOAT16 = 3
    E4M3FN = 4
    E5M2 = 5
    BLOCK = 2048
    BINS32 = 2048
    BINS64 = 16384
    # The fine bin of a float32's top 11 bits is these plus (1023 - 127) octaves.
    OFFSET32 = 896 * 8
    # An entry of 64 bits holds fewer than 2**20 float32 elements.
    FOLD = (1 << 20) - BLOCK
    OCTAVES_KEPT = 40
    # The code of a bin is its number within its level, from here on: see gradscope.trace.bins.
    LEVEL4 = 16384
    LEVEL2 = 24576
    LEVEL1 = 28672
    BELOW = 30720
    TWO_THREADS = 1 << 20
    GIL_ELEMENTS = 1 << 14

cdef dict KINDS = {
    # name: kind, bytes
    "float64": (FLOAT64, 8),
    "float32": (FLOAT32, 4),
    "float16": (FLOAT16, 2),
    "bfloat16": (BFLOAT16, 2),
    "float8_e4m3fn": (E4M3FN, 1),
    "float8_e5m2": (E5M2, 1),
}

# The float32 of every float8, by its bits without the sign.
cdef uint32_t[2][128] BYTES


cdef void fill_byte_table(uint32_t *table, int mantissa_bits, int bias, int first_nonfinite, bint has_inf) noexcept:
    cdef int i, exponent, fraction
    cdef float value
    for i in range(128):
        exponent = i >> mantissa_bits
        fraction = i & ((1 << mantissa_bits) - 1)
        if i >= first_nonfinite:
            table[i] = 0x7F800000 if has_inf and i == first_nonfinite else 0x7FC00000
        else:
            if exponent:
                fraction += 1 << mantissa_bits
                exponent -= 1
            value = fraction * 2.0 ** (exponent + 1 - bias - mantissa_bits)
            memcpy(&table[i], &value, 4)


fill_byte_table(&BYTES[0][0], 3, 7, 0x7F, False)
fill_byte_table(&BYTES[1][0], 2, 15, 0x7C, True)


cdef struct Totals:
    double squares
    double lost
    uint64_t most
    uint64_t zeros
    uint64_t nan
    uint64_t inf


cdef struct StoredBin:
    uint32_t count
    float mean
    float spread
    uint16_t code


cdef struct Piece:
    # A range of one tensor's elements; ``whole`` unless another thread has the rest.
    Py_ssize_t tensor
    const char *data
    uint64_t numel
    int kind
    int itemsize
    bint whole


cdef inline void add_compensated(double *total, double *lost, double x) noexcept nogil:
    """Knuth's two-sum: ``total + lost`` is the sum to about one rounding."""
    cdef double t = total[0] + x
    cdef double part = t - total[0]
    lost[0] += (total[0] - (t - part)) + (x - part)
    total[0] = t


cdef const uint32_t *widened(const char *data, size_t n, int kind, uint32_t *room) noexcept nogil:
    """n elements of at most 32 bits as the bits of float32, where they lie or in ``room``."""
    if kind == FLOAT32:
        if <size_t>data % 4 == 0:
            return <const uint32_t *>data
        memcpy(room, data, 4 * n)
    elif kind == BFLOAT16:
        gm_widen_bfloat16(<const uint16_t *>data, n, room)
    elif kind == FLOAT16:
        gm_widen_float16(<const uint16_t *>data, n, room)
    else:
        gm_widen_byte(<const uint8_t *>data, n, &BYTES[0 if kind == E4M3FN else 1][0], room)
    return room


cdef const uint64_t *aligned64(const char *data, size_t n, uint32_t *room) noexcept nogil:
    if <size_t>data % 8 == 0:
        return <const uint64_t *>data
    memcpy(room, data, 8 * n)
    return <const uint64_t *>room


cdef struct FineBins:
    # Those outside of [first, last] are empty.
    gm_bin *bins
    size_t first
    size_t last


cdef inline void reach(FineBins *fine, size_t first, size_t last) noexcept nogil:
    if first < fine.first:
        fine.first = first
    if last > fine.last:
        fine.last = last


cdef void clear(FineBins *fine) noexcept nogil:
    if fine.first <= fine.last:
        memset(fine.bins + fine.first, 0, (fine.last - fine.first + 1) * sizeof(gm_bin))
    fine.first = BINS64
    fine.last = 0


cdef void move(FineBins *source, FineBins *into) noexcept nogil:
    """Adds everything to ``into`` and empties ``source``."""
    cdef size_t i
    cdef const gm_bin *bin
    if source.first > source.last:
        return
    reach(into, source.first, source.last)
    for i in range(source.first, source.last + 1):
        bin = &source.bins[i]
        if bin.count:
            into.bins[i].count += bin.count
            into.bins[i].sum += bin.sum
            into.bins[i].squares += bin.squares
    clear(source)


cdef class Tally:
    """One thread's tables."""

    cdef uint64_t *table32
    # The range of table32 besides entry 0, which takes the zeros.
    cdef size_t first32, last32
    cdef size_t pending
    cdef FineBins recent, tensor, group
    cdef Totals *totals
    cdef StoredBin *stored
    cdef size_t stored_size, stored_capacity
    # Where a tensor's stored bins start and how many they are.
    cdef size_t *starts
    cdef size_t *sizes
    cdef bint no_memory
    cdef uint32_t *room
    cdef uint32_t *kept

    def __cinit__(self, Py_ssize_t tensors):
        self.table32 = <uint64_t *>calloc(8 * BINS32, 8)
        self.room = <uint32_t *>malloc(8 * BLOCK)
        self.kept = <uint32_t *>malloc(8 * BLOCK)
        self.totals = <Totals *>calloc(tensors + 1, sizeof(Totals))
        self.starts = <size_t *>calloc(tensors + 1, sizeof(size_t))
        self.sizes = <size_t *>calloc(tensors + 1, sizeof(size_t))
        self.first32 = BINS32
        self.recent = self.tensor = self.group = FineBins(NULL, BINS64, 0)
        self.recent.bins = <gm_bin *>calloc(BINS64, sizeof(gm_bin))
        self.tensor.bins = <gm_bin *>calloc(BINS64, sizeof(gm_bin))
        self.group.bins = <gm_bin *>calloc(BINS64, sizeof(gm_bin))
        if not (self.recent.bins and self.tensor.bins and self.group.bins):
            raise MemoryError
        if not (self.table32 and self.room and self.kept and self.totals and self.starts and self.sizes):
            raise MemoryError

    def __dealloc__(self):
        free(self.recent.bins)
        free(self.tensor.bins)
        free(self.group.bins)
        free(self.table32)
        free(self.room)
        free(self.kept)
        free(self.totals)
        free(self.starts)
        free(self.sizes)
        free(self.stored)

    cdef void run(self, const Piece *pieces, Py_ssize_t n, Py_ssize_t step, int spectra) noexcept nogil:
        """Measures n pieces, the first at ``pieces`` and the others every ``step``.

        With spectra = 1 their bins are then in ``group``, with 2 those of every whole tensor also in ``stored``; a
        part of a tensor comes last and stays in ``tensor``.
        """
        cdef Py_ssize_t i
        cdef const Piece *piece
        self.stored_size = 0
        for i in range(n):
            piece = pieces + i * step
            self.add(piece, spectra)
            if spectra == 2:
                self.fold(&self.tensor)
                if piece.whole:
                    self.store(piece.tensor, &self.tensor)
                    move(&self.tensor, &self.group)
        if spectra == 1:
            self.fold(&self.group)

    cdef void add(self, const Piece *piece, int spectra) noexcept nogil:
        cdef Totals *totals = &self.totals[piece.tensor]
        cdef uint64_t at = 0
        cdef size_t size
        cdef const char *data
        while at < piece.numel:
            size = BLOCK if piece.numel - at > BLOCK else piece.numel - at
            data = piece.data + at * piece.itemsize
            if self.pending > FOLD:
                self.fold(&self.tensor if spectra == 2 else &self.group)
            if piece.kind == FLOAT64:
                self.add_float64(aligned64(data, size, self.room), size, totals, spectra > 0)
            else:
                self.add_float32(widened(data, size, piece.kind, self.room), size, totals, spectra > 0)
            at += size

    cdef void add_float32(self, const uint32_t *x, size_t n, Totals *totals, bint tally) noexcept nogil:
        cdef block_sums block
        cdef float value
        cdef double top
        cdef uint32_t bits
        cdef uint64_t most
        gm_block32(x, n, &block)
        if block.most >= 0x7F800000 or block.least < 0x007FFFFF:
            n = self.only_normal32(x, n, totals, tally)
            x = self.kept
            gm_block32(x, n, &block)
        totals.zeros += block.zeros
        if block.most == 0:
            return
        add_compensated(&totals.squares, &totals.lost, block.squares)
        bits = <uint32_t>block.most
        memcpy(&value, &bits, 4)
        top = value
        memcpy(&most, &top, 8)
        if most > totals.most:
            totals.most = most
        if tally:
            gm_tally32(x, n, self.table32)
            self.pending += n
            if (block.least + 1) >> 20 < self.first32:
                self.first32 = (block.least + 1) >> 20
            if block.most >> 20 > self.last32:
                self.last32 = block.most >> 20

    cdef size_t only_normal32(self, const uint32_t *x, size_t n, Totals *totals, bint tally) noexcept nogil:
        """Copies the zeros and normal numbers of a block to ``kept``; counts the others where they belong."""
        cdef size_t i, left = 0
        cdef uint32_t m
        cdef double value
        cdef uint64_t bits
        for i in range(n):
            m = x[i] & 0x7FFFFFFF
            if m > 0x7F800000:
                totals.nan += 1
            elif m == 0x7F800000:
                totals.inf += 1
            elif m == 0 or m >= 0x00800000:
                self.kept[left] = m
                left += 1
            else:
                # By way of the integer, since somebody may have told the processor to take subnormals for zeros.
                value = <double>m * 2.0 ** -149
                memcpy(&bits, &value, 8)
                add_compensated(&totals.squares, &totals.lost, value * value)
                if bits > totals.most:
                    totals.most = bits
                if tally:
                    reach(&self.recent, bits >> 49, bits >> 49)
                    gm_tally64(&bits, 1, self.recent.bins)
                    self.pending += 1
        return left

    cdef void add_float64(self, const uint64_t *x, size_t n, Totals *totals, bint tally) noexcept nogil:
        cdef block_sums block
        cdef uint64_t *kept = <uint64_t *>self.kept
        cdef uint64_t m
        cdef size_t i, left = 0
        gm_block64(x, n, &block)
        if block.most >= GM_INF64 or block.zeros:
            for i in range(n):
                m = x[i] & GM_ABS64
                if m > GM_INF64:
                    totals.nan += 1
                elif m == GM_INF64:
                    totals.inf += 1
                elif m == 0:
                    totals.zeros += 1
                else:
                    kept[left] = m
                    left += 1
            n = left
            x = kept
            gm_block64(x, n, &block)
        if n == 0:
            return
        if totals.squares + block.squares < NO_SQUARES:
            add_compensated(&totals.squares, &totals.lost, block.squares)
        else:
            totals.squares = NO_SQUARES
            totals.lost = 0.0
        if block.most > totals.most:
            totals.most = block.most
        if tally:
            reach(&self.recent, (block.least + 1) >> 49, block.most >> 49)
            gm_tally64(x, n, self.recent.bins)
            self.pending += n

    cdef void fold(self, FineBins *into) noexcept nogil:
        """Moves what is in the tables to ``into``."""
        cdef size_t i
        cdef uint64_t *entry
        cdef uint64_t packed
        cdef gm_bin *bin
        move(&self.recent, into)
        for i in range(8):
            self.table32[i] = 0
        if self.first32 <= self.last32:
            reach(into, self.first32 + OFFSET32, self.last32 + OFFSET32)
            for i in range(self.first32, self.last32 + 1):
                entry = self.table32 + 8 * i
                packed = entry[0] + entry[2] + entry[4] + entry[6]
                if packed:
                    bin = &into.bins[i + OFFSET32]
                    bin.count += packed >> 40
                    bin.sum += <double><int64_t>(packed & ((1ull << 40) - 1)) * 2.0 ** -20
                    bin.squares += <double><int64_t>(entry[1] + entry[3] + entry[5] + entry[7]) * 2.0 ** -40
                    entry[0] = entry[1] = entry[2] = entry[3] = entry[4] = entry[5] = entry[6] = entry[7] = 0
            self.first32 = BINS32
            self.last32 = 0
        self.pending = 0

    cdef size_t store(self, Py_ssize_t slot, FineBins *bins) noexcept nogil:
        """Stores ``bins`` as those of the tensor ``slot``."""
        cdef size_t needed = self.stored_size + most_bins(bins)
        cdef size_t capacity = 2 * needed
        cdef StoredBin *more
        self.sizes[slot] = 0
        if needed > self.stored_capacity:
            more = <StoredBin *>realloc(self.stored, capacity * sizeof(StoredBin))
            if not more:
                self.no_memory = True
                return 0
            self.stored = more
            self.stored_capacity = capacity
        self.starts[slot] = self.stored_size
        self.sizes[slot] = emit_bins(bins, self.stored + self.stored_size)
        self.stored_size += self.sizes[slot]
        return self.sizes[slot]


cdef double NO_SQUARES = float("inf")


cdef uint64_t counted(const FineBins *bins) noexcept nogil:
    cdef uint64_t total = 0
    cdef size_t i
    if bins.first <= bins.last:
        for i in range(bins.first, bins.last + 1):
            total += bins.bins[i].count
    return total


cdef size_t most_bins(const FineBins *bins) noexcept nogil:
    """No more bins than that are stored; some may stand twice, because a count has 32 bits."""
    if bins.first > bins.last:
        return 0
    return bins.last - bins.first + 2 + counted(bins) // UINT32_MAX


cdef size_t emit_bin(StoredBin *out, uint16_t code, uint64_t count, double sum, double squares) noexcept nogil:
    """One bin from the moments of the position in it; as often as its count takes."""
    cdef double mean = sum / <double>count
    cdef double spread = squares / <double>count - mean * mean
    cdef size_t k = 0
    if spread < 0.0:
        spread = 0.0
    while count:
        out[k].code = code
        out[k].count = <uint32_t>(UINT32_MAX if count > UINT32_MAX else count)
        out[k].mean = <float>mean
        out[k].spread = <float>spread
        count -= out[k].count
        k += 1
    return k


cdef size_t emit_octave(StoredBin *out, const gm_bin *fine, size_t octave, int width, uint16_t level) noexcept nogil:
    """The bins of an octave, each of ``width`` fine ones, from the top down."""
    cdef size_t k = 0
    cdef int j = 8, within
    cdef uint64_t count
    cdef double sum, squares, share = 1.0 / width
    while j > 0:
        j -= width
        count = 0
        sum = squares = 0.0
        for within in range(width):
            count += fine[j + within].count
            sum += within * <double>fine[j + within].count + fine[j + within].sum
            squares += (
                within * (within * <double>fine[j + within].count + 2.0 * fine[j + within].sum) + fine[j + within].squares
            )
        if count:
            k += emit_bin(
                out + k, <uint16_t>(level + (octave * 8 + j) // width), count, sum * share, squares * (share * share)
            )
    return k


cdef size_t emit_bins(FineBins *bins, StoredBin *out) noexcept nogil:
    """Writes what is stored of fine bins, from the top down; returns how many bins that are.

    Clipping at v makes every element above v equal to v.  So where few elements lie in an octave beside those above,
    it matters little to the clipped gradient how those few are split, and the octave may be coarse.  The same goes for
    everything below an octave, but for the largest 40: underflow to smaller dtypes is read off them.
    """
    cdef size_t k = 0, octave, top
    cdef uint64_t above = 0, inside, total = counted(bins)
    cdef const gm_bin *fine
    cdef int j
    if bins.first > bins.last:
        return 0
    top = bins.last >> 3
    octave = top + 1
    while above < total:
        if octave + OCTAVES_KEPT <= top and total - above <= total // 64:
            return k + emit_below(bins, octave, out + k)
        octave -= 1
        fine = bins.bins + 8 * octave
        inside = 0
        for j in range(8):
            inside += fine[j].count
        if inside == 0:
            continue
        above += inside
        if inside <= above // 64:
            k += emit_octave(out + k, fine, octave, 8, LEVEL1)
        elif inside <= above // 16:
            k += emit_octave(out + k, fine, octave, 4, LEVEL2)
        elif inside <= above // 4:
            k += emit_octave(out + k, fine, octave, 2, LEVEL4)
        else:
            k += emit_octave(out + k, fine, octave, 1, 0)
    return k


cdef size_t emit_below(FineBins *bins, size_t octave, StoredBin *out) noexcept nogil:
    """One bin for everything below an octave."""
    cdef uint64_t count = 0
    cdef double sum = 0.0, squares = 0.0, unit, base, c
    cdef size_t i
    cdef const gm_bin *bin
    for i in range(bins.first, 8 * octave):
        bin = &bins.bins[i]
        if bin.count:
            count += bin.count
            c = <double>bin.count
            # In units of the octave's edge; the octave 0 is as linear as the next, but starts at 0.
            unit = 2.0 ** -(3.0 + <double>(octave - (i >> 3 if i >= 8 else 1)))
            base = (8 if i >= 8 else 0) + <double>(i & 7)
            sum += (base * c + bin.sum) * unit
            squares += (base * (base * c + 2.0 * bin.sum) + bin.squares) * (unit * unit)
    return emit_bin(out, <uint16_t>(BELOW + octave), count, sum, squares)


cdef char *copy_column(char *to, Tally tally, size_t slot, int column) noexcept nogil:
    """One of count, mean, spread and code of the bins stored at ``slot``; returns where the next column goes."""
    cdef size_t i, n = tally.sizes[slot]
    cdef const StoredBin *bins = tally.stored + tally.starts[slot]
    for i in range(n):
        if column == 0:
            (<uint32_t *>to)[i] = bins[i].count
        elif column == 1:
            (<float *>to)[i] = bins[i].mean
        elif column == 2:
            (<float *>to)[i] = bins[i].spread
        else:
            (<uint16_t *>to)[i] = bins[i].code
    return to + n * (2 if column == 3 else 4)


include "torch_tensors.pxi"


cdef class Tensors:
    """Tensors of known size and dtype, wherever they lie."""

    cdef Py_ssize_t tensors
    cdef Piece *pieces
    cdef uint64_t elements

    def __cinit__(self, numels, dtypes, *_):
        cdef Py_ssize_t i
        self.tensors = len(numels)
        if len(dtypes) != self.tensors:
            raise ValueError(f"{self.tensors} sizes, but {len(dtypes)} dtypes")
        self.pieces = <Piece *>calloc(self.tensors + 1, sizeof(Piece))
        if not self.pieces:
            raise MemoryError
        for i in range(self.tensors):
            if dtypes[i] not in KINDS:
                raise ValueError(f"unknown dtype {dtypes[i]!r}; known: {', '.join(KINDS)}")
            self.pieces[i].kind, self.pieces[i].itemsize = KINDS[dtypes[i]]
            self.pieces[i].numel = numels[i]

    def __dealloc__(self):
        free(self.pieces)

    cdef int point(self, list pointers, Piece *pieces, bint empty) except -1:
        """Fills ``pieces`` with the tensors that are there, ``empty`` ones in any case, and returns their number."""
        cdef Py_ssize_t i
        cdef int n = 0
        cdef size_t address
        if len(pointers) != self.tensors:
            raise ValueError(f"{len(pointers)} pointers for {self.tensors} tensors")
        self.elements = 0
        for i in range(self.tensors):
            address = pointers[i]
            if address or (empty and self.pieces[i].numel == 0):
                pieces[n] = self.pieces[i]
                pieces[n].tensor = i
                pieces[n].data = <const char *>address
                pieces[n].whole = True
                self.elements += pieces[n].numel
                n += 1
        return n


cdef enum:
    # The columns of many rows; the names are those of gradscope.trace.schema.
    SUM_SQUARES = 0
    MAX_ABS = 1
    ZEROS = 2
    NAN_COUNT = 3
    INF_COUNT = 4
    TENSOR_BIN_COUNTS = 5
    GROUP_COUNT = 6  # then mean, spread, code
    TENSOR_COUNT = 10  # the same
    HEADS = 14
    COLUMNS = 15


cdef struct Grown:
    char *data
    size_t size
    size_t room


cdef struct Columns:
    Grown[COLUMNS] column
    bint no_memory


# As gradscope.trace.pending_rows has it.
cdef packed struct Head:
    int64_t step
    int32_t group
    double time
    double max_norm
    double clip_value
    double norm_type
    double returned_norm
    double grad_scale
    int32_t present
    int32_t tensors
    int32_t group_bins
    int32_t counts
    int32_t tensor_bins
    int32_t weight
    int32_t update


cdef char *more(Grown *grown, size_t size) noexcept nogil:
    """Where the next ``size`` bytes go; NULL where there is no memory."""
    cdef size_t needed = grown.size + size
    cdef char *moved
    if needed > grown.room or not grown.data:
        moved = <char *>realloc(grown.data, 2 * needed + 64)
        if not moved:
            return NULL
        grown.data = moved
        grown.room = 2 * needed + 64
    grown.size = needed
    return grown.data + needed - size


# Runs a function in the threads of an OpenMP team; NULL: in a thread of our own.
ctypedef void (*Work)(void *) noexcept nogil
ctypedef void (*Parallel)(Work work, void *data, unsigned threads, unsigned flags) noexcept nogil
cdef Parallel openmp_parallel = NULL


def use_openmp(size_t parallel):
    """Divide large groups among the threads of the OpenMP library whose ``GOMP_parallel`` lies there; 0: of none."""
    global openmp_parallel
    openmp_parallel = <Parallel>parallel


cdef struct Halves:
    # Half 0 and half 1 of something, for whichever thread comes first.
    void (*half)(void *of, int number) noexcept nogil
    void *of
    uint64_t taken


cdef void run_halves(void *data) noexcept nogil:
    cdef Halves *halves = <Halves *>data
    cdef uint64_t number = GM_NEXT(&halves.taken)
    while number < 2:
        halves.half(halves.of, <int>number)
        number = GM_NEXT(&halves.taken)


def run_half_of(size_t halves):
    """What a thread of our own does."""
    with nogil:
        run_halves(<void *>halves)


cdef int in_two_threads(void (*half)(void *of, int number) noexcept nogil, void *of) except -1:
    """Runs ``half(of, 0)`` and ``half(of, 1)``, each in a thread if possible."""
    cdef Halves halves
    halves.half, halves.of, halves.taken = half, of, 0
    if openmp_parallel != NULL:
        with nogil:
            # All threads: those that a smaller team has no place for would end, and torch start them anew.
            openmp_parallel(run_halves, &halves, 0, 0)
        return 0
    work = threading.Thread(target=run_half_of, args=(<size_t>&halves,))
    try:
        work.start()
    except RuntimeError:
        # No new threads, as at the end of the interpreter.
        work = None
    with nogil:
        run_halves(&halves)
    if work is not None:
        try:
            work.join()
        finally:
            # An interrupt must not leave it reading what is about to be reused.
            work.join()
    return 0


cdef struct TwoTallies:
    void *first
    void *second
    Piece *pieces
    Py_ssize_t shared
    Py_ssize_t last
    int spectra


cdef void half_of_tensors(void *data, int number) noexcept nogil:
    """The second half goes backwards, so that the tensor that they share is the last of both."""
    cdef TwoTallies *two = <TwoTallies *>data
    if number == 0:
        (<Tally>two.first).run(two.pieces, two.shared + 1, 1, two.spectra)
    else:
        (<Tally>two.second).run(two.pieces + two.last, two.last - two.shared, -1, two.spectra)


cdef class GradientTally(Tensors):
    """Measures the gradients of one clip group; not to be shared between threads.

    ``numels`` and ``dtypes`` are those of its tensors.
    """

    cdef Piece *present
    cdef Tally tally, second

    def __init__(self, numels, dtypes):
        # One more, for the half of a tensor that is divided between threads.
        self.present = <Piece *>calloc(self.tensors + 2, sizeof(Piece))
        if not self.present:
            raise MemoryError

    def __dealloc__(self):
        free(self.present)

    def measure(self, list pointers not None, int spectra, bint divided=False):
        """``(data, group bins, tensor bins)`` of the tensors at these addresses; 0 is a tensor without a gradient.

        ``data`` holds, one after the other: sum_squares and max_abs (float64), zeros, nan and inf (int64) [tensors];
        count (uint32), mean and spread (float32) of the group's bins, then of the tensors'; how many bins each tensor
        has (int32); and the codes (uint16) of both.  ``spectra``: 0 none, 1 the group's, 2 the tensors' too.
        ``divided``: between two threads, if they are large.
        """
        cdef Py_ssize_t n = self.point(pointers, self.present, False), cut = self.tensors
        cdef Py_ssize_t i
        cdef Tally tally = self.tally or Tally(self.tensors)
        # An interrupt leaves half-filled tables, which then are no longer anybody's.
        self.tally = None
        for i in range(self.tensors):
            tally.totals[i] = Totals(NAN, 0.0, 0, 0, 0, 0)
        for i in range(n):
            tally.totals[self.present[i].tensor].squares = 0.0
        if divided and self.elements > TWO_THREADS:
            cut = self.measure_in_two(tally, n, spectra)
        elif self.elements > GIL_ELEMENTS:
            with nogil:
                tally.run(self.present, n, 1, spectra)
        else:
            tally.run(self.present, n, 1, spectra)
        if spectra:
            tally.store(self.tensors, &tally.group)
            clear(&tally.group)
        if tally.no_memory or (cut < self.tensors and self.second.no_memory):
            raise MemoryError
        data = self.pack(tally, cut, spectra)
        self.tally = tally
        return data

    cdef void measure_copy(self, Tally tally, Copy copy, int spectra, Columns *out, Head *head) noexcept nogil:
        """What ``measure`` does, of a copy; appends to the columns."""
        cdef Py_ssize_t n = 0, i
        for i in range(self.tensors):
            tally.totals[i] = Totals(NAN, 0.0, 0, 0, 0, 0)
            if copy.held[i]:
                tally.totals[i].squares = 0.0
                self.present[n] = self.pieces[i]
                self.present[n].tensor = i
                self.present[n].data = copy.held[i]
                self.present[n].whole = True
                n += 1
        tally.run(self.present, n, 1, spectra)
        if spectra:
            tally.store(self.tensors, &tally.group)
            clear(&tally.group)
        self.append(tally, spectra, out, head)

    cdef void append(self, Tally tally, int spectra, Columns *out, Head *head) noexcept nogil:
        cdef Py_ssize_t n = self.tensors, i, column
        cdef size_t of_group = tally.sizes[n] if spectra else 0, of_tensors = 0
        cdef double *squares = <double *>more(&out.column[SUM_SQUARES], 8 * n)
        cdef uint64_t *most = <uint64_t *>more(&out.column[MAX_ABS], 8 * n)
        cdef uint64_t *zeros = <uint64_t *>more(&out.column[ZEROS], 8 * n)
        cdef uint64_t *nan = <uint64_t *>more(&out.column[NAN_COUNT], 8 * n)
        cdef uint64_t *inf = <uint64_t *>more(&out.column[INF_COUNT], 8 * n)
        cdef int32_t *sizes
        cdef char *at
        if not (squares and most and zeros and nan and inf) or tally.no_memory:
            out.no_memory = True
            return
        for i in range(n):
            squares[i] = tally.totals[i].squares + tally.totals[i].lost
            most[i] = tally.totals[i].most
            zeros[i] = tally.totals[i].zeros
            nan[i] = tally.totals[i].nan
            inf[i] = tally.totals[i].inf
        if spectra == 2:
            sizes = <int32_t *>more(&out.column[TENSOR_BIN_COUNTS], 4 * n)
            if not sizes:
                out.no_memory = True
                return
            for i in range(n):
                if tally.totals[i].squares != tally.totals[i].squares:
                    tally.sizes[i] = 0
                sizes[i] = <int32_t>tally.sizes[i]
                of_tensors += tally.sizes[i]
        for column in range(4):
            at = more(&out.column[GROUP_COUNT + column], of_group * (2 if column == 3 else 4))
            if not at:
                out.no_memory = True
                return
            if spectra:
                copy_column(at, tally, n, <int>column)
            at = more(&out.column[TENSOR_COUNT + column], of_tensors * (2 if column == 3 else 4))
            if not at:
                out.no_memory = True
                return
            for i in range(n if spectra == 2 else 0):
                at = copy_column(at, tally, i, <int>column)
        head.tensors = <int32_t>n
        head.group_bins = <int32_t>of_group
        head.counts = <int32_t>n if spectra == 2 else 0
        head.tensor_bins = <int32_t>of_tensors

    cdef Py_ssize_t measure_in_two(self, Tally tally, Py_ssize_t n, int spectra) except -1:
        """Measures each half of the elements in a thread; returns the last tensor whose bins ``tally`` has."""
        cdef TwoTallies two
        cdef Piece *pieces = self.present
        cdef uint64_t first = self.elements // 2
        cdef Py_ssize_t shared = 0, i
        cdef Tally second = self.second or Tally(self.tensors)
        self.second = None
        while first >= pieces[shared].numel:
            first -= pieces[shared].numel
            shared += 1
        for i in range(n, shared, -1):
            pieces[i] = pieces[i - 1]
        pieces[shared].numel = first
        pieces[shared].whole = False
        pieces[shared + 1].numel -= first
        pieces[shared + 1].data += first * pieces[shared].itemsize
        pieces[shared + 1].whole = False
        for i in range(shared + 1, n + 1):
            second.totals[pieces[i].tensor] = Totals(0.0, 0.0, 0, 0, 0, 0)
        two.first, two.second, two.pieces = <void *>tally, <void *>second, pieces
        two.shared, two.last, two.spectra = shared, n, spectra
        in_two_threads(half_of_tensors, &two)
        for i in range(shared + 1, n + 1):
            add_totals(&tally.totals[pieces[i].tensor], &second.totals[pieces[i].tensor])
        if spectra == 2:
            move(&second.tensor, &tally.tensor)
            tally.store(pieces[shared].tensor, &tally.tensor)
            move(&tally.tensor, &tally.group)
        move(&second.group, &tally.group)
        self.second = second
        return pieces[shared].tensor

    cdef pack(self, Tally tally, Py_ssize_t cut, int spectra):
        cdef Py_ssize_t n = self.tensors, i, column
        cdef size_t of_group = tally.sizes[n] if spectra else 0, of_tensors = 0, size
        cdef Tally stored
        cdef double *totals
        cdef int64_t *counts
        cdef char *at
        cdef int32_t *sizes
        if spectra == 2:
            for i in range(n):
                stored = tally if i <= cut else self.second
                if tally.totals[i].squares != tally.totals[i].squares:
                    stored.sizes[i] = 0
                of_tensors += stored.sizes[i]
        size = 40 * n + 14 * (of_group + of_tensors) + (4 * n if spectra == 2 else 0)
        data = PyBytes_FromStringAndSize(NULL, size)
        totals = <double *>PyBytes_AS_STRING(data)
        counts = <int64_t *>(totals + 2 * n)
        for i in range(n):
            totals[i] = tally.totals[i].squares + tally.totals[i].lost
            memcpy(&totals[n + i], &tally.totals[i].most, 8)
            counts[i] = <int64_t>tally.totals[i].zeros
            counts[n + i] = <int64_t>tally.totals[i].nan
            counts[2 * n + i] = <int64_t>tally.totals[i].inf
        at = <char *>(counts + 3 * n)
        for column in range(3):
            at = copy_column(at, tally, n, column) if spectra else at
        for column in range(3 if spectra == 2 else 0):
            for i in range(n):
                at = copy_column(at, tally if i <= cut else self.second, i, column)
        if spectra == 2:
            sizes = <int32_t *>at
            for i in range(n):
                sizes[i] = <int32_t>(tally if i <= cut else self.second).sizes[i]
            at += 4 * n
        at = copy_column(at, tally, n, 3) if spectra else at
        for i in range(n if spectra == 2 else 0):
            at = copy_column(at, tally if i <= cut else self.second, i, 3)
        return data, of_group, of_tensors


cdef void add_totals(Totals *to, const Totals *more) noexcept nogil:
    if to.squares + more.squares < NO_SQUARES:
        add_compensated(&to.squares, &to.lost, more.squares)
        to.lost += more.lost
    else:
        to.squares = NO_SQUARES
        to.lost = 0.0
    if more.most > to.most:
        to.most = more.most
    to.zeros += more.zeros
    to.nan += more.nan
    to.inf += more.inf


cdef class FineMoments:
    """Stores bins whose moments were taken elsewhere."""

    cdef Tally tally

    def __init__(self):
        self.tally = Tally(0)

    def store(
        self,
        const int64_t[::1] code not None,
        const double[::1] count not None,
        const double[::1] sum not None,
        const double[::1] squares not None,
    ):
        """``(data, bins)``: the columns count (uint32), mean, spread (float32) and code (uint16), one after the other.

        ``code`` are fine bins in [0, 16384), each once; beside each its elements and the sums of their position in it
        (from 0 to 1) and of the square of that.
        """
        cdef Py_ssize_t i
        cdef size_t n
        cdef gm_bin *bin
        cdef Tally tally = self.tally
        cdef char *at
        for i in range(code.shape[0]):
            if not 0 <= code[i] < BINS64:
                raise ValueError(f"{code[i]} is no fine bin")
        for i in range(code.shape[0]):
            if count[i] > 0.0:
                bin = &tally.group.bins[code[i]]
                bin.count = <uint64_t>count[i]
                bin.sum = sum[i]
                bin.squares = squares[i]
                reach(&tally.group, code[i], code[i])
        tally.stored_size = 0
        n = tally.store(0, &tally.group)
        clear(&tally.group)
        if tally.no_memory:
            tally.no_memory = False
            raise MemoryError
        data = PyBytes_FromStringAndSize(NULL, 14 * n)
        at = PyBytes_AS_STRING(data)
        for i in range(3):
            at = copy_column(at, tally, 0, <int>i)
        copy_column(at, tally, 0, 3)
        return data, n


cdef double norm_and_copy(const Piece *piece, char *copy, uint32_t *room) noexcept nogil:
    """The L2 norm of all elements, NaN and Inf included; copies them unless ``copy`` is NULL."""
    cdef uint64_t at = 0
    cdef size_t size
    cdef const char *data
    cdef block_sums block
    cdef double total = 0.0
    while at < piece.numel:
        size = BLOCK if piece.numel - at > BLOCK else piece.numel - at
        data = piece.data + at * piece.itemsize
        if piece.kind == FLOAT64:
            gm_block64(aligned64(data, size, room), size, &block)
        else:
            gm_block32(widened(data, size, piece.kind, room), size, &block)
        total += block.squares
        if copy != NULL:
            gm_copy(copy + at * piece.itemsize, data, size * piece.itemsize)
        at += size
    gm_copied()
    return sqrt(total)


cdef double distance(const Piece *piece, const char *other, uint32_t *room, uint32_t *room2) noexcept nogil:
    """The L2 norm of the difference to the elements at ``other``."""
    cdef uint64_t at = 0
    cdef size_t size
    cdef const char *data
    cdef const char *data2
    cdef double total = 0.0
    while at < piece.numel:
        size = BLOCK if piece.numel - at > BLOCK else piece.numel - at
        data = piece.data + at * piece.itemsize
        data2 = other + at * piece.itemsize
        if piece.kind == FLOAT64:
            total += gm_difference64(
                <const double *>aligned64(data, size, room), <const double *>aligned64(data2, size, room2), size
            )
        else:
            total += gm_difference32(
                <const float *>widened(data, size, piece.kind, room),
                <const float *>widened(data2, size, piece.kind, room2),
                size,
            )
        at += size
    return sqrt(total)


cdef class UpdateTally(Tensors):
    """The norms of weights, and of what an optimizer step changes in them.

    At most ``limit`` bytes are copied at a time: of more, every call takes the next tensors in turn, and one that is
    larger by itself never.
    """

    cdef Piece *present
    cdef char *memory
    cdef char *copy
    cdef int64_t *where
    cdef readonly size_t limit
    cdef size_t room
    cdef Py_ssize_t turn
    # Of two threads.
    cdef uint32_t *rooms
    # Of the call under way.
    cdef double *out
    cdef int cut, end
    cdef bint of_changes

    def __init__(self, numels, dtypes, limit=256 << 20):
        cdef Py_ssize_t i
        cdef size_t wanted = 0
        self.limit = limit
        for i in range(self.tensors):
            wanted += self.bytes_of(i)
        self.room = wanted if wanted < self.limit else self.limit
        self.present = <Piece *>calloc(self.tensors + 1, sizeof(Piece))
        self.where = <int64_t *>malloc(8 * (self.tensors + 1))
        self.rooms = <uint32_t *>malloc(32 * BLOCK)
        self.memory = <char *>malloc(self.room + 64)
        if not (self.present and self.where and self.rooms and self.memory):
            raise MemoryError
        self.copy = self.memory + 64 - <size_t>self.memory % 64
        for i in range(self.tensors):
            self.where[i] = -1

    def __dealloc__(self):
        free(self.present)
        free(self.where)
        free(self.rooms)
        free(self.memory)

    cdef size_t bytes_of(self, Py_ssize_t i) noexcept nogil:
        """Rounded up, so that copies stay aligned."""
        return (self.pieces[i].numel * self.pieces[i].itemsize + 63) & ~<size_t>63

    def before(self, list pointers not None, bint divided=False):
        """The norm of every tensor, NaN where its address is 0, as the bytes of float64; copies what has its turn.

        ``divided``: between two threads, if they are large.
        """
        cdef int n = self.point(pointers, self.present, True)
        self.plan_copies(n)
        return self.norms(n, False, divided)

    def after(self, list pointers not None, bint divided=False):
        """The norm of every tensor's change since ``before``, as the bytes of float64; NaN where it was not copied."""
        return self.norms(self.point(pointers, self.present, True), True, divided)

    cdef norms(self, int n, bint of_changes, bint divided):
        cdef Py_ssize_t i
        cdef uint64_t first = 0
        norms = PyBytes_FromStringAndSize(NULL, 8 * self.tensors)
        cdef double *out = <double *>PyBytes_AS_STRING(norms)
        for i in range(self.tensors):
            out[i] = NAN
        self.out, self.end, self.cut, self.of_changes = out, n, 0, of_changes
        if divided and self.elements > TWO_THREADS:
            while first < self.elements // 2:
                first += self.present[self.cut].numel
                self.cut += 1
            in_two_threads(half_of_norms, <void *>self)
        else:
            with nogil:
                self.run(0, n, self.rooms)
        return norms

    cdef void run(self, int first, int end, uint32_t *rooms) noexcept nogil:
        cdef const Piece *piece
        cdef char *copy
        cdef int i
        for i in range(first, end):
            piece = &self.present[i]
            copy = NULL if self.where[piece.tensor] < 0 else self.copy + self.where[piece.tensor]
            if not self.of_changes:
                self.out[piece.tensor] = norm_and_copy(piece, copy, rooms)
            elif copy != NULL:
                self.out[piece.tensor] = distance(piece, copy, rooms, rooms + 2 * BLOCK)

    cdef void plan_copies(self, int n) noexcept nogil:
        """Settles which tensors are copied, and where to."""
        cdef size_t used = 0, size
        cdef int i, first = 0
        cdef Py_ssize_t tensor, next_turn = -1
        for tensor in range(self.tensors):
            self.where[tensor] = -1
        while first < n and self.present[first].tensor < self.turn:
            first += 1
        for i in range(n):
            tensor = self.present[(first + i) % n].tensor
            size = self.bytes_of(tensor)
            if used + size <= self.room:
                self.where[tensor] = used
                used += size
            elif size <= self.room and next_turn < 0:
                next_turn = tensor
        self.turn = next_turn if next_turn >= 0 else 0


cdef void half_of_norms(void *of, int number) noexcept nogil:
    if number == 0:
        (<UpdateTally>of).run(0, (<UpdateTally>of).cut, (<UpdateTally>of).rooms)
    else:
        (<UpdateTally>of).run((<UpdateTally>of).cut, (<UpdateTally>of).end, (<UpdateTally>of).rooms + 4 * BLOCK)


include "row_batch.pxi"
include "steady_steps.pxi"
