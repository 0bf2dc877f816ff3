# Part of _meter.pyx: rows on their way to a trace, and how Arrow takes them.

cdef class Memory:
    """A piece of memory that bytes can be read from."""

    cdef char *data
    cdef Py_ssize_t size

    def __dealloc__(self):
        free(self.data)

    def __len__(self):
        return self.size

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.data if self.data else <char *>&NOTHING, self.size, 1, flags)


cdef double NOTHING = 0.0


cdef Memory handed_over(Grown *grown):
    """What has grown, which begins anew."""
    cdef Memory memory = Memory()
    memory.data = grown.data
    memory.size = grown.size
    grown.data = NULL
    grown.size = grown.room = 0
    return memory


cdef extern from *:
    """
    #include <pythread.h>
    """
    ctypedef void *PyThread_type_lock
    PyThread_type_lock PyThread_allocate_lock()
    void PyThread_free_lock(PyThread_type_lock lock)
    int PyThread_acquire_lock(PyThread_type_lock lock, int wait) nogil
    int PyThread_acquire_lock_timed(PyThread_type_lock lock, long long microseconds, int interruptible) nogil
    void PyThread_release_lock(PyThread_type_lock lock) nogil
    unsigned long PyThread_get_thread_ident() nogil


cdef struct Job:
    # Borrowed: a GradientTally, its Tally, and a Copy of its tensors.
    void *group
    void *tally
    void *copy
    int spectra


