"""Gradients of a clip group, as torch holds them -> a ``Measurement``, without changing or copying them.

Dense tensors in memory are measured where they lie.  Of a sparse gradient the values are (what is missing counts as
zeros), of a DTensor this rank's part.  Tensors on an accelerator go to ``device_meter``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradscope._meter import Copy, GradientTally, KnownTensors, TensorTypes, UpdateTally
from gradscope.recording.torch_threads import join_torch_threads
from gradscope.trace.measurement import Measurement, PackedMeasurement

if TYPE_CHECKING:
    from gradscope.recording.device_meter import DeviceMeter, Pending

# Groups up to this size are copied, and measured later, as long as no more than this waits.
COPIED_BYTES = 1 << 20
WAITING_BYTES = 64 << 20

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float8_e4m3fn: "float8_e4m3fn",
    torch.float8_e5m2: "float8_e5m2",
}

TENSOR_TYPES = TensorTypes(
    (Tensor, torch.nn.Parameter),
    torch.strided,
    {name: dtype for dtype, name in DTYPES.items()},
    getattr(Tensor, "__dlpack_c_exchange_api__", None),
)


class GroupMeter:
    """Measures tensors of these sizes and dtypes (names as in ``spectrum.FLOAT_DTYPES``) where they lie in memory.

    Not to be shared between threads; above a million elements it uses a second one itself.
    """

    def __init__(self, numels: Sequence[int], dtypes: Sequence[str]) -> None:
        self._tensors = len(numels)
        self.tally = GradientTally(numels, dtypes)
        # Of copies: of those that are measured without the GIL, and of others.
        self.behind = GradientTally(numels, dtypes)
        self._late = GradientTally(numels, dtypes)

    def measure(self, pointers: list[int], spectra: int) -> Measurement:
        """The tensors at these addresses, 0 where there is no gradient.

        ``spectra`` is 0 for none, 1 for the group's and 2 for the group's and the tensors'.  The arrays are read-only
        and the caller's own.
        """
        return self.pack(pointers, spectra).unpacked()

    def pack(self, pointers: list[int], spectra: int) -> PackedMeasurement:
        """The same, as a trace is written from it."""
        return self._packed(self.tally, pointers, spectra)

    def pack_copy(self, copy: Copy, spectra: int) -> PackedMeasurement:
        """The same of a copy, while another thread may do so with the tensors themselves."""
        return self._packed(self._late, copy.pointers, spectra)

    def _packed(self, tally: GradientTally, pointers: list[int], spectra: int) -> PackedMeasurement:
        data, of_group, of_tensors = tally.measure(pointers, spectra, torch.get_num_threads() > 1)
        return PackedMeasurement(data, self._tensors, spectra, of_group, of_tensors)


class CopiedGradients:
    """Small gradients, copied in a few microseconds, to be measured by whoever writes them: see ``Meter.take``."""

    __slots__ = ("copy", "group", "room", "spectra")

    def __init__(self, group: GroupMeter, copy: Copy, room: list[Copy], spectra: int) -> None:
        self.group = group
        self.copy = copy
        self.room = room
        self.spectra = spectra

    def ready(self) -> bool:
        """Always."""
        return True

    def result(self) -> PackedMeasurement:
        """The measurement; once, and by one thread at a time for all of a group."""
        packed = self.group.pack_copy(self.copy, self.spectra)
        self.room.append(self.copy)
        return packed


class UpdateMeter:
    """The norms of weights, and of what an optimizer step changes in them.

    At most ``limit`` bytes of weights are copied at a time; of more, every call takes the next tensors in turn, and one
    that is larger by itself is never copied.
    """

    def __init__(self, numels: Sequence[int], dtypes: Sequence[str], limit: int = 256 << 20) -> None:
        self._tally = UpdateTally(numels, dtypes, limit)

    def before(self, pointers: list[int]) -> NDArray[np.float64]:
        """‖θ‖ (float64 [tensors]) of the tensors at these addresses, NaN where that is 0; copies those in turn."""
        return np.frombuffer(self._tally.before(pointers, torch.get_num_threads() > 1), np.float64)

    def after(self, pointers: list[int]) -> NDArray[np.float64]:
        """‖θ' − θ‖ (float64 [tensors]) since ``before``; NaN for a tensor that was left out."""
        return np.frombuffer(self._tally.after(pointers, torch.get_num_threads() > 1), np.float64)


