"""One rank of a trace: its metadata, and where its steps lie in its stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gradscope.errors import GradscopeError
from gradscope.trace.metadata_json import metadata_from_json
from gradscope.trace.rows import FloatArray, IntArray, Rows
from gradscope.trace.schema import TraceMetadata, metadata_name, stream_name
from gradscope.trace.stream import RowStream, file_bytes

LARGEST_METADATA = 256 << 20


@dataclass(eq=False)
class RankTrace:
    """What one rank recorded, up to the last whole batch that its stream held when it was opened.

    ``step``, ``group`` (int64), ``max_norm``, ``returned_norm`` and ``sum_squares`` (float64; NaN: none; of the whole
    row) have one entry per row; block b of the stream holds the rows from ``block_starts[b]`` on.
    """

    metadata: TraceMetadata
    stream: RowStream
    step: IntArray
    group: IntArray
    max_norm: FloatArray
    returned_norm: FloatArray
    sum_squares: FloatArray
    block_starts: IntArray
    _last_read: tuple[int, Rows] | None = field(default=None, repr=False)

    @classmethod
    def open(cls, directory: Path, rank: int) -> RankTrace:
        """Read the metadata and find the steps; every row is checked.

        Raises GradscopeError where a file is missing, unreadable or damaged.
        """
        # In this order: metadata names whatever the rows refer to, and before them.
        stream = RowStream.open(directory / stream_name(rank))
        path = directory / metadata_name(rank)
        metadata = metadata_from_json(file_bytes(path, LARGEST_METADATA), str(path))
        sizes = _group_sizes(metadata)
        parts = []
        for number in range(len(stream.blocks)):
            rows = stream.read(number, sizes)
            single = rows.single
            columns = (single["step"], single["group"], single["max_norm"], single["returned_norm"], _energies(rows))
            parts.append(columns)
        step, group, max_norm, returned_norm, sum_squares = (
            np.concatenate([np.empty(0), *(part[i] for part in parts)]) for i in range(5)
        )
        if (np.diff(step) < 0).any():
            raise GradscopeError(str(stream.path), "is damaged: steps go backwards")
        return cls(
            metadata,
            stream,
            step.astype(np.int64),
            group.astype(np.int64),
            max_norm,
            returned_norm,
            sum_squares,
            np.cumsum([0, *(len(part[0]) for part in parts)], dtype=np.int64),
        )

    def rows(self, start: int, stop: int) -> Rows:
        """The rows ``start`` up to ``stop``, at least one.

        Raises GradscopeError where the stream is no longer what it was.
        """
        parts = []
        first = int(np.searchsorted(self.block_starts, start, side="right")) - 1
        for number in range(first, len(self.stream.blocks)):
            begin, end = self.block_starts[number], self.block_starts[number + 1]
            if begin >= stop:
                break
            parts.append(self._block(number)[max(start - begin, 0) : min(stop, end) - begin])
        return Rows.concatenate(parts)

    def _block(self, number: int) -> Rows:
        if self._last_read is None or self._last_read[0] != number:
            self._last_read = number, self.stream.read(number, _group_sizes(self.metadata))
        return self._last_read[1]


def _group_sizes(metadata: TraceMetadata) -> IntArray:
    return np.array([len(group.tensors) for group in metadata.groups], dtype=np.int64)


def _energies(rows: Rows) -> FloatArray:
    """Σg² of each row, of the gradient as it was stored."""
    column = rows.lists["sum_squares"]
    row = np.repeat(np.arange(len(rows)), column.lengths)
    values = np.nan_to_num(column.values[column.offsets[0] : column.offsets[-1]], nan=0.0, posinf=np.inf)
    return np.asarray(np.bincount(row, values, minlength=len(rows)), dtype=np.float64)
