"""Where a tensor's bytes lie, and the threaded scan over them.

Memory stays bounded by the chunk, whatever the tensor's size: files are read piece by piece into small buffers, never
mapped whole.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any, BinaryIO

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from gradscope._kernels import Scanner
from gradscope.errors import GradscopeError
from gradscope.gradients import Progress
from gradscope.spectrum import FLOAT_DTYPES, MagnitudeSpectrum, contiguous_chunks, scanner_for
from gradscope.tensors import TensorInfo

if sys.byteorder != "little":
    raise ImportError("the stored formats are little endian, and so must be the machine that reads them")

# Below this, starting threads costs more than it saves.
_INLINE_BYTES = 4 << 20
_PIECE_BYTES = 32 << 20
_CHUNK_BYTES = 1 << 20
_MOST_THREADS = 8
# Counts and byte strides must fit 64 bits.
_MOST_ELEMENTS = 1 << 58
_PREAD = hasattr(os, "pread")


@dataclass(frozen=True, slots=True)
class FileTensor:
    """Bytes at ``offset`` of the file ``path``, little endian; ``strides`` are in elements, None where contiguous."""

    info: TensorInfo
    path: str
    offset: int
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class MemoryTensor:
    """A numpy array; bfloat16 stands as ``uint16``, the float8 types as ``uint8``."""

    info: TensorInfo
    array: NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class StreamTensor:
    """Bytes that come only in order (a compressed member): ``open_stream`` gives a stream at the first of them."""

    info: TensorInfo
    open_stream: Callable[[], BinaryIO]


StoredTensor = FileTensor | MemoryTensor | StreamTensor


def stored_bytes(tensor: StoredTensor) -> int:
    """How many bytes the tensor's elements take, without the gaps between them."""
    return tensor.info.numel * FLOAT_DTYPES[tensor.info.dtype].itemsize


