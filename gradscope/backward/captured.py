"""A captured batch: columns of one length, read by gradscope's own readers, which execute nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradscope.backward.stored_elements import as_torch, elements_of
from gradscope.errors import GradscopeError
from gradscope.sources.arrays import tree_of
from gradscope.sources.formats.contents import read_contents
from gradscope.sources.formats.safetensors_files import CAPTURED_BATCH
from gradscope.sources.formats.tree import Tree, UnreadableTensor, named_leaves
from gradscope.sources.stored import StoredTensor
from gradscope.whole_file import whole_file

if TYPE_CHECKING:
    import torch

IN_MEMORY = "batch"
# A file of one array names it nothing.
ALONE = "batch"
HINT = "a batch is a mapping of tensors with one row per sample: save_file({'obs': obs, 'target': target}, FILE)"


@dataclass(frozen=True, slots=True, eq=False)
class CapturedBatch:
    """Columns by name (nested mappings: dotted), each [rows, ...], and what the capturing library said of them.

    A column is a numpy array; a torch tensor where numpy has no such type (bfloat16, float8).
    """

    path: str
    columns: dict[str, NDArray[Any] | torch.Tensor]
    rows: int
    metadata: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The columns as torch tensors on the CPU, of their own dtype, without a copy."""
        return {name: as_torch(column) for name, column in self.columns.items()}


def read_batch(source: Path | Mapping[str, Any]) -> CapturedBatch:
    """The batch in a .safetensors, .npz or .pt file, or in a mapping of names to arrays.

    Raises:
        GradscopeError: it is missing, damaged or empty, or its columns have no common first dimension.
    """
    if isinstance(source, Mapping):
        return _batch(tree_of(source, IN_MEMORY), IN_MEMORY, {})
    path, what = Path(source), str(source)
    try:
        is_directory = path.is_dir()
    except (OSError, ValueError):
        is_directory = False
    if is_directory:
        raise GradscopeError(what, "is a directory, not a captured batch", HINT)
    contents = read_contents(path)
    return _batch(contents.tree, what, _metadata(contents.metadata.get(CAPTURED_BATCH), what))


def write_batch(path: str | os.PathLike[str], columns: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> None:
    """Write ``columns`` ([rows, ...] each) and what is to be known of them as a safetensors file, whole or not at all.

    Raises:
        GradscopeError: the file cannot be written.
    """
    from safetensors.numpy import save

    content = save(
        {name: np.ascontiguousarray(column) for name, column in columns.items()},
        {CAPTURED_BATCH: json.dumps(dict(metadata), sort_keys=True)},
    )
    try:
        with whole_file(path) as out:
            out.write(content)
    except OSError as error:
        raise GradscopeError(str(path), error.strerror or "cannot be written") from None


def _metadata(text: str | None, what: str) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise GradscopeError(what, f"its metadata {CAPTURED_BATCH} is no JSON object")
    return metadata


def _batch(tree: Tree, what: str, metadata: dict[str, Any]) -> CapturedBatch:
    stored: dict[str, StoredTensor] = {}
    for name, leaf in named_leaves(tree, what):
        if isinstance(leaf, UnreadableTensor):
            raise GradscopeError(what, f"its column {name or ALONE!r} cannot be read ({leaf.reason})")
        if leaf is not None:
            stored[name or ALONE] = leaf
    if not stored:
        raise GradscopeError(what, "holds no tensors, and so no batch", HINT)
    rows = _common_rows(stored, what)
    return CapturedBatch(what, {name: elements_of(tensor, what) for name, tensor in stored.items()}, rows, metadata)


def _common_rows(stored: Mapping[str, StoredTensor], what: str) -> int:
    """The columns' first dimension; checked before anything is read."""
    first = next(iter(stored))
    for name, tensor in stored.items():
        if not tensor.info.shape:
            raise GradscopeError(
                what, f"its column {name!r} is a single number, without a first dimension of rows", HINT
            )
        if tensor.info.shape[0] != stored[first].info.shape[0]:
            raise GradscopeError(
                what,
                f"its columns have no common first dimension: {first!r} has {stored[first].info.shape[0]:,} rows, "
                f"{name!r} has {tensor.info.shape[0]:,}",
            )
    rows = stored[first].info.shape[0]
    if rows == 0:
        raise GradscopeError(what, f"has no rows (the first dimension of {first!r} is 0)")
    return rows
