"""Arrays as numpy describes them, in memory or as bytes of a file, made into stored tensors."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from gradscope.errors import GradscopeError
from gradscope.sources.formats.file_region import FileRegion
from gradscope.sources.formats.tree import Leaf, UnreadableTensor
from gradscope.sources.formats.zip_members import MemberStream
from gradscope.sources.stored import FileTensor, MemoryTensor, StreamTensor
from gradscope.tensors import TensorInfo

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_DIMENSIONS = 64
MAX_VALUES = 64

# numpy has no such types of its own: the package ml_dtypes adds them, and they are kept as plain bits.
BITS_OF: dict[str, str] = {"bfloat16": "<u2", "float8_e4m3fn": "|u1", "float8_e5m2": "|u1"}
_INTEGERS = (f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_NUMPY_NAMES = ("float64", "float32", "float16", "bool", "complex64", "complex128", *_INTEGERS)
# Every dtype that gradscope can hold, and the little-endian numpy dtype of its bits.
BITS: dict[str, np.dtype[Any]] = {
    name: np.dtype(code).newbyteorder("<") for name, code in [*((n, n) for n in _NUMPY_NAMES), *BITS_OF.items()]
}


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """How an array's bytes are to be understood: its dtype's name, the numpy dtype of its bits, shape and order."""

    dtype: str
    bits: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool = False

    @property
    def info(self) -> TensorInfo:
        """As a tensor that has no name yet."""
        return TensorInfo("", self.shape, self.dtype)

    @property
    def nbytes(self) -> int:
        """How many bytes the elements take."""
        return self.info.numel * self.bits.itemsize

    @property
    def strides(self) -> tuple[int, ...] | None:
        """In elements; None where the order is C's."""
        if not self.fortran or len(self.shape) < 2:
            return None
        strides, step = [], 1
        for extent in self.shape:
            strides.append(step)
            step *= extent
        return tuple(strides)

    @property
    def swapped(self) -> bool:
        """Whether the numbers are big-endian."""
        return self.bits.newbyteorder("<") != self.bits


def layout_of(dtype: np.dtype[Any] | str, shape: tuple[int, ...], fortran: bool = False) -> ArrayLayout | None:
    """The layout of an array of ``dtype`` (numpy's, or the name of a type of ml_dtypes); None if it is unreadable."""
    name = dtype if isinstance(dtype, str) else dtype.name
    if name not in BITS:
        return None
    bits = np.dtype(BITS_OF.get(name, dtype))
    return ArrayLayout(name, bits, shape, fortran)


def array_in_file(layout: ArrayLayout, region: FileRegion) -> Leaf:
    """The array whose bytes start ``region``."""
    if not layout.swapped:
        return with_values(FileTensor(layout.info, region.path, region.offset, layout.strides))
    return array_in_stream(layout, RegionSource(FileRegion(region.path, region.offset, layout.nbytes)))


def array_in_stream(layout: ArrayLayout, source: MemberStream | RegionSource) -> Leaf:
    """The array that a stream holds, compressed or in the other byte order."""
    if layout.strides is not None:
        return UnreadableTensor("big-endian array in Fortran order")
    if not layout.swapped:
        return StreamTensor(layout.info, source)
    parts = 2 if layout.bits.kind == "c" else 1
    return StreamTensor(layout.info, SwappedSource(source, layout.bits.itemsize // parts))


def array_in_memory(array: NDArray[Any], dtype: str | None = None) -> Leaf:
    """A numpy array; ``dtype`` names its type where its own is only that of the bits (``"bfloat16"`` in uint16)."""
    name = dtype or array.dtype.name
    if name not in BITS:
        return UnreadableTensor(name)
    if name in BITS_OF:
        array = array.view(BITS_OF[name])
    return MemoryTensor(TensorInfo("", array.shape, name), array.astype(array.dtype.newbyteorder("="), copy=False))


def with_values(tensor: FileTensor) -> FileTensor | MemoryTensor:
    """A few integers or flags, such as an optimizer's ``step``, come into memory: only floats are read from files."""
    dtype, numel = tensor.info.dtype, tensor.info.numel
    if numel > MAX_VALUES or not dtype.startswith(("int", "uint", "bool")) or tensor.strides is not None:
        return tensor
    content = FileRegion(tensor.path, tensor.offset, numel * BITS[dtype].itemsize).read()
    return MemoryTensor(tensor.info, np.frombuffer(content, BITS[dtype], numel).reshape(tensor.info.shape))


def checked_shape(shape: object, what: str) -> tuple[int, ...]:
    """``shape`` if it is one.

    Raises:
        GradscopeError: it is no sequence of at most 64 sizes.
    """
    if not isinstance(shape, tuple | list) or len(shape) > MAX_DIMENSIONS:
        raise GradscopeError(what, "has an impossible shape")
    if not all(type(extent) is int and 0 <= extent < 1 << 62 for extent in shape):
        raise GradscopeError(what, "has an impossible shape")
    return tuple(shape)


@dataclass(frozen=True, slots=True)
class RegionSource:
    """Opens a stretch of a file as a stream."""

    region: FileRegion

    def __call__(self) -> BinaryIO:
        """A stream at the first byte."""
        return self.region.open()


@dataclass(frozen=True, slots=True)
class SwappedSource:
    """Opens a stream of big-endian numbers as little-endian ones, ``width`` bytes each."""

    source: MemberStream | RegionSource
    width: int

    def __call__(self) -> BinaryIO:
        """A stream at the first number."""
        return cast(BinaryIO, io.BufferedReader(_SwappedStream(self.source(), self.width), 1 << 20))


class _SwappedStream(io.RawIOBase):
    def __init__(self, stream: BinaryIO, width: int) -> None:
        self._stream = stream
        self._width = width

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        content = _read_fully(self._stream, len(view) - len(view) % self._width)
        whole = len(content) - len(content) % self._width
        numbers = np.frombuffer(content, f">u{self._width}", whole // self._width)
        view[:whole] = numbers.astype(f"<u{self._width}").tobytes()
        return whole

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


def _read_fully(stream: BinaryIO, count: int) -> bytes:
    content = bytearray()
    while len(content) < count:
        piece = stream.read(count - len(content))
        if not piece:
            break
        content += piece
    return bytes(content)
