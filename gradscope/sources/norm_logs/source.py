"""A log of norms as a source: one tensor of unknown shape for each series, and all of them one clip group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from gradscope.errors import GradscopeError
from gradscope.gradients import GradientSource, GradientStep, Progress, SourceInfo
from gradscope.notation import count
from gradscope.sources.norm_logs.series import FloatArray, IntArray, NormLog, Series
from gradscope.sources.norm_logs.tags import Tags
from gradscope.tensors import ClipGroup, TensorInfo

GROUP = "all"
# The shape of what was logged is not known: no elements is what the norm says about them.
UNKNOWN_SHAPE = (0,)
STRETCH = 1 << 14
AS_LOGGED = (
    "The norms are what the training logged: whether each is one update's, before its clipping, the log does not say."
)


@dataclass(eq=False)
class NormLogSource(GradientSource):
    """Norms by step: ``norms`` is float64 [steps, series] and ``index`` (int64) holds the logged steps, rising.

    A tensor stands for a series and has ``numel`` 0, as its shape is unknown.  A step's ``sum_squares`` are the
    squared norms; ``max_abs`` is NaN, unknown; a norm of NaN or Inf counts as one such element.
    """

    index: IntArray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    norms: FloatArray = field(default_factory=lambda: np.empty((0, 0)))
    counted: bool = False

    @property
    def step_numbers(self) -> IntArray:
        """The steps as they were logged."""
        return self.index

    def read_steps(self, steps: range, progress: Progress | None = None) -> Iterator[GradientStep]:
        """The steps at these positions; everything is in memory already."""
        for start in range(steps.start, steps.stop, steps.step * STRETCH):
            chosen = slice(start, min(start + steps.step * STRETCH, steps.stop), steps.step)
            yield from self._stretch(self.index[chosen].tolist(), self.norms[chosen])

    def _stretch(self, index: list[int], norms: FloatArray) -> Iterator[GradientStep]:
        nan, inf = np.isnan(norms), np.isinf(norms)
        with np.errstate(over="ignore"):
            energy = np.where(nan | inf, 0.0, np.square(norms))
        unknown, none = np.full(norms.shape[1], np.nan), np.zeros(norms.shape[1], dtype=np.int64)
        spectra = (None,) * norms.shape[1]
        word = "row" if self.counted else "step"
        nans, infs = nan.astype(np.int64), inf.astype(np.int64)
        for i, number in enumerate(index):
            yield GradientStep(number, f"{word} {number}", energy[i], unknown, none, nans[i], infs[i], spectra)


def norm_log_source(log: NormLog, path: str, tags: Tags) -> NormLogSource:
    """The source that ``log``, read from ``path``, makes with the series that ``tags`` choose.

    Raises:
        GradscopeError: the log holds none of them, is ambiguous, or a series holds something else than norms.
    """
    chosen = tags.choose(tuple(log.series), log.others)
    ordered, notes = {}, list(log.notes)
    for name in chosen:
        ordered[name] = _in_order(log.series[name], name, path, notes, log.counted)
    index, norms = _side_by_side(ordered, path, notes)
    what = chosen[0] if len(chosen) == 1 else f"{len(chosen)} series"
    sample = _sample(index) if log.meaning is None and not log.counted else None
    rows = "The log names no steps: its rows are counted." if log.counted else None
    meaning = (AS_LOGGED,) if log.meaning is None else log.meaning
    first = tuple(note for note in (sample, rows) if note)
    return NormLogSource(
        info=SourceInfo(path, "norm-log", f"{log.format} of {what}", len(index)),
        tensors=tuple(TensorInfo(name, UNKNOWN_SHAPE, "") for name in chosen),
        groups=(ClipGroup(GROUP, chosen, log.max_norm),),
        notes=(*first, *meaning, *dict.fromkeys(notes)),
        index=index,
        norms=norms,
        counted=log.counted,
    )


def _in_order(series: Series, name: str, path: str, notes: list[str], counted: bool) -> Series:
    """The series by rising steps.

    A log that was resumed goes back and logs some steps again, of which the last values are those of the run that went
    on.  A log that never goes back but repeats steps has several values in each, all of which count.
    """
    steps, values = series.steps, series.values
    if not len(values):
        raise GradscopeError(path, f"holds no values of {name}")
    if (values < 0).any():
        place = int(np.flatnonzero(values < 0)[0])
        where = f"{'row' if counted else 'step'} {steps[place]}"
        raise GradscopeError(path, f"{name} is {values[place]:g} at {where}, and a norm is never negative")
    apart = np.diff(steps)
    if (apart >= 0).all():
        if shared := int((apart == 0).sum()):
            notes.append(
                f"{count(shared)} values of {name} share their step with the one before; each counts as a step."
            )
        return series
    kept, last = np.unique(steps[::-1], return_index=True)
    dropped = len(steps) - len(kept)
    notes.append(
        f"The steps of {name} go back, as in a run that was resumed: of each step the last value counts, and "
        f"{count(dropped)} earlier {'one is' if dropped == 1 else 'ones are'} left out."
        if dropped
        else f"The steps of {name} were out of order and are sorted."
    )
    return Series(kept, values[::-1][last])


def _side_by_side(series: Mapping[str, Series], path: str, notes: list[str]) -> tuple[IntArray, FloatArray]:
    """The steps that all series have, and their values, float64 [steps, series]."""
    first, *others = series.values()
    if all(np.array_equal(first.steps, other.steps) for other in others):
        return first.steps, np.stack([held.values for held in series.values()], axis=1)
    last = {name: _last_of_each_step(held) for name, held in series.items()}
    every = np.unique(np.concatenate([held.steps for held in last.values()]))
    common = every
    for held in last.values():
        common = np.intersect1d(common, held.steps, assume_unique=True)
    if not len(common):
        raise GradscopeError(
            path, f"{', '.join(list(series)[:3])} were never logged at the same step", "pick one by --tag"
        )
    if len(common) < len(every):
        notes.append(
            f"{count(len(every) - len(common))} of {count(len(every))} steps lack some series and are left out."
        )
    columns = [held.values[np.searchsorted(held.steps, common)] for held in last.values()]
    return common, np.stack(columns, axis=1)


def _last_of_each_step(series: Series) -> Series:
    last = np.append(np.diff(series.steps) > 0, True)
    return Series(series.steps[last], series.values[last])


def _sample(index: IntArray) -> str | None:
    """A note, where there are gaps between the steps."""
    logged, span = len(index), int(index[-1]) - int(index[0]) + 1
    if logged < 2 or span <= logged:
        return None
    apart = np.diff(index)
    usual = int(np.median(apart[apart > 0]))
    one_in = f", usually one in {count(usual)}" if usual > 1 else ""
    return (
        f"A sample: the log holds {count(logged)} norms of the steps {count(int(index[0]))} to {count(int(index[-1]))}"
        f"{one_in}."
    )
