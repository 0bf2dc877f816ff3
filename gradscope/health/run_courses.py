"""What a baseline keeps of a run: the courses of its layers, and how it clipped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradscope import results
from gradscope.differences import Course
from gradscope.layer_series import Quantity, series_by_layer

if TYPE_CHECKING:
    from gradscope.health.evidence import Evidence


@dataclass(frozen=True, slots=True)
class LayerCourses:
    """One layer of a run, or one series of a log of norms.

    ``courses`` are of logarithms; ``silent`` is the share of its steps at which its gradient is zero, NaN where it had
    no finite one.
    """

    numel: int
    silent: float
    courses: Mapping[Quantity, Course]


@dataclass(frozen=True, slots=True)
class Clipping:
    """How a run clipped: rate (None: unknown), its 95 % interval, and the max_norm of each group that kept one."""

    rate: float | None
    interval: tuple[float, float] | None
    max_norms: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RunCourses:
    """A run as ``drift`` compares it.  ``steps`` are those read; ``path`` and ``kind`` are those of its source."""

    path: str
    kind: str
    steps: int
    layers: Mapping[str, LayerCourses]
    clipping: Clipping

    @classmethod
    def of(cls, evidence: Evidence) -> RunCourses | None:
        """The courses in ``evidence``; None where it holds no gradients."""
        table, info = evidence.table, evidence.source.info
        if table is None:
            return None
        layers = evidence.layers or {tensor.name: [i] for i, tensor in enumerate(evidence.tensors)}
        norms_only = info.kind == "norm-log"
        return cls(
            path=info.path,
            kind=info.kind,
            steps=len(table.index),
            layers={
                name: LayerCourses(
                    numel=found.numel,
                    silent=found.silent,
                    courses={
                        quantity: Course.of(series)
                        for quantity, series in found.series.items()
                        if quantity == "norm" or not norms_only
                    },
                )
                for name, found in series_by_layer(table, evidence.tensors, layers, evidence.shapes).items()
            },
            clipping=_clipping(evidence.recorded),
        )


def _clipping(recorded: results.RecordedRun | None) -> Clipping:
    if recorded is None or not recorded.overall.steps:
        return Clipping(None, None, {})
    kept = {
        group.name: group.max_norm
        for group in recorded.groups
        if group.max_norm is not None and group.max_norm_changes == 0 and math.isfinite(group.max_norm)
    }
    return Clipping(recorded.overall.clip_rate, recorded.overall.clip_rate_ci95, kept)
