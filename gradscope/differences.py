"""How far two series of the same quantity are apart, beyond what noise explains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Difference:
    """``change`` is the mean of b minus that of a, ``error`` its standard error; inf where too little is known.

    ``effective`` is the number of independent values behind each of the two means.
    """

    change: float
    error: float
    effective: tuple[float, float]
