"""Clip by value, read off the magnitude spectra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gradscope.clipped_count import ClippedCount, exactly
from gradscope.clipping.effect import BoolArray, Effect, LayerTotals, Series
from gradscope.clipping.layout import Partition, TensorLayout
from gradscope.clipping.policy import ClippedStep, Convention, ElementPolicy, FloatArray
from gradscope.errors import GradscopeError
from gradscope.selection import first_groups
from gradscope.value_clip import ValueClip

if TYPE_CHECKING:
    from gradscope.gradients import GradientSource, GradientStep
    from gradscope.spectrum import MagnitudeSpectrum

ALL_SPECTRA = "gradscope record --detail full keeps every tensor's spectrum at every step"


class ClipByValue(ElementPolicy):
    """Every element into [−v, v] (PyTorch ``clip_grad_value_``, optax ``clip``, Keras ``clipvalue``).

    A step is triggered if any |g| > v.  The angle is that of cos θ = g·c/(‖g‖‖c‖), with the rigorous half-width that
    the spectrum's bin around v leaves.  Where a source holds the spectra of its clip groups, the joint gradient and
    the groups are read off those, and the layers off the steps that have their tensors' spectra.
    """

    __slots__ = ()

    def replay(self, source: GradientSource, layout: TensorLayout) -> _ValueReplay:
        """A replay that reads each step's spectra.  It raises GradscopeError at a step that lacks what is needed."""
        return _ValueReplay(self.label, self.arguments[0], source, layout)

    def application(
        self, source: GradientSource, layout: TensorLayout, convention: Convention
    ) -> Callable[[GradientStep], ClippedStep | None]:
        """Every step clamped."""
        clamped = _ClampedElements(self.arguments[0])
        return lambda step: clamped


@dataclass(frozen=True, slots=True)
class _ClampedElements:
    clip_value: float

    def block(self, tensor: int, start: int, elements: FloatArray) -> FloatArray:
        return np.clip(elements, -self.clip_value, self.clip_value)


