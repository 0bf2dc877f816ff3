"""The spectra of tensors at a few steps of many: a distribution needs no more, and decoding them is what costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from gradscope.gradients import GradientStep
from gradscope.spectrum import MagnitudeSpectrum

# Spectra of more steps than these tell nothing new of a distribution.
MOST_SAMPLED = 64
# Of dumps each takes tens of kilobytes, so they are merged long before the last step.
MOST_HELD = 8

Spectra: TypeAlias = Sequence[MagnitudeSpectrum | None]
SpectraTaker: TypeAlias = Callable[[int, Spectra], None]


@dataclass(slots=True, eq=False)
class SpectraSample:
    """Shows each of ``takers`` the spectra of at most 64 of ``steps``, evenly spaced; observes ``StepTable.read``.

    A taker is told the row of the step in the table and a spectrum for each of the ``tensors``: an empty one of a
    tensor that had no gradient, None where it is not known.  ``rows`` are the rows that were shown.
    """

    tensors: int
    steps: int
    takers: Sequence[SpectraTaker]
    rows: list[int] = field(default_factory=list)
    _seen: int = 0

    def see(self, position: int, step: GradientStep) -> None:
        """Take in a step while it is in memory."""
        row, self._seen = self._seen, self._seen + 1
        if len(step.spectra) != self.tensors or row * MOST_SAMPLED < len(self.rows) * self.steps:
            return
        self.rows.append(row)
        there = [True] * self.tensors if step.present is None else step.present.tolist()
        shown = [step.spectra[i] if there[i] else MagnitudeSpectrum() for i in range(self.tensors)]
        for take in self.takers:
            take(row, shown)


class MergedSpectra:
    """One spectrum for each of ``tensors``, of all the steps shown together."""

    def __init__(self, tensors: int) -> None:
        self._held: list[list[MagnitudeSpectrum]] = [[] for _ in range(tensors)]

    def take(self, row: int, spectra: Spectra) -> None:
        """Add the spectra of a step."""
        for held, spectrum in zip(self._held, spectra, strict=True):
            if spectrum is not None:
                held.append(spectrum)
            if len(held) > MOST_HELD:
                held[:] = [MagnitudeSpectrum.merge(held)]

    def merged(self) -> tuple[MagnitudeSpectrum | None, ...]:
        """What was taken of each tensor; None where that is nothing."""
        return tuple(MagnitudeSpectrum.merge(held) if held else None for held in self._held)
