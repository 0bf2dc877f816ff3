"""Rows on their way to the writer: what a device still works on waits, in order, without holding training up."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradscope._meter import RowBatch
from gradscope.recording.clip_calls import ClipCall
from gradscope.recording.meter import CopiedGradients
from gradscope.recording.scalars import take_down
from gradscope.trace.measurement import Bins, Measurement, PackedMeasurement, Row, unpacked
from gradscope.trace.pending_rows import PackedRows

# How often what was copied is measured: so often that it is still warm.
TICK_SECONDS = 0.008
# More of either do not wait for the writer's thread: copied gradients, and other rows.
MOST_COPIED = 4096
MOST_WAITING = 64
# Dtypes in which a total norm can lie on the other side of max_norm than the exact one.
COARSE = (torch.bfloat16, torch.float16)
# Everything else is something that a device still works on, and has ``ready()`` and ``result()``.
HERE = frozenset({type(None), bool, int, float, np.ndarray, Measurement, PackedMeasurement})


@dataclass(eq=False, slots=True)
class _Waiting:
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
        # All of the batch are older than those that wait.
        self._batch = RowBatch(CopiedGradients, np.ndarray, COARSE, MOST_COPIED)
        self._waiting: deque[_Waiting] = deque()
        self._draining = threading.Lock()

    def put(self, step: int, group: int, call: ClipCall, stepped: Any, update_norms: list[Any]) -> None:
        """Take in a row."""
        if stepped is not True and isinstance(stepped, Tensor):
            stepped = take_down(stepped)
        self._batch.count(step)
        if self._extend is None or not self._batch.take(step, group, call, stepped, update_norms):
            self._batch.behind = True
            self._waiting.append(_Waiting(step, group, call, stepped, update_norms))
            if len(self._waiting) >= MOST_WAITING or self._batch.full:
                self.drain()

    @property
    def batch(self) -> RowBatch | None:
        """Where rows of copied gradients may be put; None where each is looked at."""
        return None if self._extend is None else self._batch

    @property
    def steps(self) -> int:
        """How many steps rows have come of."""
        return self._batch.steps

    @property
    def last_step(self) -> int:
        """The last of them, -1 before the first."""
        return self._batch.last_step

    def measure_for(self, seconds: float) -> bool:
        """Measure what was copied, again and again for so long; the copies are free then.  False after ``finish``."""
        return self._batch.measure_for(seconds, TICK_SECONDS)

    def drain(self) -> None:
        """Write the rows that are there, up to the first that a device still works on."""
        with self._draining:
            # A row that comes in meanwhile may be older than those behind it, and wait in the batch.
            for _ in range(self._write_copied()):
                if not self._waiting[0].ready():
                    break
                self._write_first()

    def finish(self) -> None:
        """Write all rows, and wait for those that a device still works on."""
        self._batch.end()
        with self._draining:
            for _ in range(self._write_copied()):
                self._write_first()
            self._write_copied()

    def _write_copied(self) -> int:
        """Write those of the batch; how many of the others may follow at once."""
        behind = len(self._waiting)
        if self._extend is not None:
            measured = self._batch.hand_over()
            if measured is not None:
                self._extend(PackedRows(*measured))
        return behind

    def _write_first(self) -> None:
        row = self._waiting.popleft()
        self._batch.behind = bool(self._waiting)
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
