# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Raw buffers of any float dtype -> magnitude counts and exact sums; the only compiled code.

A ``Scanner`` is fed buffers or pieces of a file and then emptied with ``take``, which gives its non-empty bins:

* float32: a bin is the 15 bits below the sign (8 exponent, 7 mantissa), 128 bins an octave; subnormals are binned on
  the same relative grid.  A table entry takes ``2**40 + magnitude bits`` per element, which keeps the count and, since
  the magnitude is linear in the low 16 bits, the exact sum of the bin.
* float64: the same with 11 + 7 bits, count and low bits side by side (subnormals are not refined).
* 16 bits and fewer: a bin is one value, so the counts are the whole distribution.

``clip_sums`` adds up what clip-by-value needs from such bins.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EINTR, errno
from libc.math cimport INFINITY, ldexp, sqrt
from libc.stdint cimport SIZE_MAX, UINT16_MAX, UINT32_MAX, UINT64_MAX, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

import os

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    #ifdef _WIN32
    #include <errno.h>
    static long long gs_pread(int fd, void *to, size_t n, long long at)
    { (void)fd; (void)to; (void)n; (void)at; errno = ENOSYS; return -1; }
    #else
    #include <unistd.h>
    static long long gs_pread(int fd, void *to, size_t n, long long at) { return pread(fd, to, n, (off_t)at); }
    #endif

    #define BLOCK_SUMS gs_squares32
    #define WORD uint32_t
    #define REAL float
    #define WORD_MAX UINT32_MAX
    #define MAGNITUDE 0x7fffffffu
    #define COUNT_ZEROS 0
    #include "block_sums.h"
    #define BLOCK_SUMS gs_squares64
    #define WORD uint64_t
    #define REAL double
    #define WORD_MAX UINT64_MAX
    #define MAGNITUDE 0x7fffffffffffffffull
    #define COUNT_ZEROS 0
    #include "block_sums.h"

    VECTORS static void gs_range16(const uint16_t *RESTRICT x, size_t n, uint32_t *max, uint32_t *min)
    {
        uint16_t hi = 0, lo = UINT16_MAX;
        size_t i;
        for (i = 0; i < n; i++) {
            uint16_t m = x[i] & 0x7fff, below = m - 1;
            hi = hi > m ? hi : m;
            lo = lo < below ? lo : below;
        }
        *max = hi;
        *min = lo;
    }

    #define GS_TALLY32(table, bits) { uint32_t m_ = (bits) & 0x7fffffffu; (table)[m_ >> 16] += GS_ONE32 + m_; }
    #define GS_ONE32 (1ull << 40)

    /* Two tables, so that equal neighbours do not wait for each other's store. */
    static void gs_tally32(const uint32_t *x, size_t n, uint64_t *RESTRICT even, uint64_t *RESTRICT odd)
    {
        size_t i, whole = n - n % 8;
        int j;
        for (i = 0; i < whole; i += 8)
            for (j = 0; j < 8; j += 2) {
                GS_TALLY32(even, x[i + j])
                GS_TALLY32(odd, x[i + j + 1])
            }
        for (; i < n; i++) GS_TALLY32(even, x[i])
    }

    typedef struct { uint64_t count, low; } gs_entry64;

    #define GS_LOW64 ((1ull << 45) - 1)
    #define GS_INF64 0x7ff0000000000000ull
    #define GS_ABS64 0x7fffffffffffffffull

    static void gs_tally64(const uint64_t *x, size_t n, gs_entry64 *table)
    {
        size_t i;
        for (i = 0; i < n; i++) {
            gs_entry64 *entry = table + (x[i] >> 45 & 0x3ffff);
            entry->count += 1;
            entry->low += x[i] & GS_LOW64;
        }
    }

    static void gs_tally16(const uint16_t *x, size_t n, uint32_t *RESTRICT even, uint32_t *RESTRICT odd)
    {
        size_t i, whole = n - n % 8;
        int j;
        for (i = 0; i < whole; i += 8)
            for (j = 0; j < 8; j += 2) {
                even[x[i + j] & 0x7fff]++;
                odd[x[i + j + 1] & 0x7fff]++;
            }
        for (; i < n; i++) even[x[i] & 0x7fff]++;
    }

    static void gs_tally8(const uint8_t *x, size_t n, uint32_t *RESTRICT even, uint32_t *RESTRICT odd)
    {
        size_t i, whole = n - n % 8;
        int j;
        for (i = 0; i < whole; i += 8)
            for (j = 0; j < 8; j += 2) {
                even[x[i + j] & 0x7f]++;
                odd[x[i + j + 1] & 0x7f]++;
            }
        for (; i < n; i++) even[x[i] & 0x7f]++;
    }
    """
    ctypedef struct gs_entry64:
        uint64_t count
        uint64_t low
    const uint64_t GS_ONE32
    const uint64_t GS_LOW64
    const uint64_t GS_INF64
    const uint64_t GS_ABS64
    long long gs_pread(int fd, void *to, size_t n, long long at) nogil
    ctypedef struct block_sums:
        double squares
        uint64_t most
        uint64_t least
    void gs_squares32(const uint32_t *x, size_t n, block_sums *out) nogil
    void gs_squares64(const uint64_t *x, size_t n, block_sums *out) nogil
    void gs_range16(const uint16_t *x, size_t n, uint32_t *max, uint32_t *min) nogil
    void gs_tally32(const uint32_t *x, size_t n, uint64_t *even, uint64_t *odd) nogil
    void gs_tally64(const uint64_t *x, size_t n, gs_entry64 *table) nogil
    void gs_tally16(const uint16_t *x, size_t n, uint32_t *even, uint32_t *odd) nogil
    void gs_tally8(const uint8_t *x, size_t n, uint32_t *even, uint32_t *odd) nogil


cdef enum:
    FLOAT64 = 0
    FLOAT32 = 1
    SHORT = 2
    BYTE = 3
    BLOCK_BYTES = 8192
    READ_BYTES = 1 << 20
    BINS32 = 32768
    BINS64 = 262144
    SUBNORMAL_BINS = 2944
    # Without the gap both tables would compete for the same cache sets.
    GAP = 64
    GIL_BYTES = 65536

# An entry of 64 bits holds fewer than 2**24 elements.
cdef size_t FLUSH32 = 1 << 23
cdef size_t FLUSH64 = (1 << 19) - BLOCK_BYTES
cdef size_t FLUSH16 = (1ull << 32) - 1 - BLOCK_BYTES


cdef struct Format:
    int kind
    int itemsize
    int mantissa_bits
    int bias
    uint32_t first_nonfinite
    bint has_inf


cdef dict FORMATS = {
    # name: kind, bytes, mantissa bits, exponent bias, smallest non-finite magnitude, has infinities
    "float64": (FLOAT64, 8, 52, 1023, 0, True),
    "float32": (FLOAT32, 4, 23, 127, 0, True),
    "float16": (SHORT, 2, 10, 15, 0x7C00, True),
    "bfloat16": (SHORT, 2, 7, 127, 0x7F80, True),
    "float8_e4m3fn": (BYTE, 1, 3, 7, 0x7F, False),
    "float8_e5m2": (BYTE, 1, 2, 15, 0x7C, True),
}


cdef inline double power_of_two(int exponent) noexcept nogil:
    """2**exponent of a normal double, without a call."""
    cdef uint64_t bits = <uint64_t>(exponent + 1023) << 52
    cdef double value
    memcpy(&value, &bits, 8)
    return value


cdef inline void add_compensated(double *total, double *lost, double x) noexcept nogil:
    """Knuth's two-sum: ``total + lost`` is the sum to about one rounding."""
    cdef double t = total[0] + x
    cdef double part = t - total[0]
    lost[0] += (total[0] - (t - part)) + (x - part)
    total[0] = t


