"""TensorBoard event files, read by tensorboard's own record reader.

Only its record reader and message types are imported: they need neither TensorFlow nor torch, and nothing is
subsampled.  A scalar is a ``simple_value`` (float32) or a tensor of one element.  Several event files in one directory
are one run, as they are to TensorBoard.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gradscope.errors import GradscopeError
from gradscope.gradients import SAVE_GRADIENTS
from gradscope.notation import count
from gradscope.sources.formats.file_region import FileRegion
from gradscope.sources.norm_logs.series import NormLog, Series
from gradscope.sources.norm_logs.tables import MAX_NAMES, GrowingColumn
from gradscope.sources.norm_logs.tags import Tags

FIRST_RECORD = b"brain.Event:"
# Tags that only these two write.
RL_TAGS = {
    "Stable-Baselines3": ("rollout/ep_rew_mean", "time/total_timesteps", "train/n_updates"),
    "rsl_rl": ("Loss/value_function", "Policy/mean_noise_std", "Policy/mean_std", "Train/mean_episode_length"),
}
# Where transformers' TensorBoardCallback writes the TrainingArguments, as JSON.
TRAINER_ARGUMENTS = "args/text_summary"
LENGTH_BYTES, CHECKSUM_BYTES = 8, 4


def read_event_files(paths: Sequence[Path], what: str, tags: Tags) -> NormLog:
    """The log in the event files of one run, the older first.

    Raises:
        GradscopeError: tensorboard is not installed, or the files are a reinforcement learning library's that logs no
            gradient norm.
    """
    run = _Run(what, tags)
    for path in paths:
        run.read(path)
    return run.log()


class _Run:
    """One run's scalars while they are being read."""

    def __init__(self, what: str, tags: Tags) -> None:
        self._what = what
        self._tags = tags
        self._columns: dict[str, GrowingColumn | None] = {}
        self._notes: list[str] = []
        self._max_norm: float | None = None

    def read(self, path: Path) -> None:
        for event in _events(path, self._notes):
            for value in event.summary.value:
                self._take(value, event.step)

    def _take(self, value: Any, step: int) -> None:
        column = self._columns.get(value.tag)
        if column is None and value.tag in self._columns:
            return
        if value.tag == TRAINER_ARGUMENTS:
            self._max_norm = _max_norm(value)
            return
        number = _scalar(value)
        if number is None:
            return
        if column is None:
            if len(self._columns) == MAX_NAMES:
                raise GradscopeError(self._what, f"there are more than {MAX_NAMES:,} tags")
            column = GrowingColumn() if self._tags.wants(value.tag) else None
            self._columns[value.tag] = column
        if column is not None:
            column.add(step, number)

    def log(self) -> NormLog:
        found = {tag: column.whole() for tag, column in self._columns.items() if column is not None}
        others = tuple(tag for tag, column in self._columns.items() if column is None)
        if not found and self._tags.tag is None:
            self._refuse_rl(others)
        series = {tag: Series(column.rows, column.values) for tag, column in found.items()}
        return NormLog("TensorBoard log", series, others, tuple(self._notes), max_norm=self._max_norm)

    def _refuse_rl(self, others: Sequence[str]) -> None:
        for library, tags in RL_TAGS.items():
            if set(tags) & set(others):
                raise GradscopeError(
                    self._what,
                    f"is an event file of {library}, which logs no gradient norm",
                    SAVE_GRADIENTS,
                )


def _events(path: Path, notes: list[str]) -> Iterator[Any]:
    """The events in the whole records of a file; a note says how many bytes behind them were left out."""
    try:
        from google.protobuf.message import DecodeError
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.tensorflow_stub import errors
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New
    except ImportError:
        raise GradscopeError(
            str(path),
            "is a TensorBoard event file, and tensorboard is not installed",
            "pip install 'gradscope[tensorboard]'",
        ) from None
    region = FileRegion.whole(path)
    with region.open() as stream:
        ends = list(_record_ends(stream, region.size))
    reader, read = PyRecordReader_New(str(path)), 0
    for end in ends:
        try:
            reader.GetNext()
            event = Event.FromString(reader.record())
        except (errors.DataLossError, DecodeError):
            break
        read = end
        yield event
    if read < region.size:
        notes.append(
            f"{path.name}: {count(region.size - read)} of {count(region.size)} bytes are damaged or not yet whole "
            "and left out."
        )


def _record_ends(stream: BinaryIO, size: int) -> Iterator[int]:
    """Where each whole record ends: the reader believes the length that a record claims, whatever the file's size."""
    position = 0
    while len(header := stream.read(LENGTH_BYTES)) == LENGTH_BYTES:
        (length,) = struct.unpack("<Q", header)
        position += LENGTH_BYTES + CHECKSUM_BYTES + length + CHECKSUM_BYTES
        if position > size:
            return
        yield position
        stream.seek(position)


def _scalar(value: Any) -> float | None:
    """The number in a summary's value, or None where it holds another thing."""
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if not value.HasField("tensor") or math.prod(dimension.size for dimension in value.tensor.tensor_shape.dim) != 1:
        return None
    from tensorboard.util.tensor_util import make_ndarray

    try:
        array = make_ndarray(value.tensor)
    except (TypeError, ValueError, KeyError):
        return None
    return float(array.reshape(-1)[0]) if array.size == 1 and np.issubdtype(array.dtype, np.number) else None


def _max_norm(value: Any) -> float | None:
    """``max_grad_norm`` of the TrainingArguments that transformers wrote as text."""
    try:
        limit = json.loads(value.tensor.string_val[0])["max_grad_norm"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return float(limit) if type(limit) in (int, float) and 0 < limit < math.inf else None
