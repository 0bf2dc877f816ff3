"""The norms of a group's weights and of what an optimizer step changes in them: ‖θ‖ and ‖θ' − θ‖ per tensor."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradscope._meter import KnownTensors
from gradscope.recording.meter import DTYPES, TENSOR_TYPES, UpdateMeter
from gradscope.recording.placement import local

# What the copy of a group's weights may take on a device at a time; of more, every call takes the next tensors in turn.
COPIED_BYTES = 256 << 20


class UpdateNorms:
    """Measures around the optimizer steps of one group; ``parameters`` are its tensors, weakly held."""

    def __init__(self, parameters: Sequence[weakref.ref[Tensor]]) -> None:
        self._parameters = tuple(parameters)
        self._meter: UpdateMeter | None = None
        self._known: KnownTensors | None = None
        self._lie: tuple[tuple[int, torch.dtype], ...] = ()
        self._copies: dict[int, Tensor] = {}
        self._turn = 0

    def before(self) -> Any:
        """‖θ‖ per tensor, float64 (a PendingNorms from a device); the weights are remembered."""
        pointers = self._pointers()
        if pointers is not None and self._meter is not None:
            return self._meter.before(pointers)
        return self._before_others()

    def _pointers(self) -> list[int] | None:
        """Where the weights lie, if they are plain tensors in memory as they were the last time."""
        return None if self._known is None else self._known.addresses([ref() for ref in self._parameters])

    @torch.no_grad()
    def _before_others(self) -> Any:
        held = self._held()
        if not _in_memory(held):
            self._meter = self._known = None
            self._copy(held)
            return PendingNorms(held)
        lie = _lie(held)
        if self._meter is None or lie != self._lie:
            self._lie = lie
            sizes, dtypes = [numel for numel, _ in lie], [DTYPES[dtype] for _, dtype in lie]
            self._meter = UpdateMeter(sizes, dtypes)
            self._known = KnownTensors(TENSOR_TYPES, sizes, dtypes)
        return self._meter.before([p.data_ptr() for p in held if p is not None])

    def after(self, updated: frozenset[int] | None = None) -> Any:
        """‖θ' − θ‖ per tensor, likewise; NaN for a tensor whose turn it was not, or that is not ``updated`` (ids)."""
        norms = self._after()
        if updated is None:
            return norms
        others = np.array([id(ref()) not in updated for ref in self._parameters])
        return norms.without(others) if isinstance(norms, PendingNorms) else np.where(others, np.nan, norms)

    def _after(self) -> Any:
        pointers = self._pointers()
        if pointers is not None and self._meter is not None:
            return self._meter.after(pointers)
        return self._after_others()

    @torch.no_grad()
    def _after_others(self) -> Any:
        held = self._held()
        if self._meter is not None:
            if not _in_memory(held) or _lie(held) != self._lie:
                # The step has exchanged them.
                return np.full(len(held), np.nan)
            return self._meter.after([p.data_ptr() for p in held if p is not None])
        changes = [
            p.to(_wide(p)) - self._copies[i] if p is not None and i in self._copies else None
            for i, p in enumerate(held)
        ]
        self._copies.clear()
        return PendingNorms(changes)

    def _held(self) -> list[Tensor | None]:
        parameters = (ref() for ref in self._parameters)
        return [None if parameter is None else local(parameter).detach() for parameter in parameters]

    def _copy(self, held: list[Tensor | None]) -> None:
        self._copies.clear()
        budget = COPIED_BYTES
        for offset in range(len(held)):
            i = (self._turn + offset) % len(held)
            parameter = held[i]
            size = 0 if parameter is None else parameter.numel() * parameter.element_size()
            if size > budget:
                if size <= COPIED_BYTES:
                    self._turn = i
                    return
                continue
            if parameter is not None:
                self._copies[i] = parameter.clone()
                budget -= size


class PendingNorms:
    """Norms on their way from a device."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        """Take the norms of ``tensors``, NaN for None, without waiting for them."""
        norms = [None if t is None else torch.linalg.vector_norm(t, dtype=_wide(t)) for t in tensors]
        self._at = [i for i, norm in enumerate(norms) if norm is not None]
        self._length = len(norms)
        self._others: NDArray[np.bool_] | None = None
        there = [norm for norm in norms if norm is not None]
        self._numbers = torch.stack(there).to("cpu", non_blocking=True) if there else torch.empty(0)
        self._event: Any = None
        if there and there[0].device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def without(self, others: NDArray[np.bool_]) -> PendingNorms:
        """These, NaN where ``others`` says so."""
        self._others = others
        return self

    def ready(self) -> bool:
        """Whether they have arrived."""
        return self._event is None or bool(self._event.query())

    def result(self) -> NDArray[np.float64]:
        """The norms, float64 [tensors]; waits for them."""
        if self._event is not None:
            self._event.synchronize()
        norms = np.full(self._length, np.nan)
        norms[self._at] = self._numbers.numpy()
        if self._others is not None:
            norms[self._others] = np.nan
        return norms


def _in_memory(held: Sequence[Tensor | None]) -> bool:
    return all(
        p is not None and p.is_cpu and p.layout is torch.strided and p.is_contiguous() and p.dtype in DTYPES
        for p in held
    )


def _lie(held: Sequence[Tensor | None]) -> tuple[tuple[int, torch.dtype], ...]:
    return tuple((p.numel(), p.dtype) for p in held if p is not None)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64
