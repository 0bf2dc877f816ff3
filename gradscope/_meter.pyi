from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

def use_openmp(parallel: int) -> None: ...

class TensorTypes:
    def __init__(
        self, plain: tuple[type, ...], strided: object, dtypes: dict[str, Any], exchange: object = None
    ) -> None: ...

class KnownTensors:
    def __init__(self, types: TensorTypes, numels: Sequence[int], dtypes: Sequence[str]) -> None: ...
    def addresses(self, tensors: Sequence[Any | None]) -> list[int] | None: ...

class Copy:
    @property
    def pointers(self) -> list[int]: ...
    def __init__(self, known: KnownTensors) -> None: ...
    def take(self, known: KnownTensors, gradients: Sequence[Any | None]) -> bool: ...

class GradientTally:
    def __init__(self, numels: Sequence[int], dtypes: Sequence[str]) -> None: ...
    def measure(self, pointers: list[int], spectra: int, divided: bool = False) -> tuple[bytes, int, int]: ...

class Memory(Buffer):
    def __len__(self) -> int: ...

class RowBatch:
    behind: bool
    steps: int
    last_step: int
    def __init__(self, copied: type, array: type, coarse: tuple[Any, ...], most: int) -> None: ...
    @property
    def full(self) -> bool: ...
    def count(self, step: int) -> None: ...
    def take(self, step: int, group: int, call: Any, stepped: Any, update_norms: list[Any]) -> bool: ...
    def measure_for(self, seconds: float, every: float) -> bool: ...
    def end(self) -> None: ...
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
    def before(self, pointers: list[int], divided: bool = False) -> bytes: ...
    def after(self, pointers: list[int], divided: bool = False) -> bytes: ...

class FineMoments:
    def __init__(self) -> None: ...
    def store(
        self,
        code: NDArray[np.int64],
        count: NDArray[np.float64],
        sum: NDArray[np.float64],
        squares: NDArray[np.float64],
    ) -> tuple[bytes, int]: ...

def same_parameters(optimizer: Any, held: list[Any]) -> bool: ...

class ExpectedClip:
    group: Any
    used: Any
    version: int
    time: float
    max_norm: float
    norm_type: float
    total_norm: Any
    weight_norms: Any
    def __init__(
        self,
        group: Any,
        code: CodeType,
        at: int,
        ids: list[int],
        smallest: int,
        number: int,
        used: Any,
        version: int,
        known: KnownTensors,
        tally: GradientTally,
        room: list[Copy],
        new_copy: Callable[[], Copy | None],
        updates: Any,
    ) -> None: ...
    @property
    def returned_norm(self) -> float | None: ...
    def handed_over(self) -> Copy: ...

class SteadySteps:
    on: bool
    seen: int
    step: int
    clipping: int
    stepping: int
    watch: Any
    def __init__(
        self,
        rows: RowBatch | None,
        now: Callable[[], float],
        emit: Callable[[int, ExpectedClip, int, Any], None],
        clipped_elsewhere: Callable[[Any], None],
        broke: Callable[[Exception], None],
    ) -> None: ...
    def begin(
        self,
        watch: Any,
        optimizer: Any,
        clips: list[ExpectedClip],
        step: int,
        plans: list[tuple[int, bool]],
        steps_left: int,
    ) -> None: ...
    def leave(self) -> tuple[Any, int, list[ExpectedClip], int, int] | None: ...
    def clip(
        self,
        function: Callable[..., Any],
        parameters: Any,
        max_norm: Any,
        norm_type: Any,
        rest: tuple[Any, ...],
        options: dict[str, Any],
    ) -> tuple[bool, Any]: ...
    def inside(self) -> bool: ...
    def before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool: ...
    def after_step(self) -> bool: ...
