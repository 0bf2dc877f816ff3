"""What a recorded run clipped itself: how often, at which limits, and whether the library decided as it should have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from gradscope import results
from gradscope.gradients import RecordedClip
from gradscope.intervals import clip_rate_interval
from gradscope.phases import find_phases
from gradscope.selection import first_groups, recent_part
from gradscope.tensors import ClipGroup

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class ClipHistory:
    """The clip calls of a run; all arrays are [steps, groups], with the meaning they have in ``RecordedClip``.

    A ``norm_type`` that is NaN counts as 2, and a limit that is infinite is none.  ``first`` (bool [groups]) says which
    groups share no tensor with one before them.  ``present`` (bool) says where a group is there; ``norm`` (NaN where it
    holds NaN or Inf) and ``max_abs`` are those of what it met, at the steps at which that was recorded (``told``, bool
    [steps]).
    """

    max_norm: FloatArray
    clip_value: FloatArray
    returned_norm: FloatArray
    norm_type: FloatArray
    stepped: NDArray[np.int8]
    present: BoolArray
    norm: FloatArray
    max_abs: FloatArray
    first: BoolArray
    told: BoolArray

    @classmethod
    def unknown(cls, steps: int, groups: Sequence[ClipGroup]) -> ClipHistory:
        """A history of ``groups`` that ``take`` fills, step by step."""
        shape = (steps, len(groups))
        return cls(
            **{name: np.full(shape, np.nan) for name in ("max_norm", "clip_value", "returned_norm", "norm_type")},
            stepped=np.full(shape, -1, np.int8),
            present=np.ones(shape, dtype=np.bool_),
            norm=np.full(shape, np.nan),
            max_abs=np.full(shape, np.nan),
            first=first_groups(groups),
            told=np.zeros(steps, dtype=np.bool_),
        )

    def take(self, step: int, call: RecordedClip) -> None:
        """Put down what is known of a step."""
        # Clipping at infinity is how the norm is had without clipping.
        self.max_norm[step] = np.where(np.isinf(call.max_norm), np.nan, call.max_norm)
        self.clip_value[step] = np.where(np.isinf(call.clip_value), np.nan, call.clip_value)
        self.returned_norm[step] = call.returned_norm
        self.stepped[step] = call.stepped
        if call.norm_type is not None:
            self.norm_type[step] = call.norm_type
        if call.totals is not None:
            totals = call.totals
            self.told[step] = True
            self.present[step] = totals.present
            self.norm[step] = np.where(totals.nonfinite > 0, np.nan, np.sqrt(totals.sum_squares))
            self.max_abs[step] = totals.max_abs

    def last(self) -> ClipHistory:
        """The last step alone."""
        arrays = {field.name: getattr(self, field.name)[-1:] for field in fields(self) if field.name != "first"}
        return ClipHistory(**arrays, first=self.first)

    @property
    def met(self) -> bool:
        """Whether what the groups met was recorded throughout."""
        return bool(self.told.all())

    def limited(self) -> BoolArray:
        """Where a clip call was made with a limit."""
        return np.asarray(~(np.isnan(self.max_norm) & np.isnan(self.clip_value)))

    def clipped(self, norms: FloatArray, max_abs: FloatArray) -> BoolArray:
        """Where the gradient, of L2 ``norms`` and largest magnitudes ``max_abs``, exceeded its limit.

        For a norm of another type than 2 that is decided by ``max_abs`` (infinity) or by what the library returned; so
        it is where the gradients had been clipped before and what was met then is not known.
        """
        measured = np.where(np.isinf(self.norm_type), max_abs, self.returned_norm)
        measured = np.where(self._euclidean, norms, measured)
        measured = np.where(self._exact, measured, self.returned_norm)
        return np.asarray((measured > self.max_norm) | (max_abs > self.clip_value))

    def decided_otherwise(self, norms: FloatArray) -> BoolArray:
        """Where the norm that the library returned and the exact one are on different sides of max_norm."""
        both = self._exact & self._euclidean & ~np.isnan(self.returned_norm) & ~np.isnan(self.max_norm)
        return np.asarray(both & ((self.returned_norm > self.max_norm) != (norms > self.max_norm)))

    @property
    def _exact(self) -> BoolArray:
        """Of which groups the norm is known exactly."""
        return np.ones_like(self.first) if self.met else self.first

    @property
    def _euclidean(self) -> BoolArray:
        return np.asarray(np.isnan(self.norm_type) | (self.norm_type == 2.0))


def describe_run(
    history: ClipHistory,
    names: list[str],
    index: NDArray[np.int64],
    finite: BoolArray,
    norms: FloatArray,
    max_abs: FloatArray,
    joint: FloatArray,
) -> results.RecordedRun:
    """What the run clipped, from its ``history`` and its gradients.

    ``names`` are those of the clip groups, ``index`` (int64) and ``finite`` (bool) are [steps]; ``norms`` and
    ``max_abs`` are float64 [steps, groups], ``joint`` norms float64 [steps].
    """
    limited = history.limited() & finite[:, None] & np.isfinite(norms)
    clipped = history.clipped(norms, max_abs) & limited
    differ = history.decided_otherwise(norms) & limited
    groups = tuple(
        _clipping(name, history, [g], index, limited[:, g], clipped[:, g], differ[:, g], norms[:, g])
        for g, name in enumerate(names)
    )
    met, hit, wrong = (np.asarray(here.any(axis=1)) for here in (limited, clipped, differ))
    largest = np.fmax.reduce(norms, axis=1, initial=0.0)
    skipped = _skipped(history.stepped)
    return results.RecordedRun(
        overall=_clipping("all", history, list(range(len(names))), index, met, hit, wrong, largest),
        groups=groups,
        steps_skipped=None if skipped is None else int(skipped.sum()),
        nonfinite_skipped=None if skipped is None else int((skipped & ~finite).sum()),
        phases=_phases(joint, index, finite),
    )


def _clipping(
    name: str,
    history: ClipHistory,
    groups: list[int],
    index: NDArray[np.int64],
    limited: BoolArray,
    clipped: BoolArray,
    differ: BoolArray,
    norms: FloatArray,
) -> results.RecordedClipping:
    """One clip group, or several as one: a step counts where one of them met a limit."""
    recent = recent_part(len(index))
    interval, effective = clip_rate_interval(clipped[limited], norms[limited])
    newest = limited[recent]
    newest_interval, newest_effective = clip_rate_interval(clipped[recent][newest], norms[recent][newest])
    limits = [_known(history.max_norm[:, g]) for g in groups]
    values = [_known(history.clip_value[:, g]) for g in groups]
    return results.RecordedClipping(
        name=name,
        max_norm=_common([float(limit[-1]) if len(limit) else None for limit in limits]),
        first_max_norm=_common([float(limit[0]) if len(limit) else None for limit in limits]),
        max_norm_changes=max((int(np.count_nonzero(np.diff(limit))) for limit in limits), default=0),
        clip_value=_common([float(value[-1]) if len(value) else None for value in values]),
        steps=int(limited.sum()),
        clipped_steps=int(clipped.sum()),
        clip_rate=_share(clipped[limited]),
        clip_rate_ci95=interval,
        effective_steps=effective,
        recent=results.RecentClipping(
            steps=(int(index[recent.start]), int(index[recent.stop - 1])),
            clip_rate=_share(clipped[recent][newest]),
            clip_rate_ci95=newest_interval,
            effective_steps=newest_effective,
            length=recent.stop - recent.start,
        ),
        decisions_differ=int(differ.sum()),
        updates=int(history.present[:, groups].any(axis=1).sum()),
    )


def _known(limits: FloatArray) -> FloatArray:
    return limits[~np.isnan(limits)]


def _common(limits: list[float | None]) -> float | None:
    """What all clip groups share; None where they differ."""
    return limits[0] if len(set(limits)) == 1 else None


def _share(clipped: BoolArray) -> float:
    return float(clipped.mean()) if len(clipped) else float("nan")


def _skipped(stepped: NDArray[np.int8]) -> BoolArray | None:
    """Where an optimizer is known not to have stepped, and none is known to have; None where nothing is known."""
    if not (stepped >= 0).any():
        return None
    return np.asarray((stepped == 0).any(axis=1) & ~(stepped == 1).any(axis=1))


def _phases(norms: FloatArray, index: NDArray[np.int64], finite: BoolArray) -> tuple[results.NormPhase, ...]:
    """The stretches of steady size; steps that are not finite belong to the phase before them."""
    sizes = norms[finite]
    found = find_phases(sizes)
    positions = np.flatnonzero(finite)
    starts = [0, *(int(positions[phase.start]) for phase in found[1:])]
    stops = [*starts[1:], len(index)]
    return tuple(
        results.NormPhase(
            steps=(int(index[start]), int(index[stop - 1])),
            median_norm=float(np.median(sizes[phase.start : phase.stop])),
        )
        for phase, start, stop in zip(found, starts, stops, strict=False)
    )
