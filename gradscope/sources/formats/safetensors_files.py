"""safetensors files: an 8-byte length, a JSON header with every tensor's offsets, then the tensors' bytes.

The format is specified at https://github.com/huggingface/safetensors (README, "Format"): offsets are relative to the
end of the header, little-endian, in C order, without holes or overlaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from gradscope.errors import GradscopeError
from gradscope.sources.formats.file_region import FileRegion
from gradscope.sources.formats.numpy_arrays import BITS, checked_shape, with_values
from gradscope.sources.formats.tree import Leaf, UnreadableTensor
from gradscope.sources.stored import FileTensor
from gradscope.tensors import TensorInfo

# The reference implementation allows 100 MB; parsed JSON takes up to thirty times its size in memory, and 300,000
# tensors need less than this.
MAX_HEADER_BYTES = 32 << 20
MAX_INDEX_BYTES = 32 << 20
INDEX_SUFFIX = ".index.json"
# The metadata of a batch that gradscope captured: JSON.
CAPTURED_BATCH = "gradscope.batch"
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}


def looks_like_safetensors(head: bytes, size: int) -> bool:
    """Whether a file of ``size`` bytes that starts with ``head`` is meant as safetensors."""
    if len(head) < 9 or head[8:9] != b"{":
        return False
    (length,) = struct.unpack_from("<Q", head)
    # A length that lies is damage, to be told as such, as long as the rest looks right.
    return bool(length <= size - 8 or b'"' in head[9:16])


def read_safetensors(region: FileRegion, what: str) -> tuple[dict[str, Leaf], dict[str, str]]:
    """The tensors of one file by name, in the order in which they lie in it, and what its writer noted beside them.

    Raises:
        GradscopeError: the header is damaged, or its offsets leave holes, overlap, or contradict a shape or the size.
    """
    header, length = _header(region, what)
    noted = header.get("__metadata__")
    entries = _entries(header, what)
    _check_offsets(entries, region.size - 8 - length, what)
    tensors = {name: _tensor(name, entry, region, 8 + length, what) for name, entry in entries.items()}
    metadata = noted if isinstance(noted, dict) else {}
    return tensors, {name: text for name, text in metadata.items() if isinstance(text, str)}


def _header(region: FileRegion, what: str) -> tuple[dict[str, Any], int]:
    """The parsed header, and its length in bytes."""
    with region.open() as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise GradscopeError(what, "is a truncated safetensors file")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise GradscopeError(what, f"is a damaged safetensors file (a header of {length:,} bytes)")
        if length > region.size - 8:
            raise GradscopeError(what, f"is a truncated safetensors file (a header of {length:,} bytes is promised)")
        return parse_json(stream.read(length), what), length


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object without duplicate keys.

    Raises:
        GradscopeError: it is none.
    """
    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise GradscopeError(what, f"its JSON header is damaged ({str(error)[:80]})") from None
    if not isinstance(parsed, dict):
        raise GradscopeError(what, "its JSON header is no object")
    return parsed


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("duplicate keys")
    return mapping


class _Entry:
    __slots__ = ("dtype", "shape", "start", "stop")

    def __init__(self, dtype: str, shape: tuple[int, ...], start: int, stop: int) -> None:
        self.dtype = dtype
        self.shape = shape
        self.start = start
        self.stop = stop


def _entries(header: dict[str, Any], what: str) -> dict[str, _Entry]:
    entries = {}
    for name, value in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(value, dict) or not isinstance(value.get("dtype"), str):
            raise GradscopeError(what, f"its header describes {name!r} in an unknown way")
        offsets = value.get("data_offsets")
        if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets)):
            raise GradscopeError(what, f"its header gives no offsets for {name!r}")
        shape = checked_shape(value.get("shape"), f"{what}: {name}")
        entries[name] = _Entry(value["dtype"], shape, *offsets)
    return dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))


def _check_offsets(entries: dict[str, _Entry], size: int, what: str) -> None:
    end = 0
    for name, entry in entries.items():
        if entry.start < 0 or entry.stop < entry.start:
            raise GradscopeError(what, f"the offsets of {name!r} are impossible")
        if entry.stop > size:
            raise GradscopeError(what, f"is truncated or damaged: {name!r} reaches beyond its end")
        if entry.start != end:
            raise GradscopeError(what, f"{name!r} {'overlaps' if entry.start < end else 'leaves a hole after'} another")
        end = entry.stop
    if end != size:
        raise GradscopeError(what, f"holds {size - end:,} bytes more than its header describes")


def _tensor(name: str, entry: _Entry, region: FileRegion, base: int, what: str) -> Leaf:
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        return UnreadableTensor(entry.dtype)
    if math.prod(entry.shape) * BITS[dtype].itemsize != entry.stop - entry.start:
        raise GradscopeError(what, f"the bytes of {name!r} do not match its shape and dtype")
    return with_values(
        FileTensor(TensorInfo(name, entry.shape, dtype), region.path, region.offset + base + entry.start)
    )


# --- shards ----------------------------------------------------------------------------------------------------------


def shards_of_index(path: Path) -> dict[Path, tuple[str, ...]]:
    """The files that a ``*.index.json`` names, in its order, each with the tensors it must hold; they lie beside it.

    Raises:
        GradscopeError: it is no index, or a shard's name leads elsewhere or to another index.
    """
    what = str(path)
    region = FileRegion.whole(path)
    if region.size > MAX_INDEX_BYTES:
        raise GradscopeError(what, "is too large for an index of shards")
    weight_map = parse_json(region.read(), what).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise GradscopeError(what, "names no shards (it has no weight_map)")
    tensors: dict[Any, list[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name or name in (".", "..") or set(name) & set("/\\\0:"):
            raise GradscopeError(what, f"names a shard outside its own directory: {name!r}")
        if name.endswith(INDEX_SUFFIX):
            raise GradscopeError(what, f"names an index as a shard: {name!r}")
        tensors.setdefault(name, []).append(tensor)
    return {path.parent / name: tuple(held) for name, held in tensors.items()}


def check_shard(shard: Path, held: Container[str], promised: Iterable[str], index: Path) -> None:
    """Whether a shard holds what its index promises.

    Raises:
        GradscopeError: it lacks a tensor; the error names it.
    """
    missing = next((name for name in promised if name not in held), None)
    if missing is not None:
        raise GradscopeError(str(shard), f"lacks the tensor {missing!r}, which {index.name} promises in it")


def merge_shards(shards: Iterable[tuple[Path, dict[str, Leaf]]]) -> dict[str, Leaf]:
    """The tensors of all shards.

    Raises:
        GradscopeError: two shards hold a tensor of one name.
    """
    merged: dict[str, Leaf] = {}
    for path, tensors in shards:
        for name, leaf in tensors.items():
            if name in merged:
                raise GradscopeError(str(path), f"holds {name!r}, which another shard holds too")
            merged[name] = leaf
    return merged
