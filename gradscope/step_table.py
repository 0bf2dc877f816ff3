"""The steps of a source as one table: what is left of them when each has been read once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gradscope import results
from gradscope.clip_history import ClipHistory, describe_run
from gradscope.gradients import GradientSource, GradientStep, Progress
from gradscope.tensors import ClipGroup, TensorInfo

StepObserver: TypeAlias = Callable[[int, GradientStep], None]


@dataclass(frozen=True, slots=True, eq=False)
class StepTable:
    """Per-tensor numbers of the steps read, stacked: arrays are [steps, tensors].

    ``index`` (int64 [steps]) are the steps' numbers.  ``energy`` is Σg² over the finite elements (float64), ``present``
    (bool) says where a tensor had a gradient.  ``history`` is what a recording knows of every step, None where there is
    none; ``weight_norm`` and ``update_norm`` (float64, NaN: not of this tensor) have a row for those steps only at
    which they were measured, whose rows in the table are ``measured`` (int64).
    """

    index: NDArray[np.int64]
    labels: list[str]
    energy: NDArray[np.float64]
    max_abs: NDArray[np.float64]
    zeros: NDArray[np.int64]
    nan: NDArray[np.int64]
    inf: NDArray[np.int64]
    present: NDArray[np.bool_]
    history: ClipHistory | None = None
    weight_norm: NDArray[np.float64] | None = None
    update_norm: NDArray[np.float64] | None = None
    measured: NDArray[np.int64] | None = None

    @classmethod
    def read(
        cls,
        source: GradientSource,
        selected: range,
        progress: Progress | None = None,
        observers: Sequence[StepObserver] = (),
    ) -> StepTable:
        """Stream the steps at these positions once; their spectra, which make a step large, are let go at once.

        Each of ``observers`` is told of every step, with its position, while it is in memory.
        """
        shape = (len(selected), len(source.tensors))
        table = cls(
            index=np.zeros(shape[0], np.int64),
            labels=[],
            energy=np.zeros(shape),
            max_abs=np.zeros(shape),
            zeros=np.zeros(shape, np.int64),
            nan=np.zeros(shape, np.int64),
            inf=np.zeros(shape, np.int64),
            present=np.ones(shape, np.bool_),
        )
        history = ClipHistory.unknown(shape[0], source.groups)
        calls = 0
        measured: list[tuple[int, NDArray[np.float64], NDArray[np.float64]]] = []
        for row, step in enumerate(source.read_steps(selected, progress)):
            table._take(row, step)
            for observe in observers:
                observe(selected[row], step)
            call = step.recorded
            if call is None:
                continue
            history.take(row, call)
            calls += 1
            if call.weight_norm is not None and call.update_norm is not None:
                measured.append((row, call.weight_norm.copy(), call.update_norm.copy()))
        table = replace(table, history=history if calls == len(table.labels) else None)
        if not measured:
            return table
        rows, weights, updates = zip(*measured, strict=True)
        return replace(table, weight_norm=np.stack(weights), update_norm=np.stack(updates), measured=np.array(rows))

    def _take(self, row: int, step: GradientStep) -> None:
        self.index[row] = step.index
        self.labels.append(step.label)
        self.energy[row] = step.sum_squares
        self.max_abs[row] = step.max_abs
        self.zeros[row] = step.zeros
        if not step.finite:
            # What is never written to takes no memory, which counts in long runs.
            self.nan[row], self.inf[row] = step.nan, step.inf
        if step.present is not None:
            self.present[row] = step.present
            self.zeros[row] *= step.present

    @property
    def nonfinite(self) -> NDArray[np.int64]:
        """How many elements are NaN or infinite."""
        return self.nan + self.inf

    def last(self) -> StepTable:
        """The last step alone, as a gradient."""
        return StepTable(
            self.index[-1:],
            self.labels[-1:],
            self.energy[-1:],
            self.max_abs[-1:],
            self.zeros[-1:],
            self.nan[-1:],
            self.inf[-1:],
            self.present[-1:],
            self.history.last() if self.history is not None else None,
        )

    def norms(self, members: Sequence[int]) -> NDArray[np.float64]:
        """The L2 norm of ``members`` together at every step: nan or inf where they hold such an element."""
        energy = self.energy[:, members].sum(axis=1)
        energy[self.inf[:, members].any(axis=1)] = math.inf
        energy[self.nan[:, members].any(axis=1)] = math.nan
        norms: NDArray[np.float64] = np.sqrt(energy)
        return norms

    def there(self, members: Sequence[int]) -> NDArray[np.bool_]:
        """The steps at which any of ``members`` had a gradient."""
        return np.asarray(self.present[:, members].any(axis=1))

    def update_ratio(self, members: Sequence[int]) -> float | None:
        """The median of ‖θ' − θ‖/‖θ‖ over the steps at which both are known of all ``members``."""
        ratios = self.update_ratios(members)[1]
        return float(np.median(ratios)) if len(ratios) else None

    def update_ratios(self, members: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """‖θ' − θ‖/‖θ‖ of ``members`` together, and the rows at which it is known of all of them and ‖θ‖ > 0."""
        if self.weight_norm is None or self.update_norm is None or self.measured is None:
            return np.empty(0, np.int64), np.empty(0)
        weights = np.sqrt(np.square(self.weight_norm[:, members]).sum(axis=1))
        updates = np.sqrt(np.square(self.update_norm[:, members]).sum(axis=1))
        known = (weights > 0.0) & ~np.isnan(updates)
        return self.measured[known], updates[known] / weights[known]


def recorded_run(source: GradientSource, table: StepTable) -> results.RecordedRun | None:
    """What the run clipped, where every step tells."""
    if table.history is None:
        return None
    history, members = table.history, members_of(source.tensors, source.groups).values()
    norms, max_abs = history.norm, history.max_abs
    if not history.met:
        norms = np.column_stack([table.norms(group) for group in members])
        max_abs = np.column_stack([table.max_abs[:, group].max(axis=1, initial=0.0) for group in members])
    joint = table.norms(range(len(source.tensors)))
    return describe_run(
        history,
        [group.name for group in source.groups],
        table.index,
        # The square of a finite gradient may not be.
        np.isfinite(joint),
        norms,
        max_abs,
        joint,
    )


def members_of(tensors: Sequence[TensorInfo], groups: Sequence[ClipGroup]) -> dict[str, list[int]]:
    """The places of the tensors of each clip group."""
    position = {tensor.name: i for i, tensor in enumerate(tensors)}
    return {group.name: [position[name] for name in group.tensors] for group in groups}
