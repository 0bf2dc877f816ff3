from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

class Scanner:
    dtype: str
    def __init__(self, dtype: str) -> None: ...
    def feed(self, buffer: Buffer | NDArray[Any]) -> None: ...
    def feed_file(self, fd: int, offset: int, nbytes: int) -> None: ...
    def take(self) -> tuple[bytes, float, float, int, int, int, int]: ...

def scatter_doubt(rounding: float, count: float, position: float, scatter: float) -> float: ...
def clip_sums(
    lower: NDArray[np.float64],
    upper: NDArray[np.float64],
    count: NDArray[np.int64],
    sum_abs: NDArray[np.float64],
    squares: NDArray[np.float64] | None,
    v: float,
    rounding: float = 0.0,
) -> tuple[int, float, float, float, tuple[float, float, float], tuple[float, float, float]]: ...
