"""The elements of stored tensors as they are, integers and flags too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from gradscope.errors import GradscopeError
from gradscope.sources.formats.file_region import FileRegion
from gradscope.sources.formats.numpy_arrays import BITS, BITS_OF
from gradscope.sources.stored import FileTensor, MemoryTensor, StoredTensor, StreamTensor

if TYPE_CHECKING:
    import torch

_PIECE_BYTES = 1 << 20


def elements_of(tensor: StoredTensor, what: str) -> NDArray[Any] | torch.Tensor:
    """The tensor whole, writable, of its own shape and dtype: an array, or torch's where numpy has no such dtype.

    Raises:
        GradscopeError: the file ``what`` ends before the tensor does.
    """
    bits = np.require(_bits(tensor, what), requirements=["C", "W"])
    if tensor.info.dtype not in BITS_OF:
        return bits
    import torch

    dtype: torch.dtype = getattr(torch, tensor.info.dtype)
    return torch.from_numpy(bits.view(np.int16 if bits.itemsize == 2 else np.uint8)).view(dtype)


def as_torch(elements: NDArray[Any] | torch.Tensor) -> torch.Tensor:
    """The same as a torch tensor, without a copy; wide unsigned integers become int64, which torch can compute on."""
    import torch

    if isinstance(elements, torch.Tensor):
        return elements
    if elements.dtype.kind == "u" and elements.itemsize > 1:
        elements = elements.astype(np.int64)
    return torch.from_numpy(elements)


def _bits(tensor: StoredTensor, what: str) -> NDArray[Any]:
    dtype, shape = BITS[tensor.info.dtype], tensor.info.shape
    if isinstance(tensor, MemoryTensor):
        return np.asarray(tensor.array).reshape(shape)
    if isinstance(tensor, StreamTensor):
        return np.frombuffer(_streamed(tensor, tensor.info.numel * dtype.itemsize, what), dtype).reshape(shape)
    if tensor.strides is None or not tensor.info.numel:
        return _stretch(tensor, tensor.info.numel, dtype, what).reshape(shape)
    span = 1 + sum(stride * (extent - 1) for stride, extent in zip(tensor.strides, shape, strict=True))
    strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
    return as_strided(_stretch(tensor, span, dtype, what), shape, strides, writeable=False)


def _stretch(tensor: FileTensor, count: int, dtype: np.dtype[Any], what: str) -> NDArray[Any]:
    content = FileRegion(tensor.path, tensor.offset, count * dtype.itemsize).read()
    if len(content) < count * dtype.itemsize:
        raise _ends_early(tensor, what)
    return np.frombuffer(content, dtype, count)


def _streamed(tensor: StreamTensor, nbytes: int, what: str) -> bytearray:
    content = bytearray()
    with tensor.open_stream() as stream:
        # In pieces, so that a false size cannot ask for more memory than there are bytes.
        while len(content) < nbytes:
            piece = stream.read(min(_PIECE_BYTES, nbytes - len(content)))
            if not piece:
                raise _ends_early(tensor, what)
            content += piece
    return content


def _ends_early(tensor: StoredTensor, what: str) -> GradscopeError:
    return GradscopeError(what, f"ends before its tensor {tensor.info.name!r} does")
