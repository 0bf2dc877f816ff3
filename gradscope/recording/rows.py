"""Rows on their way to the writer: what a device still works on waits, in order, without holding training up."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradscope._meter import RowBatch
from gradscope.recording.clip_calls import ClipCall
from gradscope.recording.meter import CopiedGradients
from gradscope.recording.scalars import take_down
from gradscope.trace.measurement import Bins, Measurement, PackedMeasurement, Row, unpacked
from gradscope.trace.pending_rows import PackedRows

# Of rows that the writer's thread has not come to, so many wait before the training thread writes them itself.
MOST_WAITING = 4096
# Rows that are measured at once.
AT_ONCE = 1024
# Dtypes in which a total norm can lie on the other side of max_norm than the exact one.
COARSE = (torch.bfloat16, torch.float16)
# Everything else is something that a device still works on, and has ``ready()`` and ``result()``.
HERE = frozenset({type(None), bool, int, float, np.ndarray, Measurement, PackedMeasurement})


class _Waiting(NamedTuple):
    step: int
    group: int
    call: ClipCall
    stepped: Any
    update_norms: list[Any]

    def ready(self) -> bool:
        numbers = [self.call.returned, self.stepped, *self.call.weight_norms, *self.update_norms]
        numbers += [measured for _, measured in self.call.parts]
        return all(number.ready() for number in numbers if type(number) not in HERE)


class RowQueue:
    """Hands rows on in the order they came in, when told to.

    Those of copied gradients with nothing special to them go to ``extend``, many at a time and measured without holding
    training up; the others to ``write``, one by one.
    """

    def __init__(
        self, write: Callable[[Row, ClipCall], None], extend: Callable[[PackedRows], None] | None = None
    ) -> None:
        """Without ``extend`` all go to ``write``."""
        self._write = write
        self._extend = extend
        self._waiting: deque[tuple[int, int, ClipCall, Any, list[Any]]] = deque()
        self._draining = threading.Lock()
        self._batch = RowBatch(CopiedGradients, np.ndarray, COARSE, AT_ONCE)

    def put(self, step: int, group: int, call: ClipCall, stepped: Any, update_norms: list[Any]) -> None:
        """Take in a row."""
        if isinstance(stepped, Tensor):
            stepped = take_down(stepped)
        self._waiting.append((step, group, call, stepped, update_norms))
        if len(self._waiting) >= MOST_WAITING:
            self.drain()

    def drain(self) -> None:
        """Write the rows that are there, up to the first that a device still works on."""
        with self._draining:
            self._write_plain()
            while self._waiting and _Waiting(*self._waiting[0]).ready():
                self._write_first()
                self._write_plain()

    def finish(self) -> None:
        """Write all rows, and wait for those that a device still works on."""
        with self._draining:
            self._write_plain()
            while self._waiting:
                self._write_first()
                self._write_plain()

    def _write_plain(self) -> None:
        if self._extend is not None:
            while self._batch.gather(self._waiting):
                self._extend(PackedRows(*self._batch.measured()))

    def _write_first(self) -> None:
        row = _Waiting(*self._waiting.popleft())
        self._write(_row(row), row.call)


def _row(row: _Waiting) -> Row:
    call = row.call
    parts = [_arrived(measured) for _, measured in call.parts if measured is not None]
    stepped = row.stepped
    if stepped is not None and not isinstance(stepped, bool):
        # What a fused optimizer was told: 0 where nothing was infinite.
        stepped = _arrived(stepped) == 0.0
    return Row(
        row.step,
        row.group,
        call.time,
        parts[0] if len(parts) == 1 else _joined([unpacked(part) for part in parts]),
        call.max_norm,
        call.clip_value,
        call.norm_type,
        _arrived(call.returned),
        call.grad_scale,
        stepped,
        _norms(call.weight_norms),
        _norms(row.update_norms),
    )


def _arrived(value: Any) -> Any:
    return value if type(value) in HERE else value.result()


def _norms(parts: list[Any]) -> Any:
    if not parts:
        return None
    arrived = [_arrived(part) for part in parts]
    return arrived[0] if len(arrived) == 1 else np.concatenate(arrived)


def _joined(parts: list[Measurement]) -> Measurement:
    """Several measurements as one group's: its bins may repeat a code."""
    counts = [part.tensor_bin_counts for part in parts if part.tensor_bin_counts is not None]
    joined = Measurement(
        np.concatenate([part.sum_squares for part in parts]),
        np.concatenate([part.max_abs for part in parts]),
        np.concatenate([part.zeros for part in parts]),
        np.concatenate([part.nan for part in parts]),
        np.concatenate([part.inf for part in parts]),
    )
    joined.group_bins = _joined_bins([part.group_bins for part in parts])
    joined.tensor_bins = _joined_bins([part.tensor_bins for part in parts])
    joined.tensor_bin_counts = np.concatenate(counts) if joined.tensor_bins is not None else None
    return joined


def _joined_bins(parts: list[Bins | None]) -> Bins | None:
    bins = [part for part in parts if part is not None]
    if len(bins) < len(parts):
        return None
    return Bins(
        *(np.concatenate([getattr(part, name) for part in bins]) for name in ("code", "count", "mean", "spread"))
    )
