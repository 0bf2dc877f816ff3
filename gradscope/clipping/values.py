"""Clip by value, read off the magnitude spectra."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradscope.clipping.effect import BoolArray, Effect, LayerTotals, Series
from gradscope.clipping.layout import Partition, TensorLayout
from gradscope.clipping.policy import ElementPolicy, FloatArray
from gradscope.errors import GradscopeError
from gradscope.value_clip import ValueClip

if TYPE_CHECKING:
    from gradscope.gradients import GradientSource, GradientStep


class ClipByValue(ElementPolicy):
    """Every element into [−v, v] (PyTorch ``clip_grad_value_``, optax ``clip``, Keras ``clipvalue``).

    A step is triggered if any |g| > v.  The angle is that of cos θ = g·c/(‖g‖‖c‖), with the rigorous half-width that
    the spectrum's bin around v leaves.
    """

    __slots__ = ()

    def replay(self, source: GradientSource, layout: TensorLayout) -> _ValueReplay:
        """A replay that reads each step's spectra.  It raises GradscopeError at a step that has none."""
        return _ValueReplay(self.label, self.arguments[0], layout)


class _ValueReplay:
    """One row per step for the joint gradient and the clip groups; layers are summed up as they come."""

    def __init__(self, label: str, clip_value: float, layout: TensorLayout) -> None:
        self._label = label
        self._clip_value = clip_value
        self._layout = layout
        self._joint: list[Series] = []
        self._groups: list[Series] = []
        self._layers = LayerTotals(len(layout.layers))
        self._angle_error = 0.0

    def see(self, step: GradientStep) -> None:
        clips = [self._clip(step, i) for i in range(len(self._layout.tensors))]
        layers = _merge(clips, self._layout.layers)
        groups = _merge(clips, self._layout.groups)
        joint = [ValueClip.total(groups)]
        over = step.max_abs[None] > self._clip_value
        counts = [clip.clipped for clip in layers]
        self._layers.add(_series(layers, self._layout.layers.any(over))[0], counts)
        self._groups.append(_series(groups, self._layout.groups.any(over))[0])
        series, error = _series(joint, self._layout.joint.any(over))
        self._joint.append(series)
        self._angle_error = max(self._angle_error, error)

    def effect(self) -> Effect:
        return Effect(
            joint=Series.concatenate(self._joint, 1),
            groups=Series.concatenate(self._groups, len(self._layout.groups)),
            layers=self._layers.means(),
            angle_error=self._angle_error,
        )

    def _clip(self, step: GradientStep, tensor: int) -> ValueClip:
        spectrum = step.spectra[tensor] if step.spectra else None
        if spectrum is None:
            raise GradscopeError(
                f"--policy {self._label}",
                f"step {step.index} ({step.label}) holds norms only; clip by value needs the elements",
                "gradient dumps and captured batches hold them",
            )
        return spectrum.value_clip(self._clip_value)


def _merge(clips: list[ValueClip], sets: Partition) -> list[ValueClip]:
    members: list[list[ValueClip]] = [[] for _ in range(len(sets))]
    for owner, clip in zip(sets.owner.tolist(), clips, strict=True):
        members[owner].append(clip)
    return [parts[0] if len(parts) == 1 else ValueClip.total(parts) for parts in members]


def _series(clips: list[ValueClip], triggered: BoolArray) -> tuple[Series, float]:
    """One step's ``clips``, one per set, as a series of length 1, and the widest half-width of an angle."""
    rows = [(clip.scale(), clip.norm_ratio(), *clip.direction_change_deg()) for clip in clips]
    columns: FloatArray = np.array(rows, dtype=np.float64).T[:, None, :]
    return Series(triggered, columns[0], columns[1], columns[2]), float(columns[3].max())
