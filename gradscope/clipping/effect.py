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
    """

    triggered: BoolArray
    scale: FloatArray
    norm_ratio: FloatArray
    angle: FloatArray

    @classmethod
    def of(cls, moments: Moments, triggered: BoolArray) -> Series:
        """The series of sets with ``moments``."""
        return cls(triggered, moments.mean, moments.norm_ratio(), moments.direction_change_deg())

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
        self._all_steps = 0
        self._triggered = np.zeros(layers)
        self._scale = np.zeros(layers)
        self._angle = np.zeros(layers)
        self._angles = np.zeros(layers)
        self._clipped = np.zeros((3, layers), dtype=np.int64)

    def add(self, series: Series, clipped: Sequence[ClippedCount] = ()) -> None:
        """Take in the layers' ``series``, and how many elements of each layer were clamped, where any could be."""
        self._steps += len(series.scale)
        self._all_steps += len(series.triggered)
        self._triggered += series.triggered.sum(axis=0)
        self._scale += series.scale.sum(axis=0)
        self._angle += np.nansum(series.angle, axis=0)
        self._angles += np.isfinite(series.angle).sum(axis=0)
        if clipped:
            self._clipped += np.array([(count.lo, count.likely, count.hi) for count in clipped]).T

    def means(self) -> LayerMeans:
        """The means over those steps."""
        with np.errstate(invalid="ignore"):
            steps = np.float64(self._steps)
            return LayerMeans(
                clip_rate=self._triggered / np.float64(self._all_steps),
                scale=self._scale / steps,
                angle=self._angle / self._angles,
                clipped=tuple(ClippedCount(lo, likely, hi) for lo, likely, hi in self._clipped.T.tolist()),
                steps=self._steps,
            )


@dataclass(frozen=True, slots=True, eq=False)
class LayerMeans:
    """Means over the finite steps, one entry per layer (NaN where there are none); ``clipped`` elements in all.

    All but ``clip_rate`` are over those ``steps`` at which they are known.
    """

    clip_rate: FloatArray
    scale: FloatArray
    angle: FloatArray
    clipped: tuple[ClippedCount, ...]
    steps: int


@dataclass(frozen=True, slots=True, eq=False)
class Effect:
    """What a policy does to a run; ``angle_error`` is the largest half-width of a joint angle's interval (degrees).

    ``clipped`` counts the elements that it clamps, over all steps.
    """

    joint: Series
    groups: Series
    layers: LayerMeans
    angle_error: float = 0.0
    clipped: ClippedCount = NOTHING


def effect_of_scaling(parts: Iterable[tuple[Moments, BoolArray]], layout: TensorLayout) -> Effect:
    """The effect of scaled tensors: ``parts`` holds moments and triggers [steps, tensors] for stretches of the run."""
    joint, groups, layers = [], [], LayerTotals(len(layout.layers))
    for moments, triggered in parts:
        layers.add(Series.of(moments.merge(layout.layers), layout.layers.any(triggered)))
        groups.append(Series.of(moments.merge(layout.groups), layout.groups.any(triggered)))
        joint.append(Series.of(moments.merge(layout.joint), layout.joint.any(triggered)))
    return Effect(
        joint=Series.concatenate(joint, 1),
        groups=Series.concatenate(groups, len(layout.groups)),
        layers=layers.means(),
    )
