"""numpy's files: ``.npy`` (one array) and ``.npz`` (a zip of them).

The header is that of numpy's ``lib.format`` (versions 1 to 3): a Python literal with ``descr``, ``fortran_order`` and
``shape``.  Arrays of objects are pickles and are never read.
"""

from __future__ import annotations

import ast
import re
import struct
from typing import Any, BinaryIO

import numpy as np

from gradscope.errors import GradscopeError
from gradscope.sources.formats.file_region import FileRegion
from gradscope.sources.formats.magic import NPY_MAGIC
from gradscope.sources.formats.numpy_arrays import ArrayLayout, array_in_file, array_in_stream, checked_shape, layout_of
from gradscope.sources.formats.tree import Leaf, UnreadableTensor
from gradscope.sources.formats.zip_members import ZipMembers

MAX_HEADER_BYTES = 1 << 16
DESCR = re.compile(r"[<>|=]?[a-zA-Z?]\d{0,4}|[a-z]+\d+(_[a-z0-9]+)?")


def read_npy(region: FileRegion, what: str) -> Leaf:
    """The array of a ``.npy`` file.

    Raises:
        GradscopeError: the header is damaged, the file is truncated, or the array holds Python objects.
    """
    with region.open() as stream:
        layout, start = _read_header(stream, what)
    if isinstance(layout, UnreadableTensor):
        return layout
    if layout.nbytes > region.size - start:
        raise GradscopeError(what, f"is truncated: {layout.nbytes:,} bytes are promised, {region.size - start:,} there")
    return array_in_file(layout, FileRegion(region.path, region.offset + start, layout.nbytes))


def is_npz(members: ZipMembers) -> bool:
    """Whether a zip file holds arrays as ``numpy.savez`` writes them."""
    return any(name.endswith(".npy") for name in members.names)


def read_npz(members: ZipMembers) -> dict[str, Leaf]:
    """The arrays of a ``.npz`` file by name.

    Raises:
        GradscopeError: a member is damaged, or is no array.
    """
    return {_array_name(name): _read_member(members, name) for name in members.names if name.endswith(".npy")}


def _array_name(member: str) -> str:
    return member[: -len(".npy")]


def _read_member(members: ZipMembers, name: str) -> Leaf:
    what = f"{members.what}: {name}"
    if members.is_stored(name):
        return read_npy(members.stored_region(name), what)
    with members.open(name) as stream:
        layout, start = _read_header(stream, what)
    if isinstance(layout, UnreadableTensor):
        return layout
    if layout.nbytes != members.size(name) - start:
        raise GradscopeError(what, f"promises {layout.nbytes:,} bytes and declares {members.size(name) - start:,}")
    if layout.strides is not None:
        region = members.inflated_region(name)
        return array_in_file(layout, FileRegion(region.path, region.offset + start, layout.nbytes))
    return array_in_stream(layout, members.inflating(name, start))


def _read_header(stream: BinaryIO, what: str) -> tuple[ArrayLayout | UnreadableTensor, int]:
    """The array's layout, and how many bytes precede its elements."""
    prefix = stream.read(8)
    if prefix[:6] != NPY_MAGIC or len(prefix) < 8:
        raise GradscopeError(what, "is not a .npy array")
    if prefix[6] not in (1, 2, 3):
        raise GradscopeError(what, f"is a .npy array of the unknown version {prefix[6]}")
    width, layout = (2, "<H") if prefix[6] == 1 else (4, "<I")
    raw_length = stream.read(width)
    length = struct.unpack(layout, raw_length)[0] if len(raw_length) == width else 0
    if not 0 < length <= MAX_HEADER_BYTES:
        raise GradscopeError(what, "has a damaged .npy header")
    text = stream.read(length)
    if len(text) != length:
        raise GradscopeError(what, "is a truncated .npy array")
    return _parse_header(text, "utf-8" if prefix[6] == 3 else "latin-1", what), 8 + width + length


def _parse_header(text: bytes, encoding: str, what: str) -> ArrayLayout | UnreadableTensor:
    try:
        header: Any = ast.literal_eval(text.decode(encoding).strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise GradscopeError(what, "has a damaged .npy header") from None
    if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
        raise GradscopeError(what, "has a damaged .npy header")
    shape = checked_shape(header["shape"], what)
    descr = header["descr"]
    if not isinstance(descr, str):
        return UnreadableTensor("structured array")
    if not DESCR.fullmatch(descr):
        raise GradscopeError(what, "has an unknown dtype in its .npy header")
    if descr.lstrip("<>|=").startswith("O"):
        raise GradscopeError(what, "holds Python objects, which are never unpickled")
    layout = layout_of(_dtype(descr, what), shape, header["fortran_order"] is True)
    return layout or UnreadableTensor(_reason(descr))


def _dtype(descr: str, what: str) -> np.dtype[Any] | str:
    if descr in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        return descr
    try:
        return np.dtype(descr)
    except (TypeError, ValueError):
        raise GradscopeError(what, f"has the unknown dtype {descr!r}") from None


def _reason(descr: str) -> str:
    if descr.lstrip("<>|=") in ("V2", "V1"):
        return f"{descr} (numpy saved a type of ml_dtypes, such as bfloat16, without its name)"
    return descr
