"""Recorded runs: what ``gradscope record`` wrote, as a source of gradient steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np

from gradscope.errors import GradscopeError
from gradscope.gradients import GradientSource, GradientStep, GroupTotals, IntArray, Progress, RecordedClip, SourceInfo
from gradscope.notation import names
from gradscope.spectrum import MagnitudeSpectrum
from gradscope.tensors import ClipGroup, TensorInfo
from gradscope.trace.schema import METADATA_FILE

if TYPE_CHECKING:
    from gradscope.trace.merging import MergedSteps
    from gradscope.trace.ranks import RecordedRun

# A run writes every quarter of a second while it trains; it may pause for longer to evaluate.
SILENCE_SECONDS = 60.0


def trace_directory(path: Path) -> Path | None:
    """The trace that ``path`` is or belongs to; None if there is none."""
    if path.is_dir():
        # Profilers, too, call what they write trace.json.
        holds = (path / METADATA_FILE).is_file() and any(path.glob("rank-*.arrows"))
        return path if holds or path.suffix == ".gradscope" else None
    belongs = path.name == METADATA_FILE or (path.name.startswith("rank-") and path.suffix in (".arrows", ".json"))
    return trace_directory(path.absolute().parent) if belongs and path.parent != path else None


def open_trace(path: Path) -> RecordedTrace:
    """The trace in the directory ``path``, as far as it is written.

    Raises:
        GradscopeError: it is none, is damaged, or is of a later version.
    """
    from gradscope.trace.ranks import RecordedRun

    try:
        run = RecordedRun.open(path)
    except OSError as error:
        raise GradscopeError(str(path), (error.strerror or str(error)).lower()) from None
    if not len(run.steps):
        raise GradscopeError(str(path), "holds no steps" + (" yet" if run.metadata.ended is None else ""))
    framework = f"{run.metadata.framework} " if run.metadata.framework else ""
    infos = tuple(TensorInfo(tensor.name, tensor.shape, tensor.dtype) for tensor in run.tensors)
    return RecordedTrace(
        info=SourceInfo(str(path), "trace", f"recorded {framework}run", len(run.steps)),
        tensors=infos,
        groups=tuple(
            ClipGroup(group.name, tuple(infos[i].name for i in group.tensors), run.max_norm(number))
            for number, group in enumerate(run.groups)
        ),
        notes=(*run.notes, *_sampled(run), *_after_clipping(run), *_unfinished(run)),
        findings=tuple(finding.message for finding in run.findings),
        lint=run.findings,
        ranks=run.metadata.world_size,
        run=run,
    )


@dataclass(eq=False)
class RecordedTrace(GradientSource):
    """A recorded run, its ranks merged.  A tensor without a gradient at a step is zeros, and not ``present``."""

    run: RecordedRun | None = None

    @property
    def recorded_run(self) -> RecordedRun:
        """The run as its ranks recorded it."""
        assert self.run is not None
        return self.run

    def told_of(self, progress: Progress | None, steps: int) -> Callable[[int], None] | None:
        """``progress`` through ``steps`` steps as a function of the steps that are done."""
        if progress is None:
            return None
        total = sum(rank.trace.stream.nbytes for rank in self.recorded_run.ranks)
        return lambda done: progress(total * done // steps, total)

    @property
    def step_numbers(self) -> IntArray:
        """The number under which each step was recorded, int64 [steps]."""
        return self.recorded_run.steps

    def read_steps(self, steps: range, progress: Progress | None = None) -> Iterator[GradientStep]:
        """The steps at these positions; ``index`` is the number under which each was recorded.

        Spectra are decoded when they are asked for.

        Raises:
            GradscopeError: a stream is no longer what it was when it was opened.
        """
        from gradscope.trace.merging import merged_steps

        if not steps:
            return
        numel = np.array([tensor.numel for tensor in self.tensors], dtype=np.int64)
        wanted = range(steps[0], steps[-1] + 1)
        told = self.told_of(progress, len(wanted))
        done = 0
        for merged in merged_steps(self.recorded_run, wanted):
            zeros = np.where(merged.has_gradient, merged.zeros, numel)
            for place in range(len(merged.step)):
                if done % steps.step == 0:
                    yield self._step(merged, place, zeros[place])
                done += 1
            if told is not None:
                told(done)

    def _step(self, merged: MergedSteps, place: int, zeros: IntArray) -> GradientStep:
        groups = len(self.groups) if self.recorded_run.metadata.detail != "norms" else 0
        tensors = len(self.tensors) if merged.has_tensor_spectra[place] else 0
        measured = bool(merged.measured[place])
        seconds = float(merged.time[place])
        return GradientStep(
            index=int(merged.step[place]),
            label=time.strftime("%H:%M:%S", time.localtime(seconds)),
            sum_squares=merged.sum_squares[place],
            max_abs=merged.max_abs[place],
            zeros=zeros,
            nan=merged.nan[place],
            inf=merged.inf[place],
            spectra=_Spectra(tensors, merged.tensor_spectrum, place),
            group_spectra=_Spectra(groups, merged.group_spectrum, place),
            recorded=RecordedClip(
                time=seconds,
                max_norm=merged.max_norm[place],
                clip_value=merged.clip_value[place],
                returned_norm=merged.returned_norm[place],
                stepped=merged.stepped[place],
                weight_norm=merged.weight_norm[place] if measured else None,
                update_norm=merged.update_norm[place] if measured else None,
                norm_type=merged.norm_type[place],
                totals=GroupTotals(
                    present=merged.has_row[place],
                    sum_squares=merged.group_sum_squares[place],
                    max_abs=merged.group_max_abs[place],
                    nonfinite=merged.group_nonfinite[place],
                ),
            ),
            present=merged.has_gradient[place],
        )


class _Spectra(Sequence[MagnitudeSpectrum | None]):
    """The spectra of one step, each decoded when it is asked for: most of what reads a step asks for none."""

    __slots__ = ("_decode", "_length", "_place")

    def __init__(self, length: int, decode: Callable[[int, int], MagnitudeSpectrum | None], place: int) -> None:
        self._length = length
        self._decode = decode
        self._place = place

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, at: int) -> MagnitudeSpectrum | None: ...

    @overload
    def __getitem__(self, at: slice) -> tuple[MagnitudeSpectrum | None, ...]: ...

    def __getitem__(self, at: int | slice) -> MagnitudeSpectrum | tuple[MagnitudeSpectrum | None, ...] | None:
        places = range(self._length)[at]
        if isinstance(places, range):
            return tuple(self._decode(self._place, i) for i in places)
        return self._decode(self._place, places)


def _sampled(run: RecordedRun) -> tuple[str, ...]:
    every, start = run.metadata.every, run.metadata.start
    if every == 1:
        return (f"Recorded from update {start:,} on.",) if start else ()
    return (f"One update in {every} was recorded" + (f", from update {start:,} on." if start else "."),)


def _after_clipping(run: RecordedRun) -> list[str]:
    frameworks: dict[str, list[str]] = {}
    for group in run.groups:
        if group.after_clipping is not None:
            frameworks.setdefault(group.after_clipping, []).append(group.name)
    return [
        f"{framework} clips inside its own optimizer: the gradients of {names(groups)} are those after clipping."
        for framework, groups in frameworks.items()
    ]


def _unfinished(run: RecordedRun) -> list[str]:
    if run.metadata.ended is not None:
        return []
    silence = time.time() - _last_write(run)
    if silence < SILENCE_SECONDS:
        return ["This run is still being recorded: these are the steps so far."]
    return ["The recording was cut off: these are the steps up to then."]


def _last_write(run: RecordedRun) -> float:
    try:
        return max(rank.trace.stream.path.stat().st_mtime for rank in run.ranks)
    except OSError:
        return math.nan