class Meter:
    """Measures the gradients of one clip group, step after step.

    ``unmeasured`` says of which tensors (positions) the gradient cannot be measured, and why; they are recorded as
    having none.
    """

    def __init__(self, tensors: Sequence[object]) -> None:
        """``tensors`` are the group's parameters, or anything else with one entry for each."""
        n = len(tensors)
        self.unmeasured: dict[int, str] = {}
        self._dtypes: list[torch.dtype] = [torch.float32] * n
        self._numels = [0] * n
        self._known: KnownTensors | None = None
        self._group: GroupMeter
        self._nbytes = 0
        self._small = False
        self._room: list[Copy] = []
        self._copies = 0
        self._device: DeviceMeter | None = None

    def measure(self, gradients: Sequence[Tensor | None], spectra: int) -> Measurement | Pending | None:
        """The gradients, one per tensor of the group; ``spectra`` is 0: none, 1: of the group, 2: of its tensors too.

        Gradients on an accelerator give a ``Pending``, whose ``result()`` is the Measurement once it is ``ready()``.
        """
        measured = self.take(gradients, spectra)
        if isinstance(measured, CopiedGradients):
            measured = measured.result()
        return measured.unpacked() if isinstance(measured, PackedMeasurement) else measured

    def take(
        self, gradients: Sequence[Tensor | None], spectra: int
    ) -> CopiedGradients | PackedMeasurement | Measurement | Pending | None:
        """The same as ``measure``, in the form that holds training up least; None while a CUDA graph is captured.

        Small gradients in memory are copied and measured later (``CopiedGradients``), many at a time and in another
        thread: between the operations of a training step it would take twice as long.  What a CUDA graph replays cannot
        be seen, and measuring would become a part of it.
        """
        copied = self.copied(gradients, spectra)
        if copied is not None:
            return copied
        pointers = None if self._known is None else self._known.addresses(gradients)
        if pointers is None:
            return self._measure_others(gradients, spectra)
        return self._group.pack(pointers, spectra)

    def copied(self, gradients: Sequence[Tensor | None], spectra: int) -> CopiedGradients | None:
        """Small gradients, to be measured later; None where these are not, or not as the last time."""
        known = self.known_small
        copy = None if known is None else self._room.pop() if self._room else self.new_copy()
        if known is None or copy is None:
            return None
        if copy.take(known, gradients):
            return self.of_copy(copy, spectra)
        self._room.append(copy)
        return None

    @property
    def known_small(self) -> KnownTensors | None:
        """The gradients as they were the last time, if they are small enough to be copied."""
        return self._known if self._small else None

    @property
    def room(self) -> list[Copy]:
        """Copies that are free."""
        return self._room

    @property
    def behind(self) -> GradientTally:
        """Measures copies of ``known_small`` in another thread."""
        return self._group.behind

    def of_copy(self, copy: Copy, spectra: int) -> CopiedGradients:
        """Gradients that lie in a copy from ``room`` or ``new_copy``."""
        return CopiedGradients(self._group, copy, self._room, spectra)

    def new_copy(self) -> Copy | None:
        """Room for one more copy; None where too many wait to be measured already."""
        if self._known is None or (self._copies + 1) * self._nbytes > WAITING_BYTES:
            return None
        self._copies += 1
        return Copy(self._known)

    @torch.no_grad()
    def _measure_others(self, gradients: Sequence[Tensor | None], spectra: int) -> Measurement | Pending | None:
        """Of gradients that do not all lie in memory as they did the last time."""
        held = [None if gradient is None else self._elements(i, gradient) for i, gradient in enumerate(gradients)]
        zeros = np.array(
            [0 if h is None or g is None else _numel(g) - h.numel() for g, h in zip(gradients, held, strict=True)]
        )
        if any(elements is not None and not elements.is_cpu for elements in held):
            from gradscope.recording.device_meter import DeviceMeter

            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return None
            if self._device is None:
                self._device = DeviceMeter()
            return self._device.measure(held, spectra, zeros)
        for i, elements in enumerate(held):
            if elements is not None and (elements.dtype is not self._dtypes[i] or elements.numel() != self._numels[i]):
                self._dtypes[i], self._numels[i] = elements.dtype, elements.numel()
                self._known = None
        if self._known is None:
            self._prepare()
        measured = self._group.measure([0 if e is None else e.data_ptr() or 1 for e in held], spectra)
        if zeros.any():
            measured.zeros = measured.zeros + zeros
        return measured

    def _prepare(self) -> None:
        """For gradients of other sizes or dtypes than before."""
        dtypes = [DTYPES[dtype] for dtype in self._dtypes]
        self._group = GroupMeter(self._numels, dtypes)
        self._known = KnownTensors(TENSOR_TYPES, self._numels, dtypes)
        self._nbytes = sum(numel * dtype.itemsize for numel, dtype in zip(self._numels, self._dtypes, strict=True))
        self._small = self._nbytes <= COPIED_BYTES
        if not self._small:
            join_torch_threads()
        self._room, self._copies = [], 0

    def _elements(self, i: int, gradient: Tensor) -> Tensor | None:
        """What is to be measured of a gradient, gap-free in memory; None where it cannot be."""
        try:
            elements = plain_elements(gradient)
        except UnreadableGradientError as unreadable:
            self.unmeasured[i] = str(unreadable)
            return None
        return elements


