"""One of two sources to compare, read once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gradscope import forensics, results
from gradscope.comparison.spectrum_shapes import HalfShapes, Shape
from gradscope.gradients import GradientSource, Progress, Weights
from gradscope.optimizer_state import OptimizerState
from gradscope.selection import regroup, select_steps
from gradscope.spectra_sample import SpectraSample
from gradscope.step_table import StepTable
from gradscope.tensors import ClipGroup, TensorInfo

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Side:
    """What one source holds; arrays are float64 [tensors], NaN where nothing is known, in the order of ``tensors``.

    ``table`` is None where it holds no gradients.  ``recent`` are the recent norms of an optimizer's state, or of the
    newest steps where the other source holds such.  ``shapes`` are those of the first and of the second half of the
    steps that were looked at; none where no step held spectra.  ``reports`` are the forensics of its optimizers.
    """

    source: GradientSource
    tensors: tuple[TensorInfo, ...]
    groups: tuple[ClipGroup, ...]
    table: StepTable | None
    recent: FloatArray
    weight_norm: FloatArray
    shapes: tuple[tuple[Shape, Shape], ...]
    reports: tuple[results.OptimizerReport, ...]

    @classmethod
    def read(
        cls,
        source: GradientSource,
        steps: str | slice | None,
        groups: Mapping[str, str] | None,
        progress: Progress | None,
    ) -> Side:
        """Read the ``steps`` (``"A:B"``) of ``source``, its weights and its optimizers; ``groups`` as in ``compare``.

        Raises GradscopeError for unusable steps and groups, and for whatever the source finds wrong with its files.
        """
        states = source.optimizers(progress)
        reports = tuple(forensics.analyse(state) for state in states)
        weights = source.weights(progress)
        recent = {tensor.name: tensor.recent_norm for report in reports for tensor in report.tensors}
        tensors = source.tensors or _parameters(weights, recent)
        table, shapes = None, HalfShapes(0, 0)
        if source.tensors:
            selected = select_steps(steps, source.info.steps)
            shapes = HalfShapes(len(tensors), len(selected))
            sample = SpectraSample(len(tensors), len(selected), [shapes.take])
            table = StepTable.read(source, selected, progress, [sample.see])
        regrouped = groups and source.info.kind != "norm-log"
        return cls(
            source=source,
            tensors=tensors,
            groups=regroup(tensors, groups) if groups and regrouped else _own_groups(source, states, tensors),
            table=table,
            recent=_norms({name: norm for name, norm in recent.items() if norm is not None}, tensors),
            weight_norm=_weight_norms(weights, table, tensors),
            shapes=shapes.halves(),
            reports=reports,
        )

    @property
    def kind(self) -> str:
        """That of the source."""
        return self.source.info.kind

    @cached_property
    def finite(self) -> NDArray[np.bool_]:
        """The steps without NaN or Inf, whose squared norm exists; bool [steps]."""
        return np.asarray(np.isfinite(self._global_norms))

    @cached_property
    def total(self) -> float:
        """Σ‖g‖² over the steps that are finite."""
        return float(np.square(self._global_norms[self.finite]).sum())

    @cached_property
    def _global_norms(self) -> FloatArray:
        assert self.table is not None
        return self.table.norms(range(len(self.tensors)))

    def norms(self, members: Sequence[int]) -> FloatArray:
        """The L2 norm of ``members``, float64 [steps]; NaN at steps with NaN or Inf anywhere, or without a gradient."""
        assert self.table is not None
        places = list(members)
        here = self.finite & self.table.there(places)
        return np.where(here, np.sqrt(self.table.energy[:, places].sum(axis=1)), np.nan)


def _parameters(weights: Weights | None, recent: Mapping[str, object]) -> tuple[TensorInfo, ...]:
    """What a checkpoint's numbers are of: its parameters, else those that its optimizers name."""
    tensors = () if weights is None else weights.tensors
    known = {tensor.name for tensor in tensors}
    return (*tensors, *(TensorInfo(name, (0,), "") for name in recent if name not in known))


def _own_groups(
    source: GradientSource, states: Sequence[OptimizerState], tensors: Sequence[TensorInfo]
) -> tuple[ClipGroup, ...]:
    if source.tensors:
        return source.groups
    known = {tensor.name for tensor in tensors}
    groups = [group for state in states for group in state.clip_groups]
    return tuple(replace(group, tensors=tuple(name for name in group.tensors if name in known)) for group in groups)


def _weight_norms(weights: Weights | None, table: StepTable | None, tensors: Sequence[TensorInfo]) -> FloatArray:
    """Those of a checkpoint, else the last that a recording measured."""
    pairs = () if weights is None else zip(weights.tensors, weights.spectra, strict=True)
    norms = _norms({tensor.name: spectrum.norm for tensor, spectrum in pairs}, tensors)
    if np.isnan(norms).all() and table is not None and table.weight_norm is not None:
        norms = table.weight_norm[-1]
    return norms


def _norms(known: Mapping[str, float], tensors: Sequence[TensorInfo]) -> FloatArray:
    """``known`` in the order of ``tensors``, NaN for those that it lacks."""
    return np.asarray([known.get(tensor.name, math.nan) for tensor in tensors], dtype=np.float64)
