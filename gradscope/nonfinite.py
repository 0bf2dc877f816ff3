"""Steps that hold NaN or Inf: which tensors, and what was still finite before them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gradscope.results import NonfiniteStep


def name_fault(step: int, label: str, names: list[str], nonfinite: NDArray[np.int64]) -> NonfiniteStep:
    """Name the tensors of one step whose ``nonfinite`` count (int64, one per tensor, in module order) is not zero.

    ``last_finite_before`` lists the finite tensor in front of each run of faulty ones: together they bracket the fault.
    """
    faulty = nonfinite > 0
    starts = np.flatnonzero(faulty[1:] & ~faulty[:-1])
    return NonfiniteStep(
        step=step,
        label=label,
        tensors=tuple(names[i] for i in np.flatnonzero(faulty)),
        last_finite_before=tuple(names[i] for i in starts),
    )
