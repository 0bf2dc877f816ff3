"""What is in one file, told by its content and not by its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gradscope.errors import GradscopeError
from gradscope.sources.formats.file_region import FileRegion
from gradscope.sources.formats.magic import EMPTY_ZIP_MAGIC, LEGACY_TORCH_MAGIC, NPY_MAGIC, ZIP_MAGIC
from gradscope.sources.formats.safetensors_files import (
    INDEX_SUFFIX,
    check_shard,
    looks_like_safetensors,
    merge_shards,
    parse_json,
    read_safetensors,
    shards_of_index,
)
from gradscope.sources.formats.tree import Tree

if TYPE_CHECKING:
    from gradscope.sources.formats.zip_members import ZipMembers

HEAD_BYTES = 4096
MAX_TEXT_MEMBER = 64 << 20
TENSOR_SUFFIXES = (".pth", ".pt", ".npz", ".npy", ".safetensors")


@dataclass(frozen=True, slots=True)
class Contents:
    """A file's tree, and the name of its format for people.

    ``weights`` where the format holds nothing else; ``bare`` where it can hold nothing but named arrays.
    ``metadata`` is what a safetensors file says beside its tensors.
    """

    tree: Tree
    format: str
    weights: bool = False
    bare: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_contents(path: Path) -> Contents:
    """What the file at ``path`` holds, with its tensors left where they are.

    An ``*.index.json`` gives the tensors of all its shards; a zip file of SB3's the tree of each member by name.

    Raises:
        GradscopeError: the file is missing, no regular file, empty, damaged, or of no known format.
    """
    if path.name.endswith(INDEX_SUFFIX):
        return _read_sharded(path)
    region = FileRegion.whole(path)
    if region.size == 0:
        raise GradscopeError(str(path), "is empty")
    contents = _read_region(region, str(path))
    if contents is not None:
        return contents
    from gradscope.sources.norm_logs import kind_of_log

    kind = kind_of_log(region)
    if kind is not None:
        raise GradscopeError(
            str(path),
            f"is a log ({kind}), and tensors are wanted here",
            "name one log, or the directory of a run's event files",
        )
    raise GradscopeError(
        str(path),
        "is in no format that gradscope reads",
        "it reads safetensors, PyTorch .pt/.pth/.ckpt, .npz, .npy and SB3 .zip files, traces and logs of norms",
    )


def _read_sharded(index: Path) -> Contents:
    promised = shards_of_index(index)
    shards = [(path, read_contents(path)) for path in promised]
    for path, contents in shards:
        if not isinstance(contents.tree, dict):
            raise GradscopeError(str(path), "is no mapping of tensors, as a shard should be")
        check_shard(path, contents.tree, promised[path], index)
    return Contents(merge_shards((path, contents.tree) for path, contents in shards), f"sharded {shards[0][1].format}")


def _read_region(region: FileRegion, what: str, nested: bool = False) -> Contents | None:
    """What a file or, ``nested``, a member of a zip file holds; None if its format is not known.

    Each reader is loaded when its format is met: all of them take longer to load than a policy's gradients to read.
    """
    with region.open() as stream:
        head = stream.read(HEAD_BYTES)
    if head.startswith((ZIP_MAGIC, EMPTY_ZIP_MAGIC)):
        from gradscope.sources.formats.zip_members import ZipMembers

        return _read_zip(ZipMembers(region, what), nested)
    if head.startswith(NPY_MAGIC):
        from gradscope.sources.formats.numpy_files import read_npy

        return Contents(read_npy(region, what), "npy", bare=True)
    if head.startswith(LEGACY_TORCH_MAGIC) or head[257:262] == b"ustar":
        from gradscope.sources.formats.torch_files import read_legacy_torch

        return Contents(read_legacy_torch(region, what), "legacy PyTorch")
    if looks_like_safetensors(head, region.size):
        tensors, metadata = read_safetensors(region, what)
        return Contents(tensors, "safetensors", bare=True, metadata=metadata)
    if re.match(rb"\x80[\x02-\x05]", head) or _is_text_pickle(head, region):
        from gradscope.sources.formats.known_constructors import plain_constructors
        from gradscope.sources.formats.pickles import read_pickle

        return Contents(read_pickle(region, what, plain_constructors(region)), "pickle")
    return None


def _is_text_pickle(head: bytes, region: FileRegion) -> bool:
    """Protocols 0 and 1 have no magic number: they start by a mark, a name or an empty container, and end in a stop."""
    if not re.match(rb"\(?(c[\w.]+\n[\w.]+\n|[dl]p\d+\n|[}\]](q.|\.)|i[\w.]+\n)", head, re.DOTALL):
        return False
    with region.open() as stream:
        stream.seek(region.size - 1)
        return stream.read() == b"."


def _read_zip(members: ZipMembers, nested: bool) -> Contents:
    from gradscope.sources.formats.numpy_files import is_npz, read_npz
    from gradscope.sources.formats.torch_files import is_script, is_torch_archive, read_torch_archive

    if is_torch_archive(members):
        script = is_script(members)
        return Contents(read_torch_archive(members), "TorchScript" if script else "PyTorch", weights=script)
    if is_npz(members):
        return Contents(read_npz(members), "npz", bare=True)
    if nested or not any(name.endswith(TENSOR_SUFFIXES) for name in members.names):
        raise GradscopeError(members.what, "is a zip file without tensors")
    return Contents({name: _read_zip_member(members, name) for name in members.names}, "zip")


def _read_zip_member(members: ZipMembers, name: str) -> Tree:
    """One file of an SB3 archive: tensors, JSON, or text."""
    what = f"{members.what}: {name}"
    if members.size(name) == 0:
        return None
    if name.endswith(TENSOR_SUFFIXES):
        contents = _read_region(members.inflated_region(name), what, nested=True)
        if contents is None:
            raise GradscopeError(what, "is in no format that gradscope reads")
        return contents.tree
    if members.size(name) > MAX_TEXT_MEMBER:
        return None
    text = members.read(name, MAX_TEXT_MEMBER)
    return parse_json(text, what) if text[:1] == b"{" else text.decode("utf-8", "replace")