def scan(tensors: Sequence[StoredTensor], progress: Progress | None = None) -> list[MagnitudeSpectrum]:
    """The spectrum of every tensor, in their order, read once and in parallel.

    Raises GradscopeError where a file cannot be read or ends before its tensor does.
    """
    sizes = [stored_bytes(tensor) for tensor in tensors]
    total = sum(sizes)
    threads = min(_cpu_count(), _MOST_THREADS)
    if total <= _INLINE_BYTES or threads == 1:
        return _scan_inline(tensors, sizes, total, progress)
    piece_bytes = min(max(total // (4 * threads), _CHUNK_BYTES), _PIECE_BYTES)
    parts: list[list[MagnitudeSpectrum]] = [[] for _ in tensors]
    done = 0
    for batch, spectra in _in_threads(list(_batches(tensors, sizes, piece_bytes)), threads):
        for piece, spectrum in zip(batch, spectra, strict=True):
            parts[piece.index].append(spectrum)
            done += piece.nbytes
        if progress is not None:
            progress(done, total)
    return [MagnitudeSpectrum.merge(part) for part in parts]


def read(tensor: StoredTensor) -> NDArray[np.floating[Any]]:
    """The tensor whole, of its own shape: float64 as it is, everything else as float32."""
    if isinstance(tensor, MemoryTensor):
        return _decode(np.asarray(tensor.array), tensor.info.dtype).reshape(tensor.info.shape)
    if isinstance(tensor, StreamTensor):
        # Gathered as it comes, so that a false size cannot ask for more memory than there are bytes.
        data = bytearray().join(bytes(chunk) for chunk in _stream_chunks(tensor))
        return _decode(np.frombuffer(data, FLOAT_DTYPES[tensor.info.dtype]), tensor.info.dtype).reshape(
            tensor.info.shape
        )
    layout = _layout(tensor)
    _check_extent(tensor, layout)
    stored = np.empty(layout.span, FLOAT_DTYPES[tensor.info.dtype])
    try:
        with open(tensor.path, "rb") as file:
            file.seek(tensor.offset)
            if file.readinto(stored.view(np.uint8).data) < stored.nbytes:
                raise _ends_early(tensor)
    except OSError as error:
        raise GradscopeError(tensor.path, error.strerror or "cannot be read") from error
    decoded = _decode(stored, tensor.info.dtype)
    if tensor.strides is None:
        return decoded.reshape(tensor.info.shape)
    # A repeated dimension stays a view, so that a few bytes cannot ask for a huge array.
    strides = tuple(stride * decoded.itemsize for stride in tensor.strides)
    return as_strided(decoded, tensor.info.shape, strides, writeable=False)


@dataclass(frozen=True, slots=True)
class _Piece:
    """``nbytes`` of a tensor from byte ``start`` on; the whole of it where it cannot be cut."""

    index: int
    tensor: StoredTensor
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """A strided view as its dense or gapped dimensions, largest stride first, and how often they are repeated."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    repeats: int
    span: int

    @property
    def dense(self) -> bool:
        return self.span == math.prod(self.shape)


def _layout(tensor: FileTensor) -> _Layout:
    numel = tensor.info.numel
    if numel > _MOST_ELEMENTS:
        raise GradscopeError(tensor.path, f"tensor {tensor.info.name} has {numel} elements, which is out of reach")
    if numel == 0:
        return _Layout((0,), (1,), 1, 0)
    if tensor.strides is None:
        return _Layout((numel,), (1,), 1, numel)
    if len(tensor.strides) != len(tensor.info.shape) or any(stride < 0 for stride in tensor.strides):
        raise GradscopeError(tensor.path, f"tensor {tensor.info.name} has impossible strides")
    sizes = [(stride, size) for stride, size in zip(tensor.strides, tensor.info.shape, strict=True) if size > 1]
    repeats = math.prod(size for stride, size in sizes if stride == 0)
    dims = sorted(((stride, size) for stride, size in sizes if stride), reverse=True)
    span = 1 + sum(stride * (size - 1) for stride, size in dims)
    if math.prod(size for _, size in dims) > span:
        raise GradscopeError(tensor.path, f"tensor {tensor.info.name} overlaps itself")
    return _Layout(tuple(size for _, size in dims), tuple(stride for stride, _ in dims), repeats, span)


def _cpu_count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _scan_inline(
    tensors: Sequence[StoredTensor], sizes: list[int], total: int, progress: Progress | None
) -> list[MagnitudeSpectrum]:
    pieces = [_Piece(i, tensor, 0, size) for i, (tensor, size) in enumerate(zip(tensors, sizes, strict=True))]
    if progress is None:
        return _scan_pieces(pieces)
    spectra: list[MagnitudeSpectrum] = []
    done = 0
    for piece in pieces:
        spectra += _scan_pieces([piece])
        done += piece.nbytes
        progress(done, total)
    return spectra


def _batches(tensors: Sequence[StoredTensor], sizes: list[int], piece_bytes: int) -> Iterator[list[_Piece]]:
    """Pieces of large tensors, and small tensors gathered until they are worth a task."""
    batch: list[_Piece] = []
    batch_bytes = 0
    for i, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
        if size <= piece_bytes or not _divisible(tensor):
            batch.append(_Piece(i, tensor, 0, size))
            batch_bytes += size
        else:
            for start in range(0, size, piece_bytes // 8 * 8):
                yield [_Piece(i, tensor, start, min(piece_bytes // 8 * 8, size - start))]
        if batch_bytes >= piece_bytes:
            yield batch
            batch, batch_bytes = [], 0
    if batch:
        yield batch


def _divisible(tensor: StoredTensor) -> bool:
    if isinstance(tensor, FileTensor):
        layout = _layout(tensor)
        _check_extent(tensor, layout)
        return layout.dense and layout.repeats == 1
    return isinstance(tensor, MemoryTensor) and tensor.array.flags.c_contiguous and tensor.array.dtype.isnative


def _in_threads(batches: list[list[_Piece]], threads: int) -> Iterator[tuple[list[_Piece], list[MagnitudeSpectrum]]]:
    """Each batch with its spectra, as they are done; an exception of a thread is raised here.

    Plain threads: concurrent.futures takes longer to load than a policy's gradients to read.
    """
    waiting = deque(batches)
    finished: SimpleQueue[tuple[list[_Piece], list[MagnitudeSpectrum] | BaseException]] = SimpleQueue()

    def work() -> None:
        while waiting:
            try:
                batch = waiting.popleft()
            except IndexError:
                return
            try:
                finished.put((batch, _scan_pieces(batch)))
            except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
                finished.put((batch, error))

    workers = [Thread(target=work, name=f"scan-{number}", daemon=True) for number in range(threads)]
    for worker in workers:
        worker.start()
    try:
        for _ in batches:
            batch, spectra = finished.get()
            if isinstance(spectra, BaseException):
                raise spectra
            yield batch, spectra
    finally:
        waiting.clear()
        for worker in workers:
            worker.join()


def _scan_pieces(pieces: list[_Piece]) -> list[MagnitudeSpectrum]:
    spectra: list[MagnitudeSpectrum] = []
    file: _OpenFile | None = None
    try:
        for piece in pieces:
            tensor = piece.tensor
            if isinstance(tensor, FileTensor) and (file is None or file.path != tensor.path):
                if file is not None:
                    file.close()
                file = _OpenFile(tensor.path)
            spectra.append(_scan_piece(piece, file))
    finally:
        if file is not None:
            file.close()
    return spectra


def _scan_piece(piece: _Piece, file: _OpenFile | None) -> MagnitudeSpectrum:
    tensor = piece.tensor
    scanner = scanner_for(tensor.info.dtype)
    repeats = 1
    try:
        if isinstance(tensor, FileTensor):
            assert file is not None
            repeats = _feed_file_tensor(scanner, file, tensor, piece)
        elif isinstance(tensor, MemoryTensor):
            _feed_memory(scanner, tensor, piece)
        else:
            for chunk in _stream_chunks(tensor):
                scanner.feed(chunk)
    except BaseException:
        # The thread's scanner serves the next tensor too and must not carry half of this one over.
        scanner.take()
        raise
    spectrum = MagnitudeSpectrum.from_scan(scanner)
    return spectrum if repeats == 1 else spectrum.repeated(repeats)


class _OpenFile:
    """A file that one thread reads at any offset."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise GradscopeError(path, error.strerror or "cannot be opened") from error

    def close(self) -> None:
        os.close(self.fd)

    def read(self, nbytes: int, offset: int) -> bytes:
        """At most ``nbytes``; fewer only at the end of the file."""
        if _PREAD:
            data = os.pread(self.fd, nbytes, offset)
        else:
            os.lseek(self.fd, offset, os.SEEK_SET)
            data = os.read(self.fd, nbytes)
        if data and len(data) < nbytes:
            data += self.read(nbytes - len(data), offset + len(data))
        return data


def _check_extent(tensor: FileTensor, layout: _Layout) -> None:
    """Refuses a tensor that reaches beyond its file before anything is cut or allocated for it."""
    try:
        size = os.path.getsize(tensor.path)
    except OSError as error:
        raise GradscopeError(tensor.path, error.strerror or "cannot be read") from error
    if layout.span and tensor.offset + layout.span * FLOAT_DTYPES[tensor.info.dtype].itemsize > size:
        raise _ends_early(tensor)


def _ends_early(tensor: StoredTensor) -> GradscopeError:
    what = tensor.path if isinstance(tensor, FileTensor) else tensor.info.name
    return GradscopeError(what, f"the data end before tensor {tensor.info.name} does")


def _feed_file_tensor(scanner: Scanner, file: _OpenFile, tensor: FileTensor, piece: _Piece) -> int:
    """Returns how often the elements that were fed stand in the tensor."""
    try:
        if tensor.strides is None:
            _feed_range(scanner, file, tensor.offset + piece.start, piece.nbytes)
            return 1
        layout = _layout(tensor)
        stored = FLOAT_DTYPES[tensor.info.dtype]
        if layout.dense:
            nbytes = min(layout.span * stored.itemsize, piece.nbytes)
            _feed_range(scanner, file, tensor.offset + piece.start, nbytes)
        else:
            _feed_gapped(scanner, file, tensor.offset, layout.shape, layout.strides, stored)
    except EOFError as error:
        raise _ends_early(tensor) from error
    except OSError as error:
        raise GradscopeError(tensor.path, error.strerror or "cannot be read") from error
    return layout.repeats


def _feed_range(scanner: Scanner, file: _OpenFile, offset: int, nbytes: int) -> None:
    if _PREAD:
        scanner.feed_file(file.fd, offset, nbytes)
        return
    for start in range(0, nbytes, _CHUNK_BYTES):
        want = min(_CHUNK_BYTES, nbytes - start)
        data = file.read(want, offset + start)
        if len(data) < want:
            raise EOFError
        scanner.feed(data)


def _feed_gapped(
    scanner: Scanner,
    file: _OpenFile,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    stored: np.dtype[Any],
) -> None:
    """Reads a view with gaps in slabs of at most a chunk, cut along the largest stride first."""
    inner = 1 + sum(stride * (size - 1) for stride, size in zip(strides[1:], shape[1:], strict=True))
    rows = max((_CHUNK_BYTES // stored.itemsize - inner) // strides[0] + 1, 1)
    for start in range(0, shape[0], rows):
        at = offset + start * strides[0] * stored.itemsize
        height = min(rows, shape[0] - start)
        span = strides[0] * (height - 1) + inner
        if span * stored.itemsize > _CHUNK_BYTES:
            _feed_gapped(scanner, file, at, shape[1:], strides[1:], stored)
            continue
        data = file.read(span * stored.itemsize, at)
        if len(data) < span * stored.itemsize:
            raise EOFError
        steps = tuple(stride * stored.itemsize for stride in strides)
        view = as_strided(np.frombuffer(data, stored), (height, *shape[1:]), steps, writeable=False)
        scanner.feed(np.ascontiguousarray(view))


def _feed_memory(scanner: Scanner, tensor: MemoryTensor, piece: _Piece) -> None:
    array = tensor.array
    if array.flags.c_contiguous and array.dtype.isnative:
        flat = array.reshape(-1)
        scanner.feed(flat[piece.start // flat.itemsize : (piece.start + piece.nbytes) // flat.itemsize])
        return
    for chunk in contiguous_chunks(array):
        scanner.feed(chunk)


def _stream_chunks(tensor: StreamTensor) -> Iterator[memoryview]:
    """The tensor's bytes in chunks of whole elements, in one buffer that is used again."""
    left = stored_bytes(tensor)
    buffer = memoryview(bytearray(min(left, _CHUNK_BYTES)))
    with tensor.open_stream() as stream:
        while left:
            chunk = buffer[: min(left, len(buffer))]
            at = 0
            while at < len(chunk):
                data = stream.read(len(chunk) - at)
                if not data:
                    raise _ends_early(tensor)
                chunk[at : at + len(data)] = data
                at += len(data)
            yield chunk
            left -= len(chunk)


def _decode(stored: NDArray[Any], dtype: str) -> NDArray[np.floating[Any]]:
    if dtype == "bfloat16":
        return np.asarray(np.left_shift(stored, 16, dtype=np.uint32).view(np.float32))
    if dtype.startswith("float8"):
        return np.take(_float8_values(dtype), stored)
    return np.asarray(stored, np.float64 if dtype == "float64" else np.float32)


@functools.cache
def _float8_values(dtype: str) -> NDArray[np.float32]:
    """The value of each of the 256 bytes (OCP 8-bit floating point: e4m3fn has no infinity and one NaN)."""
    mantissa_bits, bias = (3, 7) if dtype == "float8_e4m3fn" else (2, 15)
    byte = np.arange(256)
    fraction, exponent = byte & ((1 << mantissa_bits) - 1), (byte & 127) >> mantissa_bits
    hidden = np.where(exponent > 0, 1 << mantissa_bits, 0)
    value: NDArray[np.float64] = (hidden + fraction) * 2.0 ** (np.maximum(exponent, 1) - bias - mantissa_bits)
    if dtype == "float8_e4m3fn":
        value[byte & 127 == 127] = np.nan
    else:
        value[(exponent == 31) & (fraction == 0)] = np.inf
        value[(exponent == 31) & (fraction > 0)] = np.nan
    return np.asarray(np.where(byte < 128, value, -value), np.float32)
