from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

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

class Memory(Buffer):
    def __len__(self) -> int: ...

class RowBatch:
    def __init__(self, copied: type, array: type, coarse: tuple[Any, ...], most: int) -> None: ...
    @property
    def full(self) -> bool: ...
    def take(self, step: int, group: int, call: Any, stepped: Any, update_norms: list[Any]) -> bool: ...
    def measure(self) -> None: ...
    def hand_over(self) -> tuple[Memory, tuple[Memory | bytes, ...]] | None: ...

class ArrowRows:
    address: int
    def __init__(
        self,
        heads: bytes | bytearray | Memory,
        row_bytes: int,
        flags: int,
        columns: list[tuple[str, int, int, int, bytes | bytearray | Memory | None]],
    ) -> None: ...

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