cdef class Scanner:
    """Collects the magnitude bins of one tensor of ``dtype``; ``take`` empties it for the next.

    Not to be shared between threads; every method that reads elements releases the GIL for long inputs.
    """

    cdef Format format
    cdef readonly str dtype
    cdef uint64_t elements, nan, inf, tiny
    cdef double squares, squares_lost
    cdef uint64_t max_bits
    # The bins that may hold something, besides bin 0 (the zeros).
    cdef size_t first, last
    cdef size_t pending
    cdef bint subnormals
    cdef uint64_t *table32
    cdef uint64_t *low32
    cdef uint64_t *subnormal32
    cdef gs_entry64 *table64
    cdef uint64_t *carry64
    cdef uint32_t *table16
    cdef uint64_t *count
    cdef double *out
    cdef size_t out_capacity
    cdef char *read_buffer

    def __cinit__(self, str dtype not None):
        if dtype not in FORMATS:
            raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(FORMATS)}")
        self.dtype = dtype
        kind, itemsize, mantissa_bits, bias, first_nonfinite, has_inf = FORMATS[dtype]
        self.format.kind = kind
        self.format.itemsize = itemsize
        self.format.mantissa_bits = mantissa_bits
        self.format.bias = bias
        self.format.first_nonfinite = first_nonfinite
        self.format.has_inf = has_inf
        self.first = SIZE_MAX
        cdef size_t bins = BINS32
        if kind == FLOAT32:
            self.table32 = <uint64_t *>calloc(2 * BINS32 + GAP, 8)
            self.low32 = <uint64_t *>calloc(BINS32, 8)
            self.subnormal32 = <uint64_t *>calloc(2 * SUBNORMAL_BINS, 8)
            self.count = <uint64_t *>calloc(BINS32, 8)
            self.out_capacity = BINS32 + SUBNORMAL_BINS
            if not (self.table32 and self.low32 and self.subnormal32 and self.count):
                raise MemoryError
        elif kind == FLOAT64:
            self.table64 = <gs_entry64 *>calloc(BINS64, sizeof(gs_entry64))
            self.carry64 = <uint64_t *>calloc(2 * BINS64, 8)
            self.count = <uint64_t *>calloc(BINS64, 8)
            self.out_capacity = BINS64
            if not (self.table64 and self.carry64 and self.count):
                raise MemoryError
        else:
            if kind == BYTE:
                bins = 128
            self.table16 = <uint32_t *>calloc(2 * bins + GAP, 4)
            self.count = <uint64_t *>calloc(bins, 8)
            self.out_capacity = bins
            if not (self.table16 and self.count):
                raise MemoryError
        self.out = <double *>malloc(4 * 8 * self.out_capacity)
        if not self.out:
            raise MemoryError

    def __dealloc__(self):
        free(self.table32)
        free(self.low32)
        free(self.subnormal32)
        free(self.table64)
        free(self.carry64)
        free(self.table16)
        free(self.count)
        free(self.out)
        free(self.read_buffer)

    def feed(self, buffer):
        """Adds the elements of a C-contiguous ``buffer`` (native byte order, any alignment).

        Raises ValueError where its length is no multiple of the item size.
        """
        cdef Py_buffer view
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
        try:
            if view.len % self.format.itemsize:
                raise ValueError(f"{view.len} bytes are no whole number of {self.dtype} elements")
            if <size_t>view.buf % self.format.itemsize:
                self.need_read_buffer()
            if view.len < GIL_BYTES:
                self.scan(<const char *>view.buf, view.len)
            else:
                with nogil:
                    self.scan(<const char *>view.buf, view.len)
        finally:
            PyBuffer_Release(&view)

    def feed_file(self, int fd, long long offset, long long nbytes):
        """Adds ``nbytes`` bytes of the file ``fd`` from ``offset`` on (little endian, the machine's own order).

        Raises EOFError where the file ends before, OSError where it cannot be read.
        """
        cdef long long missing
        if nbytes % self.format.itemsize:
            raise ValueError(f"{nbytes} bytes are no whole number of {self.dtype} elements")
        self.need_read_buffer()
        with nogil:
            missing = self.scan_file(fd, offset, nbytes)
        if missing < 0:
            raise OSError(-missing, os.strerror(-missing))
        if missing:
            raise EOFError(f"the file ends {missing} bytes early")

    cdef int need_read_buffer(self) except -1:
        if not self.read_buffer:
            self.read_buffer = <char *>malloc(READ_BYTES)
            if not self.read_buffer:
                raise MemoryError
        return 0

    cdef long long scan_file(self, int fd, long long offset, long long nbytes) noexcept nogil:
        """Returns 0, the number of bytes that the file lacks, or -errno."""
        cdef long long got, want
        cdef size_t have
        while nbytes > 0:
            want = nbytes if nbytes < READ_BYTES else READ_BYTES
            have = 0
            while <long long>have < want:
                got = gs_pread(fd, self.read_buffer + have, want - have, offset + <long long>have)
                if got < 0:
                    if errno == EINTR:
                        continue
                    return -errno
                if got == 0:
                    return nbytes - <long long>have
                have += got
            self.scan(self.read_buffer, have)
            offset += want
            nbytes -= want
        return 0

    cdef void scan(self, const char *data, size_t nbytes) noexcept nogil:
        cdef const char *block
        cdef size_t at = 0, size
        cdef bint misaligned = <size_t>data % self.format.itemsize != 0
        while at < nbytes:
            size = nbytes - at if nbytes - at < BLOCK_BYTES else BLOCK_BYTES
            block = data + at
            if misaligned:
                memcpy(self.read_buffer, block, size)
                block = self.read_buffer
            if self.format.kind == FLOAT32:
                self.scan_float32(<const uint32_t *>block, size // 4)
            elif self.format.kind == FLOAT64:
                self.scan_float64(<const uint64_t *>block, size // 8)
            elif self.format.kind == SHORT:
                self.scan_short(<const uint16_t *>block, size // 2)
            else:
                self.scan_byte(<const uint8_t *>block, size)
            at += size

    cdef inline void touch(self, size_t first, size_t last, size_t n) noexcept nogil:
        """Notes n elements whose non-zero magnitudes lie in these bins (``first`` is SIZE_MAX where there are none)."""
        if first < self.first:
            self.first = first
        if last > self.last:
            self.last = last
        self.elements += n
        self.pending += n

    cdef inline size_t after(self, size_t i) noexcept nogil:
        return i + 1 if i >= self.first else self.first

    # --- float32 ---

    cdef void scan_float32(self, const uint32_t *x, size_t n) noexcept nogil:
        cdef block_sums block
        cdef double sum
        cdef uint32_t top, bottom
        if self.pending > FLUSH32:
            self.flush_float32()
        gs_squares32(x, n, &block)
        sum, top, bottom = block.squares, <uint32_t>block.most, <uint32_t>block.least
        gs_tally32(x, n, self.table32, self.table32 + BINS32 + GAP)
        if top >= 0x7F800000 or bottom < 0x007FFFFF:
            self.correct_float32(x, n, &sum, &top, &bottom)
        if top > self.max_bits:
            self.max_bits = top
        add_compensated(&self.squares, &self.squares_lost, sum)
        self.touch(SIZE_MAX if bottom == UINT32_MAX else (bottom + 1) >> 16, top >> 16, n)

    cdef void correct_float32(
        self, const uint32_t *x, size_t n, double *sum, uint32_t *top, uint32_t *bottom
    ) noexcept nogil:
        """Takes NaN, Inf and subnormals of a block out of the table and counts them where they belong."""
        cdef size_t i
        cdef uint32_t m, scaled, bin
        cdef float f, whole
        cdef double value, lost = 0.0
        sum[0] = 0.0
        top[0] = 0
        bottom[0] = UINT32_MAX
        for i in range(n):
            m = x[i] & 0x7FFFFFFF
            if m >= 0x7F800000:
                self.table32[m >> 16] -= GS_ONE32 + m
                if m > 0x7F800000:
                    self.nan += 1
                else:
                    self.inf += 1
                continue
            memcpy(&f, &m, 4)
            # By way of the integer, since somebody may have told the processor to take subnormals for zeros.
            value = <double>m * power_of_two(-149) if m < 0x00800000 else <double>f
            add_compensated(sum, &lost, value * value)
            if m > top[0]:
                top[0] = m
            if m == 0:
                continue
            if m < 0x00800000:
                self.table32[m >> 16] -= GS_ONE32 + m
                whole = <float>m
                memcpy(&scaled, &whole, 4)
                bin = (scaled >> 16) - (127 << 7)
                self.subnormal32[2 * bin] += 1
                self.subnormal32[2 * bin + 1] += scaled & 0xFFFF
                self.subnormals = True
            elif m - 1 < bottom[0]:
                bottom[0] = m - 1
        sum[0] += lost

    cdef void flush_float32(self) noexcept nogil:
        cdef size_t i = 0
        while i <= self.last:
            self.flush_float32_bin(i)
            i = self.after(i)
        self.pending = 0

    cdef inline void flush_float32_bin(self, size_t i) noexcept nogil:
        # The two halves may have borrowed from each other in correct_float32; their sum has not.
        cdef uint64_t entry = self.table32[i] + self.table32[BINS32 + GAP + i]
        cdef uint64_t one = GS_ONE32 + (<uint64_t>i << 16)
        if entry:
            self.count[i] += entry // one
            self.low32[i] += entry % one
            self.table32[i] = 0
            self.table32[BINS32 + GAP + i] = 0

    cdef inline void emit(self, size_t k, double lower, double upper, double sum, uint64_t count) noexcept nogil:
        cdef size_t capacity = self.out_capacity
        self.out[k] = lower
        self.out[capacity + k] = upper
        self.out[2 * capacity + k] = sum
        (<int64_t *>self.out)[3 * capacity + k] = <int64_t>count

    cdef size_t emit_float32(self, uint64_t *zeros) noexcept nogil:
        cdef size_t k = 0, i = 0
        cdef uint64_t base
        cdef double unit
        self.flush_float32()
        zeros[0] = self.count[0]
        self.count[0] = 0
        if self.subnormals:
            k = self.emit_subnormals()
        while i <= self.last:
            if self.count[i]:
                base = <uint64_t>(128 | (i & 127)) << 16
                unit = power_of_two(<int>(i >> 7) - 150)
                self.emit(
                    k,
                    <double>base * unit,
                    <double>(base + 0xFFFF) * unit,
                    <double>(self.count[i] * base + self.low32[i]) * unit,
                    self.count[i],
                )
                k += 1
                self.count[i] = 0
                self.low32[i] = 0
            i = self.after(i)
        return k

    cdef size_t emit_subnormals(self) noexcept nogil:
        cdef size_t k = 0, i
        cdef int exponent
        cdef uint64_t base
        cdef double unit, lower
        for i in range(<size_t>SUBNORMAL_BINS):
            if self.subnormal32[2 * i]:
                exponent = <int>(i >> 7)
                base = <uint64_t>(128 | (i & 127)) << 16
                unit = power_of_two(exponent - 23 - 149)
                lower = <double>base * unit
                self.emit(
                    k,
                    lower,
                    # Subnormals are whole multiples of 2**-149.
                    lower if exponent <= 7 else lower + power_of_two(exponent - 7 - 149) - power_of_two(-149),
                    <double>(self.subnormal32[2 * i] * base + self.subnormal32[2 * i + 1]) * unit,
                    self.subnormal32[2 * i],
                )
                k += 1
                self.subnormal32[2 * i] = 0
                self.subnormal32[2 * i + 1] = 0
        self.subnormals = False
        return k

    # --- float64 ---

    cdef void scan_float64(self, const uint64_t *x, size_t n) noexcept nogil:
        cdef block_sums block
        cdef double sum
        cdef uint64_t top, bottom
        if self.pending > FLUSH64:
            self.flush_float64()
        gs_squares64(x, n, &block)
        sum, top, bottom = block.squares, block.most, block.least
        gs_tally64(x, n, self.table64)
        if top >= GS_INF64 or bottom < GS_LOW64:
            self.correct_float64(x, n, &sum, &top)
        if top > self.max_bits:
            self.max_bits = top
        add_compensated(&self.squares, &self.squares_lost, sum)
        self.touch(SIZE_MAX if bottom == UINT64_MAX else (bottom + 1) >> 45, top >> 45, n)

    cdef void correct_float64(self, const uint64_t *x, size_t n, double *sum, uint64_t *top) noexcept nogil:
        """Takes NaN and Inf of a block out of the table and counts the non-zero elements of bin 0."""
        cdef size_t i
        cdef uint64_t m
        cdef double f
        cdef double lost = 0.0
        sum[0] = 0.0
        top[0] = 0
        for i in range(n):
            m = x[i] & GS_ABS64
            if m >= GS_INF64:
                self.table64[m >> 45].count -= 1
                self.table64[m >> 45].low -= m & GS_LOW64
                if m > GS_INF64:
                    self.nan += 1
                else:
                    self.inf += 1
                continue
            memcpy(&f, &m, 8)
            add_compensated(sum, &lost, f * f)
            if m > top[0]:
                top[0] = m
            if m > 0 and m <= GS_LOW64:
                self.tiny += 1
        if sum[0] < INFINITY:
            sum[0] += lost

    cdef void flush_float64(self) noexcept nogil:
        cdef size_t i = 0
        cdef uint64_t low
        while i <= self.last:
            if self.table64[i].count:
                self.count[i] += self.table64[i].count
                low = self.carry64[2 * i] + self.table64[i].low
                if low < self.carry64[2 * i]:
                    self.carry64[2 * i + 1] += 1
                self.carry64[2 * i] = low
                self.table64[i].count = 0
                self.table64[i].low = 0
            i = self.after(i)
        self.pending = 0

    cdef size_t emit_float64(self, uint64_t *zeros) noexcept nogil:
        cdef size_t k = 0, i = 0
        cdef uint64_t bits
        cdef double lower, upper, low
        self.flush_float64()
        zeros[0] = self.count[0] - self.tiny
        self.count[0] = self.tiny
        while i <= self.last:
            if self.count[i]:
                bits = <uint64_t>i << 45
                memcpy(&lower, &bits, 8)
                bits |= GS_LOW64
                memcpy(&upper, &bits, 8)
                low = <double>self.carry64[2 * i + 1] * 18446744073709551616.0 + <double>self.carry64[2 * i]
                low = ldexp(low, (<int>(i >> 7) if i >= 128 else 1) - 1075)
                self.emit(k, lower if i else ldexp(1.0, -1074), upper, <double>self.count[i] * lower + low, self.count[i])
                k += 1
                self.count[i] = 0
                self.carry64[2 * i] = 0
                self.carry64[2 * i + 1] = 0
            i = self.after(i)
        return k

    # --- 16 and 8 bits ---

    cdef void scan_short(self, const uint16_t *x, size_t n) noexcept nogil:
        cdef uint32_t top, bottom
        if self.pending > FLUSH16:
            self.flush_counts(BINS32)
        gs_range16(x, n, &top, &bottom)
        gs_tally16(x, n, self.table16, self.table16 + BINS32 + GAP)
        self.touch(SIZE_MAX if bottom == UINT16_MAX else bottom + 1, top, n)

    cdef void scan_byte(self, const uint8_t *x, size_t n) noexcept nogil:
        if self.pending > FLUSH16:
            self.flush_counts(128)
        gs_tally8(x, n, self.table16, self.table16 + 128 + GAP)
        self.touch(0, 127, n)

    cdef void flush_counts(self, size_t bins) noexcept nogil:
        cdef uint32_t *odd = self.table16 + bins + GAP
        cdef size_t i = 0
        while i <= self.last:
            self.count[i] += <uint64_t>self.table16[i] + odd[i]
            self.table16[i] = 0
            odd[i] = 0
            i = self.after(i)
        self.pending = 0

    cdef size_t emit_counts(self, uint64_t *zeros, double *top) noexcept nogil:
        cdef int mantissa_bits = self.format.mantissa_bits
        cdef size_t k = 0, i = 0, bins = self.out_capacity
        cdef uint64_t hidden = 1 << mantissa_bits, fraction
        cdef int exponent
        cdef uint64_t n
        cdef double value
        self.flush_counts(bins)
        while i <= self.last:
            n = self.count[i]
            self.count[i] = 0
            if n == 0:
                pass
            elif i >= self.format.first_nonfinite:
                if self.format.has_inf and i == self.format.first_nonfinite:
                    self.inf += n
                else:
                    self.nan += n
            elif i == 0:
                zeros[0] = n
            else:
                exponent = <int>(i >> mantissa_bits)
                fraction = i & (hidden - 1)
                if exponent:
                    fraction |= hidden
                    exponent -= 1
                value = <double>fraction * power_of_two(exponent + 1 - self.format.bias - mantissa_bits)
                self.emit(k, value, value, <double>n * value, n)
                # Products stay exact while each half of the count has at most 24 bits.
                add_compensated(&self.squares, &self.squares_lost, <double>(n & 0xFFFFFF) * (value * value))
                add_compensated(&self.squares, &self.squares_lost, <double>(n & ~<uint64_t>0xFFFFFF) * (value * value))
                top[0] = value
                k += 1
            i = self.after(i)
        return k

    def take(self):
        """Empties the scanner: ``(bins, sum_squares, max_abs, zeros, nan, inf, numel)``.

        ``bins`` are four arrays of k 8-byte numbers one after the other: lower, upper, sum_abs (float64) and count
        (int64), ascending.  The totals are over the finite elements; ``sum_squares`` is right to 2**-46 (a rounding
        or two for 16 bits and fewer), and inf where a square overflows float64.
        """
        cdef uint64_t zeros = 0
        cdef double top = 0.0
        cdef float top32
        cdef uint32_t bits32
        cdef size_t k = 0, j, capacity = self.out_capacity
        if self.elements:
            if self.format.kind == FLOAT32:
                k = self.emit_float32(&zeros)
                bits32 = <uint32_t>self.max_bits
                memcpy(&top32, &bits32, 4)
                top = top32 if bits32 >= 0x00800000 else <double>bits32 * power_of_two(-149)
            elif self.format.kind == FLOAT64:
                k = self.emit_float64(&zeros)
                memcpy(&top, &self.max_bits, 8)
            else:
                k = self.emit_counts(&zeros, &top)
        bins = PyBytes_FromStringAndSize(NULL, 32 * k)
        for j in range(4):
            memcpy(PyBytes_AS_STRING(bins) + 8 * k * j, self.out + capacity * j, 8 * k)
        squares = self.squares + self.squares_lost if self.squares < INFINITY else INFINITY
        taken = bins, squares, top, zeros, self.nan, self.inf, self.elements
        self.elements = self.nan = self.inf = self.tiny = self.max_bits = 0
        self.squares = self.squares_lost = 0.0
        self.first = SIZE_MAX
        self.last = 0
        return taken


cpdef double scatter_doubt(double rounding, double count, double position, double scatter) noexcept:
    """How far a bin's scatter may be off, if the means of what it was added up from were shifted.

    Each of them by at most ``rounding`` times its position above the lower edge, which is ``position`` on average; the
    scatters within were rounded as much.  By Cauchy-Schwarz the scatter between them changes by at most
    2r√(S(S + cp²)) + r²(S + cp²).
    """
    cdef double s = scatter if scatter > 0.0 else 0.0
    cdef double p = position if position > 0.0 else 0.0
    return rounding * (3.0 * s + 2.0 * p * sqrt(count * s)) + 4.0 * rounding * rounding * (s + count * p * p)


def clip_sums(
    const double[::1] lower not None,
    const double[::1] upper not None,
    const int64_t[::1] count not None,
    const double[::1] sum_abs not None,
    const double[::1] squares,
    double v,
    double rounding = 0.0,
):
    """Sums over the bins wholly below and wholly above ``v``, compensated.

    Returns ``(straddling, n, excess, mean_square_excess, above, below)``: the index of the bin that holds ``v``
    inside (-1: none); over the bins above, their elements n, sum of a - c*v, and sum of (a - c*v)**2/c; and for either
    side (energy of the bin means, least and most scatter around them).  ``squares`` are the bins' sums of squares or
    None, where only the most is known: (mean - lower)*(upper - mean)*c.  ``rounding`` is how far a bin's sum may be
    off, relative to what its elements exceed the lower edge by; ``scatter_doubt`` follows, the rest is not widened.
    """
    cdef Py_ssize_t i, straddling = -1, bins = lower.shape[0]
    cdef double c, share, mean, d, energy, least, most, doubt
    cdef double n = 0.0
    cdef double excess = 0.0, excess_lost = 0.0, square = 0.0, square_lost = 0.0
    cdef double[2] means = [0.0, 0.0]
    cdef double[2] means_lost = [0.0, 0.0]
    cdef double[2] scatter_least = [0.0, 0.0]
    cdef double[2] scatter_most = [0.0, 0.0]
    cdef int side
    for i in range(bins):
        if lower[i] < v < upper[i]:
            straddling = i
            continue
        c = <double>count[i]
        share = 1.0 / c
        mean = sum_abs[i] * share
        energy = sum_abs[i] * mean
        most = 0.0
        if upper[i] > lower[i]:
            # The mean may be off by two roundings.
            most = (mean - lower[i]) * (upper[i] - mean) * c
            most = (most if most > 0.0 else 0.0) + 9e-16 * energy
            if rounding > 0.0:
                most += rounding * (upper[i] - lower[i]) * c * (mean - lower[i])
        least = 0.0
        if squares is not None:
            d = squares[i] - energy
            doubt = 1e-14 * energy
            if rounding > 0.0:
                doubt += scatter_doubt(rounding, c, mean - lower[i], d)
            least = min(max(d - doubt, 0.0), most)
            most = max(min(d + doubt, most), least)
        side = 0 if upper[i] <= v else 1
        add_compensated(&means[side], &means_lost[side], energy)
        scatter_least[side] += least
        scatter_most[side] += most
        if side:
            d = sum_abs[i] - c * v
            n += c
            add_compensated(&excess, &excess_lost, d)
            add_compensated(&square, &square_lost, d * (d * share))
    return (
        straddling,
        n,
        excess + excess_lost,
        square + square_lost,
        (means[1] + means_lost[1], scatter_least[1], scatter_most[1]),
        (means[0] + means_lost[0], scatter_least[0], scatter_most[0]),
    )
