# Part of _meter.pyx: the steps of a training that does the same at every step, taken down in microseconds.

from types import GeneratorType
from sys import _getframe as getframe


cdef bint holds_parameters(optimizer, list held) except -1:
    """Whether ``optimizer`` holds as many parameters as ``held``, and the same first one."""
    cdef Py_ssize_t number = 0
    first = None
    for group in optimizer.param_groups:
        # Mostly a list; but nobody is kept from putting something else there.
        params = group["params"]
        if number == 0 and first is None:
            first = params
        number += len(params)
    return number != 0 and number == len(held) and len(first) > 0 and first[0] is held[0]


def same_parameters(optimizer, list held not None):
    """Whether a torch optimizer holds as many parameters as ``held``, and the same first one."""
    return holds_parameters(optimizer, held)


cdef class ExpectedClip:
    """A clip call that the next steps are expected to make, and what is known of the one under way.

    It stands at instruction ``at`` of ``code``, and is given the parameters with these ``ids``.  ``number`` is that of
    its group in the trace.  ``used`` is the gradient of the ``smallest`` parameter when it was clipped last, and its
    version then: as long as neither has changed, nor has the group's gradient.
    """

    cdef readonly object group
    cdef object code
    cdef int at
    cdef PyObject **parameters
    cdef Py_ssize_t tensors, smallest
    cdef int32_t number
    cdef KnownTensors known
    cdef GradientTally tally
    cdef list room
    cdef object new_copy, updates
    cdef readonly object used
    cdef readonly long version
    cdef Copy copy
    cdef readonly double time, max_norm, norm_type
    cdef double returned
    cdef bint has_returned
    # What cannot be taken down as a finite number at once.
    cdef readonly object total_norm
    cdef readonly object weight_norms

    def __init__(
        self, group, code, int at, list ids not None, Py_ssize_t smallest, int32_t number, used, long version,
        KnownTensors known not None, GradientTally tally not None, list room not None, new_copy, updates,
    ):
        cdef Py_ssize_t i
        self.group, self.code, self.at, self.smallest, self.number = group, code, at, smallest, number
        self.used, self.version = used, version
        self.known, self.tally, self.room, self.new_copy, self.updates = known, tally, room, new_copy, updates
        self.tensors = len(ids)
        if known.tensors != self.tensors or not 0 <= smallest < self.tensors:
            raise ValueError(f"{known.tensors} tensors are known of {self.tensors}")
        self.parameters = <PyObject **>malloc((self.tensors + 1) * sizeof(PyObject *))
        if not self.parameters:
            raise MemoryError
        # Told apart by where they lie: whoever expects this clip keeps them alive.
        for i in range(self.tensors):
            self.parameters[i] = <PyObject *><size_t>ids[i]

    def __dealloc__(self):
        free(self.parameters)

    cdef bint is_given(self, list parameters, frame) except -1:
        cdef Py_ssize_t i
        if len(parameters) != self.tensors:
            return False
        for i in range(self.tensors):
            if <PyObject *>parameters[i] != self.parameters[i]:
                return False
        return frame.f_code is self.code and <int>frame.f_lasti == self.at

    cdef bint take(self, RowBatch rows, list parameters, double max_norm, double norm_type) except -1:
        """Copies the gradients, unless they are those of the last time or not such as are known."""
        cdef Py_ssize_t i
        cdef const char *address
        cdef char *place
        gradient = parameters[self.smallest].grad
        if gradient is None or (gradient is self.used and <long>gradient._version == self.version):
            return False
        smallest = gradient
        if not self.room:
            rows.give_back()
        self.copy = self.room.pop() if self.room else self.new_copy()
        if self.copy is None:
            return False
        place = self.copy.start
        for i in range(self.tensors):
            gradient = parameters[i].grad
            if not self.known.find(gradient, i, &address):
                self.room.append(self.copy)
                self.copy = None
                return False
            place = self.copy.add(i, address, self.known.nbytes[i], place)
        gm_copied()
        self.used = smallest
        # That after the call is still to come.
        self.version = -1
        self.max_norm, self.norm_type = max_norm, norm_type
        self.has_returned, self.total_norm, self.weight_norms = False, None, None
        return True

    cdef int end(self, total_norm) except -1:
        """The call has returned."""
        cdef gm_dltensor told
        cdef TensorTypes types = self.known.types
        try:
            self.version = self.used._version
        except RuntimeError:
            # A tensor of inference mode has none.
            pass
        if types.exchange != NULL and type(total_norm) is types.first:
            types.exchange.describe(<void *>total_norm, &told)
            if told.device.device_type == GM_DLPACK_CPU and told.dtype.code == 2 and gm_is_dense(&told, 1):
                if told.dtype.bits == 32:
                    self.returned = (<float *>(<char *>told.data + told.byte_offset))[0]
                    self.has_returned = True
                elif told.dtype.bits == 64:
                    self.returned = (<double *>(<char *>told.data + told.byte_offset))[0]
                    self.has_returned = True
        if not self.has_returned or self.returned - self.returned != 0.0:
            self.total_norm = total_norm
        return 0

    cdef bint put(self, RowBatch rows, int64_t step, int spectra, update_norms) except -1:
        """Whether the row went to ``rows``."""
        cdef Head *head
        if self.total_norm is not None or not rows.has_room():
            return False
        if self.weight_norms is not None and type(self.weight_norms) is not rows.array:
            return False
        if update_norms is not None and type(update_norms) is not rows.array:
            return False
        head = rows.next_head()
        head.step, head.group, head.time, head.grad_scale = step, self.number, self.time, 1.0
        head.max_norm, head.clip_value, head.norm_type = self.max_norm, 0.0, self.norm_type
        head.returned_norm = self.returned if self.has_returned else 0.0
        head.present = 48 | 1 | 4 | (8 if self.has_returned else 0)
        rows.put(self.tally, self.copy, self.room, spectra, self.weight_norms, update_norms)
        rows.note(step)
        self.copy = self.weight_norms = None
        return True

    @property
    def returned_norm(self):
        """The finite norm that the call returned; None where there is none, or it is ``total_norm``."""
        return self.returned if self.has_returned and self.total_norm is None else None

    def handed_over(self):
        """The copied gradients of the call under way, which are somebody else's from here on."""
        copy, self.copy = self.copy, None
        return copy


