"""What a policy does to a run: per step for the joint gradient and each clip group, on average for each layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradscope.clipped_count import ClippedCount
from gradscope.clipping.layout import TensorLayout
from gradscope.clipping.moments import Moments
from gradscope.value_clip import NOTHING

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """Per finite step and set; all arrays are [steps, sets].

    ``scale`` is (g·c)/‖g‖², ``norm_ratio`` ‖c‖/‖g‖ and ``angle`` the direction change in degrees, NaN where nothing is
    left of the gradient.  These three may leave out steps at which they are not known; ``triggered`` has all.
    A set that had no gradient at a step is not triggered there, and the three are NaN.
    """

    triggered: BoolArray
    scale: FloatArray
    norm_ratio: FloatArray
    angle: FloatArray

    @classmethod
    def of(cls, moments: Moments, triggered: BoolArray, present: BoolArray | None = None) -> Series:
        """The series of sets with ``moments``; ``present`` says which had a gradient, None: all."""
        series = cls(triggered, moments.mean, moments.norm_ratio(), moments.direction_change_deg())
        return series if present is None else series.where(present)

    def where(self, present: BoolArray) -> Series:
        """The series without what was not ``present`` (bool, shaped like ``scale``)."""
        return Series(
            self.triggered,
            np.where(present, self.scale, np.nan),
            np.where(present, self.norm_ratio, np.nan),
            np.where(present, self.angle, np.nan),
        )

    @classmethod
    def concatenate(cls, parts: Iterable[Series], sets: int) -> Series:
        """The series of consecutive stretches of a run, as one."""
        empty = np.empty((0, sets))
        parts = [cls(empty.astype(np.bool_), empty, empty, empty), *parts]
        return cls(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("triggered", "scale", "norm_ratio", "angle")
            )
        )


class LayerTotals:
    """Sums over the steps seen so far, one entry per layer."""

    def __init__(self, layers: int) -> None:
        self._steps = 0
        self._present = np.zeros(layers, dtype=np.int64)
        self._scales = np.zeros(layers)
        self._triggered = np.zeros(layers)
        self._scale = np.zeros(layers)
        self._angle = np.zeros(layers)
        self._angles = np.zeros(layers)
        self._clipped = np.zeros((3, layers), dtype=np.int64)

    def add(self, series: Series, clipped: Sequence[ClippedCount] = (), present: BoolArray | None = None) -> None:
        """Take in the layers' ``series``, and how many elements of each layer were clamped, where any could be.

        ``present`` says which layers had a gradient, None: all.
        """
        self._steps += len(series.scale)
        self._present += len(series.triggered) if present is None else present.sum(axis=0)
        self._triggered += series.triggered.sum(axis=0)
        self._scale += np.nansum(series.scale, axis=0)
        self._scales += (~np.isnan(series.scale)).sum(axis=0)
        self._angle += np.nansum(series.angle, axis=0)
        self._angles += np.isfinite(series.angle).sum(axis=0)
        if clipped:
            self._clipped += np.array([(count.lo, count.likely, count.hi) for count in clipped]).T

    def means(self) -> LayerMeans:
        """The means over those steps."""
        with np.errstate(invalid="ignore"):
            return LayerMeans(
                clip_rate=self._triggered / self._present,
                scale=self._scale / self._scales,
                angle=self._angle / self._angles,
                clipped=tuple(ClippedCount(lo, likely, hi) for lo, likely, hi in self._clipped.T.tolist()),
                steps=self._steps,
                present=self._present,
            )


@dataclass(frozen=True, slots=True, eq=False)
class LayerMeans:
    """Means over the finite steps, one entry per layer (NaN where there are none); ``clipped`` elements in all.

    ``present`` (int64) counts the steps at which each layer had a gradient, which are all that its means are over.
    All but ``clip_rate`` are over those of the ``steps`` at which they are known.
    """

    clip_rate: FloatArray
    scale: FloatArray
    angle: FloatArray
    clipped: tuple[ClippedCount, ...]
    steps: int
    present: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Effect:
    """What a policy does to a run; ``angle_error`` is the largest half-width of a joint angle's interval (degrees).

    ``clipped`` counts the elements that it clamps, over all steps.  ``met`` has the clip groups of a source that share
    tensors, each by the gradient that it met itself, where that is known.
    """

    joint: Series
    groups: Series
    layers: LayerMeans
    angle_error: float = 0.0
    clipped: ClippedCount = NOTHING
    met: Series | None = None


def effect_of_scaling(parts: Iterable[tuple[Moments, BoolArray, BoolArray | None]], layout: TensorLayout) -> Effect:
    """The effect of scaled tensors: ``parts`` holds stretches of the run, all arrays of which are [steps, tensors].

    These are the moments, what was triggered, and what had a gradient (None: all).
    """
    joint, groups, layers = [], [], LayerTotals(len(layout.layers))
    for moments, triggered, present in parts:
        in_layers, in_groups = (
            None if present is None else sets.any(present) for sets in (layout.layers, layout.groups)
        )
        by_layer = Series.of(moments.merge(layout.layers), layout.layers.any(triggered), in_layers)
        layers.add(by_layer, present=in_layers)
        groups.append(Series.of(moments.merge(layout.groups), layout.groups.any(triggered), in_groups))
        joint.append(Series.of(moments.merge(layout.joint), layout.joint.any(triggered)))
    return Effect(
        joint=Series.concatenate(joint, 1),
        groups=Series.concatenate(groups, len(layout.groups)),
        layers=layers.means(),
    )