cdef class RowBatch:
    """Rows of copied gradients, up to ``most``, measured without holding up other threads.

    Rows are taken in by threads that hold the GIL and measured by one that does not: neither waits for the other.

    ``copied`` is the type of a measurement that is still a ``Copy`` (with ``copy``, ``group.behind``, ``room`` and
    ``spectra``), ``array`` that of norms, ``coarse`` are the dtypes whose total norm has to be looked at.  ``behind`` is
    set while older rows wait elsewhere: it takes in none then.
    """

    cdef type copied, array
    cdef tuple coarse
    cdef Head *heads
    cdef Job *jobs
    # By place: what a row borrows and its norms of weights and updates, until both have been given back.
    cdef list held
    cdef uint64_t most, taken, measured, given_back
    cdef list weight_norms, update_norms
    cdef Columns columns
    # The first is held while rows are measured, the second always but when somebody wakes who waits for it.
    cdef PyThread_type_lock measuring, alarm
    cdef bint ended
    cdef public bint behind
    # Of all rows, whether they come here or not.
    cdef readonly int64_t steps, last_step

    def __cinit__(self, type copied not None, type array not None, tuple coarse not None, Py_ssize_t most):
        self.copied = copied
        self.array = array
        self.coarse = coarse
        self.most = most
        self.last_step = -1
        self.held = [None] * most
        self.weight_norms, self.update_norms = [], []
        memset(&self.columns, 0, sizeof(Columns))
        self.heads = <Head *>malloc(most * sizeof(Head))
        self.jobs = <Job *>malloc(most * sizeof(Job))
        self.measuring, self.alarm = PyThread_allocate_lock(), PyThread_allocate_lock()
        if not (self.heads and self.jobs and self.measuring and self.alarm):
            raise MemoryError
        PyThread_acquire_lock(self.alarm, 1)

    def __dealloc__(self):
        cdef int i
        for i in range(COLUMNS):
            free(self.columns.column[i].data)
        free(self.heads)
        free(self.jobs)
        if self.measuring:
            PyThread_free_lock(self.measuring)
        if self.alarm:
            PyThread_free_lock(self.alarm)

    def count(self, int64_t step):
        """A row of ``step`` has come."""
        self.note(step)

    cdef void note(self, int64_t step) noexcept:
        if step != self.last_step:
            self.last_step = step
            self.steps += 1

    @property
    def full(self):
        """Whether it takes no more before the next ``measure``."""
        return self.taken - self.measured >= self.most

    cdef bint has_room(self) except -1:
        if self.taken - self.given_back >= self.most:
            self.give_back()
        return not self.behind and self.taken - self.given_back < self.most

    cdef Head *next_head(self) noexcept:
        return self.heads + self.taken % self.most

    cdef int put(self, GradientTally tally, Copy copy, list room, int spectra, weight_norms, update_norms) except -1:
        """Takes in the row whose ``next_head`` has been filled in but for the lengths; there must be room for it."""
        cdef Head *head = self.next_head()
        cdef Job *job = self.jobs + self.taken % self.most
        if tally.tensors != copy.tensors:
            raise ValueError(f"a copy of {copy.tensors} tensors for {tally.tensors}")
        if tally.tally is None:
            tally.tally = Tally(tally.tensors)
        head.weight = 0 if weight_norms is None else len(weight_norms)
        head.update = 0 if update_norms is None else len(update_norms)
        job.group, job.tally, job.copy, job.spectra = <void *>tally, <void *>tally.tally, <void *>copy, spectra
        self.held[self.taken % self.most] = (tally, tally.tally, copy, room, weight_norms, update_norms)
        GM_PUBLISH(&self.taken, self.taken + 1)
        return 0

    def take(self, int64_t step, int32_t group, call, stepped, list update_norms not None):
        """Whether it takes this row in: it has one part, everything of it has arrived, and nothing is infinite.

        Compiled, and at once: what another thread would look at later, it would wait for.
        """
        cdef Head *head
        cdef list parts = call.parts, weight_norms = call.weight_norms
        cdef double value
        if len(parts) != 1 or len(weight_norms) > 1 or len(update_norms) > 1 or not self.has_room():
            return False
        measured = (<tuple>parts[0])[1]
        if type(measured) is not self.copied:
            return False
        head = self.next_head()
        head.present = 0
        if stepped is not None:
            if stepped is not True and stepped is not False:
                return False
            head.present = 48 if stepped is True else 16
        number, total_norm = call.returned, call.total_norm
        head.returned_norm = 0.0
        if number is not None:
            if type(number) is not float:
                return False
            value = number
            if value - value != 0.0:
                return False
            head.returned_norm = value
            head.present |= 8
        if total_norm is not None and type(total_norm) is not float and total_norm.dtype in self.coarse:
            return False
        for norms in weight_norms:
            if type(norms) is not self.array:
                return False
        for norms in update_norms:
            if type(norms) is not self.array:
                return False
        head.step, head.group, head.time, head.grad_scale = step, group, call.time, call.grad_scale
        head.max_norm = head.clip_value = head.norm_type = 0.0
        number = call.max_norm
        if number is not None:
            head.max_norm = number
            head.present |= 1
        number = call.clip_value
        if number is not None:
            head.clip_value = number
            head.present |= 2
        number = call.norm_type
        if number is not None:
            head.norm_type = number
            head.present |= 4
        self.put(
            measured.group.behind,
            measured.copy,
            measured.room,
            measured.spectra,
            weight_norms[0] if weight_norms else None,
            update_norms[0] if update_norms else None,
        )
        return True

    cdef void measure_taken(self) noexcept nogil:
        """Measures the rows that it has taken in; ``measuring`` must be held."""
        cdef uint64_t taken = GM_READ(&self.taken)
        cdef Columns *columns = &self.columns
        cdef Job *job
        cdef Head *head
        cdef char *heads
        while self.measured < taken:
            job = self.jobs + self.measured % self.most
            head = self.heads + self.measured % self.most
            (<GradientTally>job.group).measure_copy(<Tally>job.tally, <Copy>job.copy, job.spectra, columns, head)
            heads = more(&columns.column[HEADS], sizeof(Head))
            if heads:
                memcpy(heads, head, sizeof(Head))
            else:
                columns.no_memory = True
            GM_PUBLISH(&self.measured, self.measured + 1)

    cdef int give_back(self) except -1:
        """Gives back what the measured rows have borrowed."""
        cdef uint64_t measured = GM_READ(&self.measured)
        cdef tuple row
        while self.given_back < measured:
            row = self.held[self.given_back % self.most]
            self.held[self.given_back % self.most] = None
            self.given_back += 1
            (<list>row[3]).append(row[2])
            if row[4] is not None:
                self.weight_norms.append(row[4])
            if row[5] is not None:
                self.update_norms.append(row[5])
        return 0

    def measure_for(self, double seconds, double every):
        """Measures what comes in, at once ``every`` so many seconds, for ``seconds``; False once ``end`` was called.

        Holds up nobody who waits for the GIL, and waits for nobody who has it.
        """
        cdef long long pause = <long long>(1e6 * every)
        cdef Py_ssize_t left = <Py_ssize_t>(seconds / every) or 1
        with nogil:
            while left > 0 and not self.ended:
                if PyThread_acquire_lock_timed(self.alarm, pause, 0):
                    PyThread_release_lock(self.alarm)
                    break
                PyThread_acquire_lock(self.measuring, 1)
                self.measure_taken()
                PyThread_release_lock(self.measuring)
                left -= 1
        self.give_back()
        return not self.ended

    def end(self):
        """Wakes whoever is in ``measure_for``, for good."""
        if not self.ended:
            self.ended = True
            PyThread_release_lock(self.alarm)

    def hand_over(self):
        """``(heads, columns)`` of the rows taken in so far, to be read as bytes; None where there are none.

        The columns are sum_squares, max_abs, zeros, nan, inf, tensor_bin_counts; count, mean, spread and code of the
        groups' bins, then of the tensors'; weight_norm and update_norm.
        """
        cdef Columns *columns = &self.columns
        cdef Py_ssize_t i
        cdef list found
        with nogil:
            PyThread_acquire_lock(self.measuring, 1)
            self.measure_taken()
        try:
            self.give_back()
            if columns.no_memory:
                raise MemoryError
            if columns.column[HEADS].size == 0:
                return None
            found = [handed_over(&columns.column[i]) for i in range(COLUMNS)]
            norms = (b"".join(self.weight_norms), b"".join(self.update_norms))
            self.weight_norms, self.update_norms = [], []
        finally:
            PyThread_release_lock(self.measuring)
        return found[HEADS], (*found[:HEADS], *norms)


