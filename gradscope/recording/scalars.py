"""Single numbers that a training loop computes, taken down without waiting for the device they lie on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PendingScalar:
    """A number on its way from a device: ``result()`` once ``ready()``."""

    def __init__(self, number: Tensor) -> None:
        self.dtype = number.dtype
        self._copy = number.detach().to("cpu", torch.float64, non_blocking=True)
        self._event: Any = None
        if number.device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def ready(self) -> bool:
        """Whether the copy has arrived."""
        return self._event is None or bool(self._event.query())

    def result(self) -> float:
        """The number; waits for it."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._copy)


def take_down(number: Any) -> Any:
    """``number`` (a float, or a 0-dim tensor) as a float, or as a PendingScalar where it lies on another device.

    Of a DTensor it is this rank's part: the whole one would take a collective.
    """
    if type(number) is Tensor and number.is_cpu:
        return number.item()
    if not isinstance(number, Tensor):
        return number if number is None else float(number)
    local = getattr(number, "_local_tensor", number)
    if local.device.type == "cpu":
        return local.item()
    return PendingScalar(local)
