from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def addresses(
    gradients: Sequence[Any | None], kind: type, layout: object, dtypes: list[Any], numels: list[int]
) -> list[int] | None: ...

class Copy:
    @property
    def pointers(self) -> list[int]: ...
    def __init__(self, nbytes: list[int]) -> None: ...
    def take(
        self,
        gradients: Sequence[Any | None],
        kind: type,
        layout: object,
        dtypes: list[Any],
        numels: list[int],
        nbytes: list[int],
    ) -> bool: ...

class GradientTally:
    def __init__(self, numels: Sequence[int], dtypes: Sequence[str]) -> None: ...
    def measure(self, pointers: list[int], spectra: int) -> tuple[bytes, int, int]: ...

class RowBatch:
    def __init__(self, copied: type, array: type, coarse: tuple[Any, ...], most: int) -> None: ...
    def gather(self, waiting: deque[tuple[Any, ...]]) -> int: ...
    def measured(self) -> tuple[bytes, tuple[bytes, ...]]: ...

class UpdateTally:
    limit: int
    def __init__(self, numels: Sequence[int], dtypes: Sequence[str], limit: int = ...) -> None: ...
    def before(self, pointers: list[int]) -> bytes: ...
    def after(self, pointers: list[int]) -> bytes: ...

class FineMoments:
    def __init__(self) -> None: ...
    def store(
        self,
        code: NDArray[np.int64],
        count: NDArray[np.float64],
        sum: NDArray[np.float64],
        squares: NDArray[np.float64],
    ) -> tuple[bytes, int]: ...
