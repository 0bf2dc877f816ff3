# Part of _meter.pyx: where torch's tensors lie, asked in as few questions as torch allows, and copies of small ones.

from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid

cdef extern from *:
    """
    /* What is used of DLPack 1: https://dmlc.github.io/dlpack/latest/c_api.html */
    typedef struct { uint32_t major, minor; } gm_version;
    typedef struct {
        void *data;
        struct { int32_t device_type, device_id; } device;
        int32_t ndim;
        struct { uint8_t code, bits; uint16_t lanes; } dtype;
        int64_t *shape, *strides;
        uint64_t byte_offset;
    } gm_dltensor;
    typedef struct {
        gm_version version;
        const void *previous;
        void (*functions_not_used[3])(void);
        int (*describe)(void *tensor, gm_dltensor *out);
    } gm_exchange;

    #define GM_DLPACK_CPU 1

    /* Copies past the caches, since another thread reads it: through them it costs a training step twice as much, for
       what it drives out.  ``to`` is aligned to 64.  gm_copied() comes before anybody else is told. */
    #if defined(__SSE2__) || defined(_M_X64)
    #include <emmintrin.h>
    static void gm_copy(char *to, const char *from, size_t n)
    {
        size_t i, whole = n - n % 64;
        int j;
        for (i = 0; i < whole; i += 64)
            for (j = 0; j < 64; j += 16)
                _mm_stream_si128((__m128i *)(to + i + j), _mm_loadu_si128((const __m128i *)(from + i + j)));
        memcpy(to + whole, from + whole, n - whole);
    }
    #define gm_copied() _mm_sfence()
    #else
    #define gm_copy(to, from, n) memcpy(to, from, n)
    #define gm_copied()
    #endif

    /* Whether a tensor lies gap-free in memory in the order of its axes, with so many elements. */
    static int gm_is_dense(const gm_dltensor *t, uint64_t numel)
    {
        uint64_t found = 1;
        int32_t i;
        int gap_free = 1;
        for (i = t->ndim - 1; i >= 0; i--) {
            if (t->strides && t->shape[i] != 1 && t->strides[i] != (int64_t)found) gap_free = 0;
            found *= (uint64_t)t->shape[i];
        }
        return found == numel && (gap_free || numel == 0);
    }
    """
    ctypedef struct gm_device:
        int32_t device_type
    ctypedef struct gm_dtype:
        uint8_t code
        uint8_t bits
    ctypedef struct gm_dltensor:
        void *data
        gm_device device
        gm_dtype dtype
        uint64_t byte_offset
    ctypedef struct gm_version:
        uint32_t major
    ctypedef struct gm_exchange:
        gm_version version
        int (*describe)(void *tensor, gm_dltensor *out) except? -1
    const int GM_DLPACK_CPU
    void gm_copy(char *to, const char *source, size_t n) nogil
    void gm_copied() nogil
    bint gm_is_dense(const gm_dltensor *t, uint64_t numel) nogil

# By kind: the code of DLPack.
cdef uint8_t[6] DLPACK_CODES = [2, 2, 2, 4, 10, 12]


cdef class TensorTypes:
    """What torch calls things, for ``KnownTensors``; torch is not imported here.

    ``plain`` are the two types whose objects are tensors and nothing more, ``strided`` is torch's dense layout, ``dtypes``
    torch's own by name.  ``exchange`` is ``torch.Tensor.__dlpack_c_exchange_api__``, with which one call tells all of a
    tensor in 30 ns; None where torch is too old to have it.
    """

    cdef object first, second
    cdef object strided
    cdef dict dtypes
    cdef object capsule
    cdef const gm_exchange *exchange

    def __init__(self, tuple plain not None, strided, dict dtypes not None, exchange=None):
        self.first, self.second = plain
        self.strided = strided
        self.dtypes = dtypes
        self.capsule = exchange
        if exchange is not None and PyCapsule_IsValid(exchange, "dlpack_exchange_api"):
            self.exchange = <const gm_exchange *>PyCapsule_GetPointer(exchange, "dlpack_exchange_api")
            if self.exchange.version.major != 1:
                # Its functions lie elsewhere.
                self.exchange = NULL


