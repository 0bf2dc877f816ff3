"""PyTorch's files read without torch: zip archives with a pickled tree and one member per storage.

The layout is that of ``torch.save`` since 1.6 (``caffe2/serialize/inline_container.h``): under one top folder
``data.pkl``, ``data/0``, ``data/1``… stored uncompressed and aligned, and ``byteorder``.  The pickle names each storage
by a persistent id, ``("storage", class, key, device, elements)``.  Older files, which are no zips, need torch itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

import numpy as np

from gradscope.errors import GradscopeError
from gradscope.sources.formats.file_region import FileRegion
from gradscope.sources.formats.known_constructors import plain_constructors
from gradscope.sources.formats.numpy_arrays import BITS, RegionSource, SwappedSource, checked_shape, with_values
from gradscope.sources.formats.pickles import MALFORMED, Constructor, MalformedPickleError, read_pickle
from gradscope.sources.formats.tree import Global, Leaf, Opaque, Tree, UnreadableTensor
from gradscope.sources.formats.zip_members import ZipMembers
from gradscope.sources.stored import FileTensor, MemoryTensor, StreamTensor
from gradscope.tensors import TensorInfo

# Legacy files start with a pickled magic number (torch/serialization.py); in protocol 2 it begins so.
# How torch says what it will not import.
REFUSED_GLOBAL = re.compile(r"\bGLOBAL ([\w.]+)")
MAX_COPIED_BYTES = 1 << 28
# Expanded tensors repeat their elements; beyond this the file is made to keep its reader busy.
MAX_EXPANDED_ELEMENTS = 1 << 28

STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "UntypedStorage": "",
    "_UntypedStorage": "",
}
DTYPE_NAMES = {"double": "float64", "float": "float32", "half": "float16", "long": "int64", "int": "int32"}
DTYPE_NAMES |= {"short": "int16", "cfloat": "complex64", "cdouble": "complex128"}


def is_torch_archive(members: ZipMembers) -> bool:
    """Whether a zip file is one of ``torch.save`` or ``torch.jit.save``."""
    return any(name.count("/") == 1 and name.endswith("/data.pkl") for name in members.names)


def read_torch_archive(members: ZipMembers) -> Tree:
    """The object that ``torch.save`` put into a zip archive, with its tensors left in the file.

    A TorchScript module comes out as an ``Opaque`` whose state holds its parameters and buffers.

    Raises:
        GradscopeError: the archive is damaged, or its pickle is.
    """
    tops = [name[: -len("data.pkl")] for name in members.names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(tops) != 1:
        raise GradscopeError(members.what, "is a zip archive without exactly one data.pkl")
    archive = _Archive(members, tops[0])
    region = members.inflated_region(f"{tops[0]}data.pkl")
    constructors = {**plain_constructors(region), **_torch_constructors(archive)}
    return read_pickle(region, members.what, constructors, archive.storage)


def is_script(members: ZipMembers) -> bool:
    """Whether a PyTorch archive is a TorchScript module, which holds weights and code."""
    return any(name.endswith("/constants.pkl") for name in members.names)


def read_legacy_torch(region: FileRegion, what: str) -> Tree:
    """A file of ``torch.save`` before 1.6, read by ``torch.load(weights_only=True)``; its tensors lie in memory.

    Raises:
        GradscopeError: torch is missing, or refuses the file.
    """
    from gradscope.sources.arrays import tree_of

    try:
        import torch
    except ImportError:
        raise GradscopeError(
            what,
            "is in PyTorch's format from before 1.6, which torch itself must read",
            "pip install 'gradscope[torch]'",
        ) from None
    try:
        with region.open() as stream:
            loaded = torch.load(stream, map_location="cpu", weights_only=True)
    # torch.load answers damaged files with whatever its readers meet.
    except (*MALFORMED, RuntimeError, AssertionError, EOFError, MemoryError, OSError, UnpicklingError) as error:
        raise _refusal(what, error) from None
    return tree_of(loaded, what)


def _refusal(what: str, error: BaseException) -> GradscopeError:
    named = REFUSED_GLOBAL.search(str(error))
    if named is None:
        return GradscopeError(what, "torch.load(weights_only=True) refuses it: it is damaged, or no file of torch.save")
    return GradscopeError(
        what,
        f"torch.load(weights_only=True) refuses it: it holds {named[1]}, which is no tensor and no plain container",
        "if you trust it, load it with torch and save its tensors alone, by name",
    )


# --- storages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Storage:
    """A flat run of elements: a zip member.  ``dtype`` is empty where only the tensors tell it."""

    archive: _Archive
    member: str
    dtype: str
    nbytes: int


class _Archive:
    """The storages of one archive."""

    def __init__(self, members: ZipMembers, top: str) -> None:
        self.members = members
        self._top = top
        order = members.read(f"{top}byteorder", 64) if f"{top}byteorder" in members else b"little"
        self.big_endian = order == b"big"
        self._regions: dict[str, FileRegion] = {}

    def storage(self, identity: Any) -> Storage | UnreadableTensor:
        """What a persistent id of the pickle refers to."""
        if not (isinstance(identity, tuple) and len(identity) == 5 and identity[0] == "storage"):
            raise MalformedPickleError("it refers to something other than a storage")
        _, cls, key, _device, elements = identity
        if not (isinstance(cls, Global) and isinstance(key, str) and type(elements) is int and elements >= 0):
            raise MalformedPickleError("it refers to an odd storage")
        dtype = STORAGE_DTYPES.get(cls.name)
        if dtype is None:
            return UnreadableTensor(cls.name)
        nbytes = elements * (BITS[dtype].itemsize if dtype else 1)
        member = f"{self._top}data/{key}"
        # torch leaves out the member of an empty storage in some versions.
        if nbytes > (self.members.size(member) if nbytes or member in self.members else 0):
            raise MalformedPickleError(f"storage {key!r} is larger than its member")
        return Storage(self, member, dtype, nbytes)

    def region(self, member: str) -> FileRegion:
        if member not in self._regions:
            self._regions[member] = self.members.inflated_region(member)
        return self._regions[member]


# --- tensors ---------------------------------------------------------------------------------------------------------


def _torch_constructors(archive: _Archive) -> dict[tuple[str, str], Constructor]:
    utils: dict[str, Constructor] = {
        "_rebuild_tensor": _rebuild_tensor,
        "_rebuild_tensor_v2": _rebuild_tensor,
        "_rebuild_tensor_v3": _rebuild_tensor_v3,
        "_rebuild_parameter": lambda data, *_rest: data,
        "_rebuild_parameter_with_state": lambda data, *_rest: data,
        "_rebuild_sparse_tensor": lambda *_: UnreadableTensor("sparse tensor"),
        "_rebuild_sparse_csr_tensor": lambda *_: UnreadableTensor("sparse tensor"),
        "_rebuild_nested_tensor": lambda *_: UnreadableTensor("nested tensor"),
        "_rebuild_qtensor": lambda *_: UnreadableTensor("quantized tensor"),
        "_rebuild_meta_tensor_no_storage": lambda *_: UnreadableTensor("meta tensor without elements"),
        "_rebuild_wrapper_subclass": lambda *_: UnreadableTensor("tensor subclass without elements"),
        "_rebuild_device_tensor_from_numpy": lambda data, *_rest: data,
        "_rebuild_device_tensor_from_cpu_tensor": lambda data, *_rest: data,
    }
    table: dict[tuple[str, str], Constructor] = {("torch._utils", name): make for name, make in utils.items()}

    def rebuild_from_type(function: Any, cls: Any, args: Any, *_state: Any) -> Any:
        known = table.get((function.module, function.name)) if isinstance(function, Global) else None
        if known is None or not isinstance(args, tuple):
            return Opaque("", "tensor subclass", (function, cls, args))
        return known(*args)

    table |= {
        ("torch._tensor", "_rebuild_from_type"): rebuild_from_type,
        ("torch._tensor", "_rebuild_from_type_v2"): rebuild_from_type,
        ("torch", "Size"): lambda sizes=(): tuple(sizes) if isinstance(sizes, list | tuple) else (),
        ("torch", "device"): lambda *parts: ":".join(str(part) for part in parts if isinstance(part, str | int)),
    }
    return table


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_rest: Any) -> Leaf:
    if isinstance(storage, UnreadableTensor):
        return storage
    if not isinstance(storage, Storage):
        return UnreadableTensor("tensor whose storage is not in the archive")
    if not storage.dtype:
        raise MalformedPickleError("a tensor has no dtype")
    return _view(storage, storage.dtype, offset, size, stride)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_rest: Any
) -> Leaf:
    if not isinstance(storage, Storage):
        return _rebuild_tensor(storage, offset, size, stride)
    if not (isinstance(dtype, Global) and dtype.module == "torch"):
        raise MalformedPickleError("a tensor has no dtype")
    name = DTYPE_NAMES.get(dtype.name, dtype.name)
    return _view(storage, name, offset, size, stride) if name in BITS else UnreadableTensor(name)


def _view(storage: Storage, dtype: str, offset: Any, size: Any, stride: Any) -> Leaf:
    what = storage.archive.members.what
    shape, strides = checked_shape(size, what), checked_shape(stride, what)
    if len(shape) != len(strides) or type(offset) is not int or offset < 0:
        raise MalformedPickleError("a tensor has an impossible shape")
    info = TensorInfo("", shape, dtype)
    elements = storage.nbytes // BITS[dtype].itemsize
    last = offset + sum((extent - 1) * step for extent, step in zip(shape, strides, strict=True))
    if info.numel and last >= elements:
        raise MalformedPickleError("a tensor reaches beyond its storage")
    if info.numel > max(elements, MAX_EXPANDED_ELEMENTS):
        raise MalformedPickleError(f"a tensor repeats {elements:,} elements to {info.numel:,}")
    if not info.numel:
        return MemoryTensor(info, np.zeros(shape, BITS[dtype]))
    return _placed(storage, info, offset, None if _is_contiguous(shape, strides) else strides)


def _placed(storage: Storage, info: TensorInfo, offset: int, strides: tuple[int, ...] | None) -> Leaf:
    archive, width = storage.archive, BITS[info.dtype].itemsize
    part = 2 if info.dtype.startswith("complex") else 1
    if strides is None and not archive.members.is_stored(storage.member):
        stream = archive.members.inflating(storage.member, offset * width)
        return StreamTensor(info, SwappedSource(stream, width // part) if archive.big_endian and width > 1 else stream)
    region = archive.region(storage.member)
    if not archive.big_endian or width == 1:
        return with_values(FileTensor(info, region.path, region.offset + offset * width, strides))
    if strides is None:
        source = RegionSource(FileRegion(region.path, region.offset + offset * width, info.numel * width))
        return StreamTensor(info, SwappedSource(source, width // part))
    return _big_endian_view(FileRegion(region.path, region.offset, storage.nbytes), info, offset, strides)


def _big_endian_view(region: FileRegion, info: TensorInfo, offset: int, strides: tuple[int, ...]) -> Leaf:
    if region.size > MAX_COPIED_BYTES:
        return UnreadableTensor("strided view of a large big-endian storage")
    bits = BITS[info.dtype]
    whole = np.frombuffer(region.read(), bits.newbyteorder(">"), region.size // bits.itemsize)
    view = np.lib.stride_tricks.as_strided(whole[offset:], info.shape, [step * bits.itemsize for step in strides])
    return MemoryTensor(info, view.astype(bits))


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for extent, step in zip(reversed(shape), reversed(strides), strict=True):
        if extent != 1 and step != expected:
            return False
        expected *= extent
    return True
