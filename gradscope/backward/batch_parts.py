"""Batches in memory as a training loop has them: tensors, nested in mappings and sequences, cut by rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from gradscope.backward.captured import HINT, read_batch
from gradscope.errors import GradscopeError

BATCH = "batch"
# Of a data loader no more is taken: the batches are kept, because some of what is asked needs a second look at them.
MOST_BATCHES = 64
MOST_BYTES = 1 << 30

# Tensors [rows, ...], nested in mappings, tuples and lists.
Parts: TypeAlias = Any


def batches_of(given: Any) -> tuple[list[Parts], tuple[str, ...]]:
    """The batches in what a user names, their tensors detached, and notes on what was left out.

    A tensor, a mapping, a tuple, and a list that holds tensors directly are one batch, as is a file of a captured one.
    Whatever else can be iterated over gives a batch at a time: a data loader, a generator, a list of batches.

    Raises:
        GradscopeError: there is none, or one is empty or no such thing.
    """
    if isinstance(given, str | Path):
        return [read_batch(Path(given)).tensors()], ()
    if _is_one_batch(given):
        return [_checked(given)], ()
    if isinstance(given, torch.utils.data.Dataset) and not isinstance(given, torch.utils.data.IterableDataset):
        raise GradscopeError(BATCH, f"{type(given).__name__} holds single samples", "DataLoader(dataset, batch_size=N)")
    if not isinstance(given, Iterable):
        raise GradscopeError(BATCH, f"is no tensor, mapping or sequence of tensors, but {type(given).__name__}", HINT)
    return _taken(given)


def rows_of(batch: Parts) -> int:
    """The first dimension that the tensors of a checked batch share."""
    return int(next(_leaves(batch))[1].shape[0])


def rows_picked(batch: Parts, index: Tensor, device: torch.device) -> Parts:
    """The same nesting with these rows (int64) alone, on ``device``."""
    return _mapped(batch, lambda column: column[index.to(column.device)].to(device))


def _is_one_batch(given: Any) -> bool:
    if _is_column(given) or isinstance(given, Mapping | tuple):
        return True
    return isinstance(given, list) and any(_is_column(part) for part in given)


def _is_column(part: Any) -> bool:
    return isinstance(part, Tensor | np.ndarray)


def _taken(given: Iterable[Any]) -> tuple[list[Parts], tuple[str, ...]]:
    taken, size, more = [], 0, False
    batches = iter(given)
    for batch in islice(batches, MOST_BATCHES):
        taken.append(_checked(batch))
        size += sum(column.nbytes for _, column in _leaves(taken[-1]))
        if size > MOST_BYTES:
            break
    if not taken:
        raise GradscopeError(BATCH, f"{type(given).__name__} gives no batch")
    if isinstance(given, Sized):
        more = len(given) > len(taken)
    elif len(taken) == MOST_BATCHES or size > MOST_BYTES:
        more = next(batches, None) is not None
    return taken, (f"Only the first {len(taken)} batches were taken.",) if more else ()


def _checked(batch: Parts) -> Parts:
    """``batch`` with detached tensors for its arrays, all of one first dimension.

    Raises:
        GradscopeError: they are not, or there is something else in it.
    """
    checked = _mapped(batch, lambda column: column.detach())
    first = ""
    rows: int | None = None
    for name, column in _leaves(checked):
        if not column.dim():
            raise GradscopeError(BATCH, f"{name} is a single number, without a first dimension of rows")
        if rows is None:
            first, rows = name, column.shape[0]
        if column.shape[0] != rows:
            raise GradscopeError(
                BATCH,
                f"its tensors have no common first dimension: {first} has {rows:,} rows, {name} {column.shape[0]:,}",
            )
    if rows is None:
        raise GradscopeError(BATCH, "holds no tensors", HINT)
    if not rows:
        raise GradscopeError(BATCH, f"has no rows (the first dimension of {first} is 0)")
    return checked


def _mapped(part: Parts, change: Callable[[Tensor], Tensor], name: str = BATCH) -> Parts:
    """The same nesting with every tensor changed; mappings become dicts."""
    if isinstance(part, Tensor):
        return change(part)
    if isinstance(part, np.ndarray):
        try:
            return change(torch.from_numpy(part))
        except TypeError:
            raise GradscopeError(name, f"holds {part.dtype}, of which torch makes no tensor") from None
    if isinstance(part, Mapping):
        return {key: _mapped(value, change, f"{name}[{key!r}]") for key, value in part.items()}
    if isinstance(part, tuple | list):
        values = [_mapped(value, change, f"{name}[{i}]") for i, value in enumerate(part)]
        if isinstance(part, tuple) and hasattr(part, "_fields"):
            return type(part)(*values)
        return tuple(values) if isinstance(part, tuple) else values
    raise GradscopeError(name, f"is no tensor, but {type(part).__name__}")


def _leaves(part: Parts, name: str = BATCH) -> Iterator[tuple[str, Tensor]]:
    if isinstance(part, Tensor):
        yield name, part
        return
    items = part.items() if isinstance(part, Mapping) else enumerate(part)
    for key, value in items:
        yield from _leaves(value, f"{name}[{key!r}]")