class _ValueReplay:
    """One row per step for the joint gradient and the clip groups; layers are summed up as they come."""

    def __init__(self, label: str, clip_value: float, source: GradientSource, layout: TensorLayout) -> None:
        self._label = label
        self._clip_value = clip_value
        self._source = source
        self._layout = layout
        self._divisions: dict[bytes, _Division] = {}
        self._met: list[Series] | None = None if first_groups(source.groups).all() else []
        self._joint: list[Series] = []
        self._groups: list[Series] = []
        self._layers = LayerTotals(len(layout.layers))
        self._clipped = exactly(0)
        self._angle_error = 0.0

    def see(self, step: GradientStep) -> None:
        layout, over = self._layout, step.max_abs[None] > self._clip_value
        division = self._division(step)
        recorded = self._recorded_clips(step, division.members)
        tensors = self._clips(step.spectra, step.max_abs)
        groups = None if tensors is None else _merge(tensors, layout.groups)
        if recorded is not None and division.unions is not None:
            groups = _merge(recorded, division.unions)
        in_groups, in_layers = (
            None if step.present is None else sets.any(step.present[None]) for sets in (layout.groups, layout.layers)
        )
        joint = recorded or groups
        if joint is None:
            raise self._lacking(step)
        whole = joint[0] if len(joint) == 1 else ValueClip.total(joint)
        series, error = _series([whole], layout.joint.any(over))
        self._joint.append(series)
        self._clipped += whole.clipped
        self._angle_error = max(self._angle_error, error)
        self._groups.append(_series(groups, layout.groups.any(over), in_groups)[0])
        layers = None if tensors is None else _merge(tensors, layout.layers)
        counts: list[ClippedCount] = [] if layers is None else [clip.clipped for clip in layers]
        self._layers.add(_series(layers, layout.layers.any(over), in_layers)[0], counts, in_layers)
        if self._met is not None:
            met = self._what_groups_met(step)
            if met is None:
                self._met = None
            else:
                self._met.append(met)

    def effect(self) -> Effect:
        groups = Series.concatenate(self._groups, len(self._layout.groups))
        if self._joint and not len(groups.scale):
            raise GradscopeError(
                f"--policy {self._label}",
                "none of these steps holds the spectra that other clip groups than the recorded ones need",
                f"choose more --steps, or none; {ALL_SPECTRA}",
            )
        return Effect(
            joint=Series.concatenate(self._joint, 1),
            groups=groups,
            layers=self._layers.means(),
            angle_error=self._angle_error,
            clipped=self._clipped,
            met=None if self._met is None else Series.concatenate(self._met, len(self._source.groups)),
        )

    def _division(self, step: GradientStep) -> _Division:
        """The clip groups that tell of the tensors at ``step``: a step holds those of its optimizers alone."""
        totals = step.recorded.totals if step.recorded is not None else None
        there = np.ones(len(self._source.groups), dtype=np.bool_) if totals is None else totals.present
        key = there.tobytes()
        if key not in self._divisions:
            members = _members(self._source, there)
            self._divisions[key] = _Division(members, _unions(members, self._layout.groups))
        return self._divisions[key]

    def _recorded_clips(
        self, step: GradientStep, division: dict[int, NDArray[np.intp]] | None
    ) -> list[ValueClip] | None:
        """One clip per clip group of the ``division``, where the step holds their spectra."""
        if division is None or not step.group_spectra:
            return None
        largest = [float(step.max_abs[members].max(initial=0.0)) for members in division.values()]
        return self._clips([step.group_spectra[place] for place in division], largest)

    def _what_groups_met(self, step: GradientStep) -> Series | None:
        """All clip groups of the source, each by the gradient that it met itself, where the step holds that."""
        totals = step.recorded.totals if step.recorded is not None else None
        clips = None if totals is None else self._clips(step.group_spectra, totals.max_abs)
        if totals is None or clips is None:
            return None
        there = totals.present & (totals.nonfinite == 0)
        return _series(clips, (totals.max_abs > self._clip_value)[None], there[None])[0]

    def _clips(
        self, spectra: Sequence[MagnitudeSpectrum | None], largest: Sequence[float] | FloatArray
    ) -> list[ValueClip] | None:
        """One clip per set of elements, whose ``largest`` magnitude is known; None where a spectrum is missing.

        What had no gradient at a step has no spectrum, and needs none.
        """
        clips = []
        for spectrum, most in zip(spectra, largest, strict=bool(spectra)):
            if spectrum is None and most > 0.0:
                return None
            clips.append(
                ValueClip.none(self._clip_value) if spectrum is None else spectrum.value_clip(self._clip_value)
            )
        return clips or None

    def _lacking(self, step: GradientStep) -> GradscopeError:
        where, what = f"--policy {self._label}", f"step {step.index} ({step.label})"
        if any(spectrum is not None for spectrum in (*step.spectra, *step.group_spectra)):
            return GradscopeError(where, f"{what} holds the spectra of some of its tensors only", ALL_SPECTRA)
        return GradscopeError(
            where,
            f"{what} holds norms only; clip by value needs the elements or their spectra",
            "gradient dumps hold them, and what gradscope record writes without --detail norms",
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Division:
    """The tensors of the clip groups that divide a source's among them, and to which groups asked for each belongs.

    None where no groups divide the tensors, or where one of them is divided itself.
    """

    members: dict[int, NDArray[np.intp]] | None
    unions: Partition | None


def _members(source: GradientSource, there: BoolArray) -> dict[int, NDArray[np.intp]] | None:
    """The clip groups of ``source``, by their place, that divide its tensors among them; None where none do.

    Those that are ``there`` at a step come first.  A group that shares tensors with one before it met gradients that
    were clipped already.
    """
    position = {tensor.name: i for i, tensor in enumerate(source.tensors)}
    members: dict[int, NDArray[np.intp]] = {}
    left = set(position)
    for place in np.argsort(~there, kind="stable").tolist():
        group = source.groups[place]
        if left.issuperset(group.tensors):
            members[place] = np.array([position[name] for name in group.tensors], dtype=np.intp)
            left.difference_update(group.tensors)
    return None if left else members


def _unions(recorded: dict[int, NDArray[np.intp]] | None, groups: Partition) -> Partition | None:
    """Which of ``groups`` each recorded clip group belongs to; None where one is divided among several."""
    if recorded is None:
        return None
    owners = [np.unique(groups.owner[members]) for members in recorded.values()]
    if any(len(owner) != 1 for owner in owners):
        return None
    return Partition.over(np.concatenate(owners), groups.names)


def _merge(clips: list[ValueClip], sets: Partition) -> list[ValueClip]:
    members: list[list[ValueClip]] = [[] for _ in range(len(sets))]
    for owner, clip in zip(sets.owner.tolist(), clips, strict=True):
        members[owner].append(clip)
    return [parts[0] if len(parts) == 1 else ValueClip.total(parts) for parts in members]


def _series(
    clips: list[ValueClip] | None, triggered: BoolArray, present: BoolArray | None = None
) -> tuple[Series, float]:
    """One step's ``clips``, one per set, as a series of length 1, and the widest half-width of an angle.

    Without clips only the triggers are known.  ``present`` ([1, sets]) says which sets had a gradient, None: all.
    """
    if clips is None:
        unknown = np.empty((0, triggered.shape[1]))
        return Series(triggered, unknown, unknown, unknown), 0.0
    rows = [(clip.scale(), clip.norm_ratio(), *clip.direction_change_deg()) for clip in clips]
    columns: FloatArray = np.array(rows, dtype=np.float64).T[:, None, :]
    series = Series(triggered, columns[0], columns[1], columns[2])
    return series if present is None else series.where(present), float(columns[3].max())
