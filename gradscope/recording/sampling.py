"""Which steps are recorded, and in what detail."""

from __future__ import annotations

from dataclasses import dataclass

from gradscope.trace.schema import TENSOR_SPECTRA_EVERY, Detail


@dataclass(slots=True)
class Plan:
    """What is measured of ``step``: whether it is ``due`` at all, which ``spectra`` (0: none, 1: of the group, 2: of

    the group and its tensors), and whether ``tenth``: one of those that carry what is too dear for every step.
    """

    step: int
    due: bool
    spectra: int
    tenth: bool


class Sampling:
    """Plans the steps."""

    def __init__(self, every: int = 1, start: int = 0, detail: Detail = "default") -> None:
        self.every = every
        self.start = start
        self.detail: Detail = detail
        self._plan = self._of(0)

    def plan(self, step: int) -> Plan:
        """The plan for ``step``; a step is asked for several times in a row."""
        if self._plan.step != step:
            self._plan = self._of(step)
        return self._plan

    def _of(self, step: int) -> Plan:
        due = step >= self.start and (step - self.start) % self.every == 0
        tenth = due and (step - self.start) // self.every % TENSOR_SPECTRA_EVERY == 0
        spectra = 2 if self.detail == "full" or tenth else 1
        return Plan(step, due, 0 if self.detail == "norms" else spectra, tenth)

    def records_all_after(self, step: int) -> bool:
        """Whether every step after ``step`` is recorded."""
        return self.every == 1 and step >= self.start