cdef class KnownTensors:
    """Tensors of these sizes and dtypes (names as in ``spectrum.FLOAT_DTYPES``), each time they are met."""

    cdef TensorTypes types
    cdef Py_ssize_t tensors
    cdef uint64_t *numels
    cdef size_t *nbytes
    cdef int *kinds
    cdef int *itemsizes
    cdef list dtypes

    def __init__(self, TensorTypes types not None, numels, dtypes):
        cdef Py_ssize_t i
        self.types = types
        self.tensors = len(numels)
        self.numels = <uint64_t *>calloc(self.tensors + 1, sizeof(uint64_t))
        self.nbytes = <size_t *>calloc(self.tensors + 1, sizeof(size_t))
        self.kinds = <int *>calloc(self.tensors + 1, sizeof(int))
        self.itemsizes = <int *>calloc(self.tensors + 1, sizeof(int))
        if not (self.numels and self.nbytes and self.kinds and self.itemsizes):
            raise MemoryError
        self.dtypes = [types.dtypes[name] for name in dtypes]
        for i in range(self.tensors):
            self.kinds[i], self.itemsizes[i] = KINDS[dtypes[i]]
            self.numels[i] = numels[i]
            self.nbytes[i] = self.numels[i] * self.itemsizes[i]

    def __dealloc__(self):
        free(self.numels)
        free(self.nbytes)
        free(self.kinds)
        free(self.itemsizes)

    cdef bint find(self, tensor, Py_ssize_t i, const char **address) except -1:
        """Whether ``tensor`` is the i-th as it was: plain, dense, in memory, of that size and dtype; and where it lies.

        None lies at NULL, an empty tensor at 1.
        """
        cdef gm_dltensor told
        address[0] = NULL
        if tensor is None:
            return True
        kind = type(tensor)
        if kind is not self.types.first and kind is not self.types.second:
            return False
        if self.types.exchange == NULL:
            return self.ask(tensor, i, address)
        try:
            self.types.exchange.describe(<void *>tensor, &told)
        except (BufferError, RuntimeError, TypeError, ValueError):
            # Sparse, or on a device that DLPack has no number for.
            return False
        if (
            told.device.device_type != GM_DLPACK_CPU
            or told.dtype.code != DLPACK_CODES[self.kinds[i]]
            or told.dtype.bits != 8 * self.itemsizes[i]
            or not gm_is_dense(&told, self.numels[i])
        ):
            return False
        if self.numels[i] == 0:
            address[0] = <const char *>1
            return True
        # A tensor of zeros alone may lie nowhere.
        address[0] = <const char *>told.data + told.byte_offset
        return told.data != NULL

    cdef bint ask(self, tensor, Py_ssize_t i, const char **address) except -1:
        """The same, one question after the other."""
        cdef size_t at
        if not (
            tensor.dtype is self.dtypes[i]
            and tensor.is_cpu
            and tensor.layout is self.types.strided
            and tensor.is_contiguous()
            and tensor.numel() == self.numels[i]
        ):
            return False
        at = tensor.data_ptr()
        address[0] = <const char *>at if self.numels[i] else <const char *>1
        return at != 0 or self.numels[i] == 0

    def addresses(self, tensors):
        """Where they lie, 0 for None; None unless all are plain, dense, in memory, and as they were before."""
        cdef Py_ssize_t i = 0
        cdef const char *address
        cdef list found = []
        if len(tensors) != self.tensors:
            raise ValueError(f"{len(tensors)} tensors where {self.tensors} are known")
        for tensor in tensors:
            if not self.find(tensor, i, &address):
                return None
            found.append(<size_t>address)
            i += 1
        return found


cdef class Copy:
    """Room for the gradients of a group of small tensors, copied out of the way of what changes them."""

    cdef char *memory
    # Where the first lies, aligned to 64.
    cdef char *start
    # Where each lies; NULL for None.
    cdef const char **held
    cdef Py_ssize_t tensors

    def __cinit__(self, KnownTensors known not None):
        cdef Py_ssize_t size = 128, i
        self.tensors = known.tensors
        for i in range(self.tensors):
            size += (known.nbytes[i] + 63) & ~<size_t>63
        self.held = <const char **>calloc(self.tensors + 1, sizeof(char *))
        self.memory = <char *>malloc(size)
        if not (self.memory and self.held):
            raise MemoryError
        self.start = self.memory + 64 - <size_t>self.memory % 64

    def __dealloc__(self):
        free(self.memory)
        free(self.held)

    @property
    def pointers(self):
        """Where each lies, 0 for None."""
        return [<size_t>self.held[i] for i in range(self.tensors)]

    cdef char *add(self, Py_ssize_t i, const char *address, size_t n, char *at) noexcept nogil:
        """Copies the i-th to ``at``, and returns where the next goes."""
        if address != NULL and n:
            gm_copy(at, address, n)
        self.held[i] = at if address != NULL else NULL
        return at + ((n + 63) & ~<size_t>63)

    def take(self, KnownTensors known not None, gradients):
        """Whether ``gradients`` are as ``known``, None where there is none; then they are copied."""
        cdef Py_ssize_t i = 0
        cdef const char *address
        cdef char *at = self.start
        if len(gradients) != self.tensors or known.tensors != self.tensors:
            raise ValueError(f"{len(gradients)} tensors where {self.tensors} are known")
        for gradient in gradients:
            if not known.find(gradient, i, &address):
                return False
            at = self.add(i, address, known.nbytes[i], at)
            i += 1
        gm_copied()
        return True
