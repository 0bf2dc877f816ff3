"""Whether a stored tensor holds a negative number, which the magnitudes of a spectrum do not tell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gradscope.errors import GradscopeError
from gradscope.sources.stored import FileTensor, MemoryTensor, StoredTensor, read, stored_bytes
from gradscope.spectrum import FLOAT_DTYPES, contiguous_chunks

CHUNK_BYTES = 1 << 20


def holds_negative(tensor: StoredTensor) -> bool:
    """Whether any element is below zero; -0 is not.  A NaN may count.

    Raises GradscopeError where the file cannot be read.
    """
    return any(_any_negative(chunk) for chunk in _chunks(tensor) if chunk.size)


def _any_negative(bits: NDArray[np.unsignedinteger[Any]]) -> bool:
    # As unsigned integers the negative numbers are those above the sign bit alone, which is -0.
    return int(bits.max()) > 1 << (8 * bits.itemsize - 1)


def _chunks(tensor: StoredTensor) -> Iterator[NDArray[np.unsignedinteger[Any]]]:
    """The elements' bits in pieces of bounded size."""
    if isinstance(tensor, FileTensor) and tensor.strides is not None:
        values = read(tensor)
        yield from (chunk.view(f"u{chunk.itemsize}") for chunk in contiguous_chunks(values))
        return
    bits = np.dtype(f"<u{FLOAT_DTYPES[tensor.info.dtype].itemsize}")
    if isinstance(tensor, MemoryTensor):
        yield from (chunk.view(bits) for chunk in contiguous_chunks(tensor.array))
    elif isinstance(tensor, FileTensor):
        with open(tensor.path, "rb") as file:
            file.seek(tensor.offset)
            yield from _of_stream(file, tensor, bits)
    else:
        with tensor.open_stream() as stream:
            yield from _of_stream(stream, tensor, bits)


def _of_stream(
    stream: BinaryIO, tensor: StoredTensor, bits: np.dtype[Any]
) -> Iterator[NDArray[np.unsignedinteger[Any]]]:
    buffer = bytearray(CHUNK_BYTES)
    left, kept = stored_bytes(tensor), 0
    while left:
        data = stream.read(min(left, CHUNK_BYTES - kept))
        if not data:
            raise GradscopeError(tensor.info.name, "its data end early")
        buffer[kept : kept + len(data)] = data
        left, kept = left - len(data), kept + len(data)
        whole = kept // bits.itemsize
        yield np.frombuffer(buffer, bits, whole)
        rest = kept - whole * bits.itemsize
        buffer[:rest] = buffer[whole * bits.itemsize : kept]
        kept = rest
