"""What the rules are judged by: one reading of a source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gradscope import forensics, results
from gradscope.clipping.layout import TensorLayout
from gradscope.errors import GradscopeError
from gradscope.gradients import GradientSource, Progress, Weights
from gradscope.layer_series import ShapeSeries
from gradscope.noise_scale import MinibatchMeter
from gradscope.optimizer_state import OptimizerState
from gradscope.selection import select_steps
from gradscope.spectra_sample import MergedSpectra, SpectraSample
from gradscope.spectrum import MagnitudeSpectrum
from gradscope.step_table import StepTable, recorded_run
from gradscope.tensors import TensorInfo, places_by_layer

if TYPE_CHECKING:
    from gradscope.health.baselines import Baseline


@dataclass(frozen=True, eq=False)
class Evidence:
    """What one source holds, read once.

    ``table`` is None where it holds no gradients.  ``layers`` maps each layer to the places of its tensors, in module
    order; empty for a log of norms, whose series are no layers.  ``spectra`` are of each tensor (None: not known),
    merged over the ``sampled`` rows of the table, evenly spaced among those that hold spectra of tensors.
    ``recorded`` is what a recording clipped itself, ``minibatches`` what a captured batch tells of noise.
    ``optimizers`` and ``reports`` (their forensics) are those of a checkpoint.  ``baseline`` is what to compare with.
    ``shapes`` are the series of each layer's shape, as a ``layer_series.ShapeSeries`` takes them down.
    """

    source: GradientSource
    table: StepTable | None
    layers: Mapping[str, list[int]]
    spectra: tuple[MagnitudeSpectrum | None, ...]
    sampled: NDArray[np.int64]
    recorded: results.RecordedRun | None
    minibatches: results.MinibatchNoise | None
    weights: Weights | None
    optimizers: tuple[OptimizerState, ...]
    reports: tuple[results.OptimizerReport, ...]
    baseline: Baseline | None = None
    shapes: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    @classmethod
    def gather(
        cls,
        source: GradientSource,
        *,
        steps: str | slice | None = None,
        baseline: Baseline | None = None,
        progress: Progress | None = None,
    ) -> Evidence:
        """Read the ``steps`` (``"A:B"``) of ``source``, its weights and its optimizers.

        Raises GradscopeError for unusable steps, and for whatever the source finds wrong with its files.
        """
        if steps is not None and not source.tensors:
            raise GradscopeError(source.info.path, "holds no gradient steps to choose from")
        weights = source.weights(progress)
        optimizers = source.optimizers(progress)
        layers = places_by_layer(source.tensors) if source.info.kind != "norm-log" else {}
        table, minibatches = None, None
        selected = select_steps(steps, source.info.steps) if source.tensors else range(0)
        together, shapes = MergedSpectra(len(source.tensors)), ShapeSeries(layers, len(selected))
        sample = SpectraSample(len(source.tensors), len(selected), [together.take, shapes.take])
        if source.tensors:
            meter = MinibatchMeter(source, TensorLayout.of(source.tensors, source.groups))
            table = StepTable.read(source, selected, progress, [meter.see, sample.see])
            minibatches = meter.report(progress)
        return cls(
            source=source,
            table=table,
            layers=layers,
            spectra=together.merged(),
            sampled=np.array(sample.rows, dtype=np.int64),
            recorded=recorded_run(source, table) if table is not None else None,
            minibatches=minibatches,
            weights=weights,
            optimizers=optimizers,
            reports=tuple(forensics.analyse(state) for state in optimizers),
            baseline=baseline,
            shapes=shapes.shapes,
        )

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The gradient tensors; arrays of the table have a column for each."""
        return self.source.tensors

    @cached_property
    def joint(self) -> NDArray[np.float64]:
        """The L2 norm of all tensors together, float64 [steps]; NaN or Inf at steps that hold such an element."""
        assert self.table is not None
        return self.table.norms(range(len(self.tensors)))

    @cached_property
    def finite(self) -> NDArray[np.bool_]:
        """The steps without NaN or Inf whose squared norm exists, bool [steps]."""
        return np.asarray(np.isfinite(self.joint))

    def steps_of(self, rows: Sequence[int] | NDArray[np.int64]) -> tuple[int, int] | None:
        """The first and the last step, by their index, of these rows of the table; None where there is none."""
        if self.table is None or not len(rows):
            return None
        return int(self.table.index[min(rows)]), int(self.table.index[max(rows)])