class UnreadableGradientError(ValueError):
    """A gradient whose elements cannot be measured; says why."""


def plain_elements(tensor: Tensor) -> Tensor:
    """The stored elements of a tensor of any kind, dense, gap-free and of a dtype in ``DTYPES``, in any order.

    Those of a sparse tensor are its values, those of a DTensor this rank's.  Raises UnreadableGradientError where there
    are none.
    """
    tensor = _local(tensor)
    if tensor.layout is torch.sparse_coo:
        tensor = (tensor if tensor.is_coalesced() else tensor.coalesce())._values()
    elif tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        tensor = tensor.values()
    elif tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_meta:
        raise UnreadableGradientError("it is on the meta device and holds no elements")
    if tensor.is_complex():
        raise UnreadableGradientError(
            f"it is {str(tensor.dtype).removeprefix('torch.')}, and complex numbers are not measured"
        )
    if tensor.dtype not in DTYPES:
        tensor = tensor.to(torch.float32)
    if not _is_gap_free(tensor):
        tensor = tensor.contiguous()
    if tensor.is_cpu and tensor.numel() and not tensor.data_ptr():
        if not tensor._is_zerotensor():
            raise UnreadableGradientError("it holds no elements in memory")
        tensor = tensor.clone()
    return tensor


def _local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank, as a plain tensor."""
    tensor = getattr(tensor, "_local_tensor", tensor)
    if hasattr(tensor, "trigger_wait"):
        # A collective that is still under way.
        tensor = tensor.trigger_wait()
    if type(tensor) is not Tensor:
        from torch.utils._python_dispatch import is_traceable_wrapper_subclass

        if is_traceable_wrapper_subclass(tensor):
            raise UnreadableGradientError(f"it is a {type(tensor).__name__}, whose elements lie in other tensors")
        tensor = tensor.as_subclass(Tensor)
    return tensor.detach()


def _numel(tensor: Tensor) -> int:
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local.numel()


def _is_gap_free(tensor: Tensor) -> bool:
    """Whether the elements fill a range of memory, each once, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