cdef class SteadySteps:
    """Sees the steps of one optimizer, each after the same clip calls, for as long as they are all alike.

    Every question is one of a C attribute or two, since between the operations of a training step everything is cold:
    what takes a microsecond in a loop takes three.  No method lets another thread run but those that say so, so that
    the GIL is the lock.
    """

    cdef RowBatch rows
    cdef object now, emit, clipped_elsewhere, broke
    cdef readonly bint on
    cdef readonly object watch
    cdef PyObject *optimizer
    cdef list parameters
    cdef list clips
    cdef readonly Py_ssize_t seen
    cdef readonly int64_t step
    cdef int64_t steps_left
    cdef list plans
    # The threads that are inside a clip call and a step seen here, 0 where there is none.
    cdef readonly unsigned long clipping, stepping

    def __init__(self, rows, now, emit, clipped_elsewhere, broke):
        """``now`` tells the time; ``emit(step, clip, spectra, update_norms)`` takes a row that ``rows`` does not.

        ``clipped_elsewhere(total_norm)`` is told what a call returned that is no longer looked at here, and ``broke`` of
        errors that are not the training's.
        """
        self.rows, self.now, self.emit = rows, now, emit
        self.clipped_elsewhere, self.broke = clipped_elsewhere, broke
        self.clips, self.parameters, self.plans = [], [], []

    def begin(self, watch, optimizer, list clips not None, int64_t step, list plans not None, int64_t steps_left):
        """From ``step`` on expect the steps of ``optimizer``, whose parameters are ``watch.parameters``, after ``clips``.

        ``plans`` are (spectra, tenth) of the next steps, in turn; ``steps_left`` no more than that are taken, -1: all.
        """
        if self.clipping or self.stepping or self.rows is None or not plans:
            return
        self.watch, self.optimizer, self.parameters = watch, <PyObject *>optimizer, watch.parameters
        self.clips, self.step, self.steps_left = clips, step, steps_left
        # The plan of a step stands at its number.
        cut = len(plans) - (step + 1) % len(plans)
        self.plans = plans[cut:] + plans[:cut]
        self.seen = 0
        self.on = True

    def leave(self):
        """Expect nothing any more; ``(watch, step, the clip calls seen since, spectra)``, None where nothing was."""
        if not self.on:
            return None
        self.on = False
        if self.stepping == PyThread_get_thread_ident():
            # That step has failed, or does something of its own that is not seen here.
            self.stepping = 0
        clips, watch = self.clips, self.watch
        self.clips, self.watch, self.parameters = [], None, []
        return watch, self.step, clips, self.seen, self.spectra()

    cdef int spectra(self) except -1:
        return (<tuple>self.plans[(self.step + 1) % len(self.plans)])[0]

    cdef bint tenth(self) except -1:
        return (<tuple>self.plans[(self.step + 1) % len(self.plans)])[1]

    def clip(self, function, parameters, max_norm, norm_type, tuple rest, dict options):
        """``(True, what it returned)`` where this call of ``function`` is the expected one; it has been made then.

        Otherwise ``(False, parameters)``, as a list where they were a generator that is not empty.
        """
        cdef bint seen = False
        listed = parameters
        if type(parameters) is GeneratorType:
            listed = list(parameters) or parameters
        try:
            seen = type(listed) is list and self.expects(listed, max_norm, norm_type)
        except Exception as error:
            # See Watcher.broke.
            self.broke(error)
        if not seen:
            return False, listed
        try:
            total_norm = function(listed, max_norm, norm_type, *rest, **options)
        finally:
            self.clipping = 0
        try:
            if self.on:
                (<ExpectedClip>self.clips[self.seen - 1]).end(total_norm)
            else:
                self.clipped_elsewhere(total_norm)
        except Exception as error:
            self.broke(error)
        return True, total_norm

    cdef bint expects(self, list parameters, max_norm, norm_type) except -1:
        """Whether this clip call is the expected one, of a gradient that is new; then that is copied."""
        cdef ExpectedClip clip
        cdef double limit
        if not self.on or self.seen == len(self.clips) or self.clipping or self.stepping or self.steps_left == 0:
            return False
        clip = self.clips[self.seen]
        if type(max_norm) not in (float, int) or type(norm_type) not in (float, int):
            return False
        # The optimizer is gone, and with it whoever kept the parameters alive.
        if not self.parameters:
            return False
        try:
            # From the wrapper around the wrapper of torch.
            frame = getframe(2)
        except ValueError:
            # Called by no Python code, as the first function of a thread.
            return False
        if not clip.is_given(parameters, frame):
            return False
        limit = max_norm
        if not 0.0 < limit < NO_SQUARES or not clip.take(self.rows, parameters, limit, norm_type):
            return False
        clip.time = self.now()
        self.seen += 1
        self.clipping = PyThread_get_thread_ident()
        return True

    def inside(self):
        """Whether this thread is inside a clip call that was seen here."""
        return self.clipping != 0 and self.clipping == PyThread_get_thread_ident()

    def before_step(self, optimizer, args, kwargs):
        """Whether ``optimizer.step(*args, **kwargs)`` is the expected one; may let other threads run."""
        cdef ExpectedClip clip
        if (
            not self.on
            or <PyObject *>optimizer != self.optimizer
            or self.seen != len(self.clips)
            or self.stepping
            or self.clipping
            or kwargs
            or len(args) != 1
            or not holds_parameters(optimizer, self.parameters)
        ):
            return False
        self.stepping = PyThread_get_thread_ident()
        if self.tenth():
            for clip in self.clips:
                if clip.updates is not None:
                    clip.weight_norms = clip.updates.before()
        return True

    def after_step(self):
        """Whether this thread has made a step that was seen to begin, and is still looked at here."""
        cdef ExpectedClip clip
        cdef list clips = self.clips
        cdef int spectra
        if self.stepping == 0 or self.stepping != PyThread_get_thread_ident():
            return False
        if not self.on:
            self.stepping = 0
            return False
        spectra = self.spectra()
        self.step += 1
        self.seen = 0
        if self.steps_left > 0:
            self.steps_left -= 1
        try:
            for clip in clips:
                # May let other threads run, which must not begin the next step.
                update_norms = None if clip.weight_norms is None else clip.updates.after()
                if not clip.put(self.rows, self.step, spectra, update_norms):
                    self.emit(self.step, clip, spectra, update_norms)
        finally:
            self.stepping = 0
        return True