cdef extern from *:
    """
    #ifndef ARROW_C_DATA_INTERFACE
    #define ARROW_C_DATA_INTERFACE
    /* https://arrow.apache.org/docs/format/CDataInterface.html */
    struct ArrowArray {
        int64_t length, null_count, offset, n_buffers, n_children;
        const void **buffers;
        struct ArrowArray **children;
        struct ArrowArray *dictionary;
        void (*release)(struct ArrowArray *);
        void *private_data;
    };
    #endif
    """
    struct ArrowArray:
        int64_t length
        int64_t null_count
        int64_t offset
        int64_t n_buffers
        int64_t n_children
        const void **buffers
        ArrowArray **children
        ArrowArray *dictionary
        void (*release)(ArrowArray *) noexcept nogil
        void *private_data


cdef void release_array(ArrowArray *array) noexcept nogil:
    """The memory is an ``ArrowRows``'s."""
    cdef int64_t i
    for i in range(array.n_children):
        if array.children[i].release:
            array.children[i].release(array.children[i])
    array.release = NULL


cdef class ArrowRows:
    """Rows as Arrow's C data interface has them: all columns in one go.

    ``heads`` are the rows, each ``row_bytes`` long, with an int32 of flags at ``flags``.  A column is ``(name,
    itemsize, offset, present, values)``.  Without ``values`` it is a number that lies at ``offset`` of a row, or with
    ``itemsize`` 0 a bool, the bit ``offset`` of the flags; null where ``present`` is not 0 and not in the flags.  With
    ``values`` it is a list, whose length (int32) lies at ``offset``; all its items are in ``values``.

    Whoever reads ``address`` shares this object's memory and must be done with it first.

    Raises ValueError where there are not as many values as the lengths say.
    """

    cdef char *memory
    cdef size_t used
    cdef ArrowArray *array
    cdef list views

    def __init__(self, const uint8_t[::1] heads not None, Py_ssize_t row_bytes, Py_ssize_t flags, list columns not None):
        cdef Py_ssize_t n = heads.shape[0] // row_bytes, count = len(columns), i
        cdef const char *rows = <const char *>&heads[0] if n else <const char *>&NOTHING
        # Of a column: its array and that of its items, their buffers and children, numbers, and which are null.
        cdef size_t each = 2 * (sizeof(ArrowArray) + 64) + 4 * 64 + (8 * n + 72) + (n // 8 + 64)
        if self.memory:
            raise ValueError("made already")
        self.memory = <char *>calloc(sizeof(ArrowArray) + 8 * count + 256 + count * each, 1)
        if not self.memory:
            raise MemoryError
        self.views = []
        self.array = self.new_array(n, 1, count)
        for i in range(count):
            name, itemsize, offset, present, values = columns[i]
            if values is None:
                self.array.children[i] = self.numbers(rows, n, row_bytes, flags, itemsize, offset, present)
            else:
                self.array.children[i] = self.lists(rows, n, row_bytes, itemsize, offset, values, name)

    def __dealloc__(self):
        free(self.memory)

    @property
    def address(self):
        """Where the ``ArrowArray`` lies."""
        return <size_t>self.array

    cdef char *place(self, size_t size) noexcept nogil:
        cdef size_t at = self.used
        self.used += (size + 63) & ~63
        return self.memory + at

    cdef ArrowArray *new_array(self, int64_t length, int64_t buffers, int64_t children) noexcept nogil:
        cdef ArrowArray *array = <ArrowArray *>self.place(sizeof(ArrowArray))
        array.length = length
        array.n_buffers = buffers
        array.n_children = children
        array.buffers = <const void **>self.place(buffers * sizeof(void *))
        array.children = <ArrowArray **>self.place(children * sizeof(void *)) if children else NULL
        array.release = release_array
        return array

    cdef ArrowArray *numbers(
        self, const char *rows, Py_ssize_t n, Py_ssize_t row_bytes, Py_ssize_t flags, int itemsize, int offset, int present
    ) noexcept nogil:
        cdef ArrowArray *array = self.new_array(n, 2, 0)
        cdef char *numbers = self.place(8 * n + 8)
        cdef char *valid = self.place(n // 8 + 1)
        cdef Py_ssize_t i
        cdef int32_t held
        for i in range(n):
            memcpy(&held, rows + i * row_bytes + flags, 4)
            if itemsize == 0:
                numbers[i >> 3] |= (held >> offset & 1) << (i & 7)
            else:
                memcpy(numbers + i * itemsize, rows + i * row_bytes + offset, itemsize)
            if held & present or not present:
                valid[i >> 3] |= 1 << (i & 7)
            else:
                array.null_count += 1
        array.buffers[0] = valid if array.null_count else NULL
        array.buffers[1] = numbers
        return array

    cdef ArrowArray *lists(
        self, const char *rows, Py_ssize_t n, Py_ssize_t row_bytes, Py_ssize_t itemsize, int offset, values, name
    ) except NULL:
        cdef const uint8_t[::1] view = values
        cdef ArrowArray *array = self.new_array(n, 2, 1)
        cdef int32_t *starts = <int32_t *>self.place(4 * n + 4)
        cdef Py_ssize_t i
        cdef int32_t length
        for i in range(n):
            memcpy(&length, rows + i * row_bytes + offset, 4)
            starts[i + 1] = starts[i] + length
        if view.shape[0] != starts[n] * itemsize:
            raise ValueError(f"{name} holds {view.shape[0] / itemsize:g} values of {starts[n]}")
        array.buffers[1] = starts
        array.children[0] = self.new_array(starts[n], 2, 0)
        array.children[0].buffers[1] = <const void *>&view[0] if starts[n] else <const void *>&NOTHING
        self.views.append(values)
        return array
