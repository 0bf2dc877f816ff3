"""Which steps are recorded, and in what detail."""

from __future__ import annotations

from dataclasses import dataclass

from gradscope.trace.schema import TENSOR_SPECTRA_EVERY, Detail


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which steps are recorded, and in what detail."""

    every: int = 1
    start: int = 0
    detail: Detail = "default"

    def due(self, step: int) -> bool:
        """Whether ``step`` is recorded."""
        return step >= self.start and (step - self.start) % self.every == 0

    def tenth(self, step: int) -> bool:
        """Whether ``step`` is one of those that carry what is too dear for every step."""
        return (step - self.start) // self.every % TENSOR_SPECTRA_EVERY == 0

    def spectra(self, step: int) -> int:
        """0: none, 1: of the group, 2: of the group and its tensors."""
        if self.detail == "norms":
            return 0
        return 2 if self.detail == "full" or self.tenth(step) else 1
