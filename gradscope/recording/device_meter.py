"""Gradients on an accelerator -> totals and bins reduced there, and copied without waiting for them.

Nothing here asks the device for a number: small tensors are reduced together, large ones in chunks, and all that is
known of a step is one vector, copied to pinned memory behind an event.  The same operations run on a CPU.

A tensor's table has a slot for each fine bin (``trace.bins``) of the 64 octaves below its largest magnitude, and one
for what lies below those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy import frombuffer
from numpy.typing import NDArray
from torch import Tensor

from gradscope._meter import FineMoments
from gradscope.trace.bins import BELOW
from gradscope.trace.measurement import Bins, Measurement

# About ten temporaries of 8 bytes an element exist at a time.
CHUNK = 1 << 19
SMALL = 1 << 15
MOST_TOGETHER = 256
# Remembered at a time: one for each device, and for each set of tensors that has a gradient.
LAYOUTS = 32
OCTAVES = 64
# The one below, the fine bins, and one for zeros and what is not finite.
SLOTS = 8 * OCTAVES + 2
_ABS = 0x7FFFFFFFFFFFFFFF
_INF = 0x7FF0000000000000
_LOW = (1 << 49) - 1
# Copies of a table or sum, so that neighbours do not wait for each other.
LANES = 64
_TOTALS = 4


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements that are reduced together: tensors ``first`` to ``stop``, or a range of one of them.

    ``lengths`` (int64, on the device) says how many of each; None: all belong to one tensor.
    """

    first: int
    stop: int
    start: int
    size: int
    lengths: Tensor | None


class Layout:
    """In which chunks tensors of these sizes are reduced; small ones come first."""

    def __init__(self, numels: Sequence[int], device: torch.device) -> None:
        self.order = sorted(range(len(numels)), key=lambda i: (numels[i] > SMALL, i))
        self.chunks: list[Chunk] = []
        sizes = [numels[i] for i in self.order]
        at = 0
        while at < len(sizes):
            stop, total = at, 0
            fits = min(len(sizes), at + MOST_TOGETHER)
            while stop < fits and sizes[stop] <= SMALL and total + sizes[stop] <= CHUNK:
                total += sizes[stop]
                stop += 1
            if stop > at:
                lengths = torch.tensor(sizes[at:stop], dtype=torch.int64).to(device)
                self.chunks.append(Chunk(at, stop, 0, total, lengths))
                at = stop
            else:
                starts = range(0, sizes[at], CHUNK)
                self.chunks += [Chunk(at, at + 1, start, min(CHUNK, sizes[at] - start), None) for start in starts]
                at += 1


class DeviceMeter:
    """Measures gradients wherever they lie; see ``meter.Meter``."""

    def __init__(self) -> None:
        self._layouts: dict[tuple[torch.device, tuple[int, ...]], Layout] = {}
        self._moments = FineMoments()

    @torch.no_grad()
    def measure(self, elements: Sequence[Tensor | None], spectra: int, zeros: NDArray[np.int64]) -> Pending:
        """Gap-free elements of every tensor, None where there is no gradient; ``zeros`` [tensors] are not among them.

        ``spectra`` is 0 for none, 1 for the group's and 2 for the group's and the tensors'.
        """
        by_device: dict[torch.device, list[int]] = {}
        for i, tensor in enumerate(elements):
            if tensor is not None:
                by_device.setdefault(tensor.device, []).append(i)
        arriving = [
            self._reduced(device, at, [_flat(elements[i]) for i in at], spectra) for device, at in by_device.items()
        ]
        return Pending(arriving, spectra, zeros, self._moments)

    def _reduced(self, device: torch.device, at: list[int], tensors: list[Tensor], spectra: int) -> Arriving:
        if device.type not in ("cuda", "cpu"):
            # No float64 there, or none that can be relied on.
            device, tensors = torch.device("cpu"), [tensor.cpu() for tensor in tensors]
        key = device, tuple(tensor.numel() for tensor in tensors)
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) >= LAYOUTS:
                self._layouts.clear()
            layout = self._layouts[key] = Layout(key[1], device)
        ordered = [tensors[i] for i in layout.order]
        totals = torch.zeros(len(ordered), _TOTALS, dtype=torch.float64, device=device)
        largest = torch.zeros(len(ordered), dtype=torch.int64, device=device)
        for chunk in layout.chunks:
            _add_totals(chunk, _magnitudes(ordered, chunk), totals, largest)
        parts = [totals.flatten(), largest.view(torch.float64)]
        if spectra == 2:
            tables = torch.zeros(len(ordered), 3 * SLOTS, dtype=torch.float64, device=device)
            for chunk in layout.chunks:
                _add_to_tables(chunk, _magnitudes(ordered, chunk), largest, tables)
            parts.append(tables.flatten())
        elif spectra == 1:
            table = torch.zeros(1, 3 * SLOTS, dtype=torch.float64, device=device)
            all_of_it = largest.amax().expand(1) if len(ordered) else largest
            for chunk in layout.chunks:
                as_one = Chunk(0, 1, 0, chunk.size, None)
                _add_to_tables(as_one, _magnitudes(ordered, chunk), all_of_it, table)
            parts.append(table.flatten())
        return Arriving([at[i] for i in layout.order], torch.cat(parts))


class Arriving:
    """What is on its way from one device: of the tensors at ``at``, in this order."""

    def __init__(self, at: list[int], numbers: Tensor) -> None:
        self.at = at
        self._event: Any = None
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(numbers.device))
        else:
            self._numbers = numbers

    def ready(self) -> bool:
        """Whether it has arrived."""
        return self._event is None or bool(self._event.query())

    def numbers(self) -> NDArray[np.float64]:
        """Totals [tensors, 4], largest magnitudes [tensors] and tables, flat; waits for them."""
        if self._event is not None:
            self._event.synchronize()
        return np.asarray(self._numbers.numpy())


class Pending:
    """A Measurement that a device still works on."""

    def __init__(self, arriving: list[Arriving], spectra: int, zeros: NDArray[np.int64], moments: FineMoments) -> None:
        self._arriving = arriving
        self._spectra = spectra
        self._zeros = zeros
        self._moments = moments
        self._result: Measurement | None = None

    def ready(self) -> bool:
        """Whether ``result()`` need not wait."""
        return all(part.ready() for part in self._arriving)

    def result(self) -> Measurement:
        """The measurement; waits for the device where it must."""
        if self._result is None:
            self._result = self._assembled()
            self._arriving = []
        return self._result

    def _assembled(self) -> Measurement:
        n = len(self._zeros)
        row = Measurement(
            np.full(n, np.nan),
            np.zeros(n),
            np.array(self._zeros, np.int64),
            np.zeros(n, np.int64),
            np.zeros(n, np.int64),
        )
        tables: list[tuple[int, int, NDArray[np.float64]]] = []
        for part in self._arriving:
            at, numbers, k = part.at, part.numbers(), len(part.at)
            totals = numbers[: _TOTALS * k].reshape(k, _TOTALS)
            largest = numbers[_TOTALS * k : (_TOTALS + 1) * k]
            row.sum_squares[at], row.max_abs[at] = totals[:, 0], largest
            row.zeros[at] += totals[:, 1].astype(np.int64)
            row.nan[at], row.inf[at] = totals[:, 2].astype(np.int64), totals[:, 3].astype(np.int64)
            rows = numbers[(_TOTALS + 1) * k :].reshape(-1, 3, SLOTS)
            of_row = largest if self._spectra == 2 else np.array([largest.max(initial=0.0)])
            tables += [(at[i] if k else 0, _first_octave(float(of_row[i])), table) for i, table in enumerate(rows)]
        if self._spectra:
            row.group_bins = self._bins([(first, table) for _, first, table in tables])
        if self._spectra == 2:
            found = {i: self._bins([(first, table)]) for i, first, table in tables}
            each = [found.get(i) or _no_bins() for i in range(n)]
            row.tensor_bin_counts = np.array([bins.code.size for bins in each], np.int32)
            row.tensor_bins = _joined(each)
        return row

    def _bins(self, tables: list[tuple[int, NDArray[np.float64]]]) -> Bins:
        """What is stored of tables that add up, each with the first octave of its slots."""
        fine = np.zeros((3, 1 << 14))
        below: list[Bins] = []
        for first, table in tables:
            stop = min(8 * (first + OCTAVES), 1 << 14)
            fine[:, 8 * first : stop] += table[:, 1 : 1 + stop - 8 * first]
            if table[0, 0]:
                below.append(_below(first, *table[:, 0].tolist()))
        codes = np.flatnonzero(fine[0])
        data, n = self._moments.store(codes, *(np.ascontiguousarray(column[codes]) for column in fine))
        stored = Bins(
            frombuffer(data, np.uint16, n, 12 * n),
            frombuffer(data, np.uint32, n, 0),
            frombuffer(data, np.float32, n, 4 * n),
            frombuffer(data, np.float32, n, 8 * n),
        )
        return _joined([stored, *below])


def _first_octave(largest: float) -> int:
    return max((int(np.float64(largest).view(np.int64)) >> 52) - (OCTAVES - 1), 0)


def _below(first: int, count: float, total: float, squares: float) -> Bins:
    mean = total / count
    # A count has 32 bits.
    parts = [count] if count < 2**32 else [2.0**32 - 1] * int(count // (2**32 - 1)) + [count % (2**32 - 1)]
    return Bins(
        np.full(len(parts), BELOW + first, np.uint16),
        np.array(parts).astype(np.uint32),
        np.full(len(parts), mean, np.float32),
        np.full(len(parts), max(squares / count - mean * mean, 0.0), np.float32),
    )


def _no_bins() -> Bins:
    return Bins(np.empty(0, np.uint16), np.empty(0, np.uint32), np.empty(0, np.float32), np.empty(0, np.float32))


def _joined(parts: list[Bins]) -> Bins:
    if not parts:
        return _no_bins()
    return Bins(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("code", "count", "mean", "spread"))
    )


def _flat(tensor: Tensor | None) -> Tensor:
    """The elements in the order of memory, as a vector."""
    assert tensor is not None
    return tensor.as_strided((tensor.numel(),), (1,))


def _magnitudes(tensors: Sequence[Tensor], chunk: Chunk) -> Tensor:
    """The bits of |g| as float64 (int64 [size])."""
    if chunk.lengths is None:
        part = tensors[chunk.first][chunk.start : chunk.start + chunk.size].to(torch.float64)
    else:
        part = torch.cat([tensor.to(torch.float64) for tensor in tensors[chunk.first : chunk.stop]])
    return part.view(torch.int64) & _ABS


def _owner(chunk: Chunk, size: int, device: torch.device) -> Tensor | None:
    """Which tensor of the chunk each element is of."""
    if chunk.lengths is None:
        return None
    numbers = torch.arange(chunk.stop - chunk.first, device=device)
    return torch.repeat_interleave(numbers, chunk.lengths, output_size=size)


def _add_totals(chunk: Chunk, bits: Tensor, totals: Tensor, largest: Tensor) -> None:
    """Adds Σg² and the numbers of zeros, NaN and Inf; raises the largest."""
    finite = torch.where(bits < _INF, bits, 0)
    value = finite.view(torch.float64)
    columns = (value * value, bits == 0, bits > _INF, bits == _INF)
    owner = _owner(chunk, bits.numel(), bits.device)
    n = chunk.stop - chunk.first
    if owner is None:
        sums = torch.stack([column.sum(dtype=torch.float64) for column in columns]).view(1, -1)
        most = finite.amax().view(1)
    else:
        lane = owner * LANES + torch.arange(bits.numel(), device=bits.device) % LANES
        table = torch.zeros(4, n * LANES, dtype=torch.float64, device=bits.device)
        for row, column in zip(table, columns, strict=True):
            row.scatter_add_(0, lane, column.to(torch.float64))
        sums = table.view(4, n, LANES).sum(2).t()
        most = torch.zeros(n * LANES, dtype=torch.int64, device=bits.device)
        most = most.scatter_reduce_(0, lane, finite, "amax").view(n, LANES).amax(1)
    totals[chunk.first : chunk.stop] += sums
    part = largest[chunk.first : chunk.stop]
    torch.maximum(part, most, out=part)


def _add_to_tables(chunk: Chunk, bits: Tensor, largest: Tensor, tables: Tensor) -> None:
    """Adds counts, and the sums of the positions within the bins and of their squares."""
    first = ((largest[chunk.first : chunk.stop] >> 52) - (OCTAVES - 1)).clamp(min=0)
    n = chunk.stop - chunk.first
    owner = _owner(chunk, bits.numel(), bits.device)
    of_each = first if owner is None else first[owner]
    slot = (bits >> 49) - 8 * of_each + 1
    inside = (bits & _LOW).to(torch.float64) * 2.0**-49
    edge = (of_each << 52).view(torch.float64)
    position = torch.where(slot >= 1, inside, bits.view(torch.float64) / edge)
    counts = (bits > 0) & (bits < _INF)
    slot = torch.where(counts, slot.clamp(min=0), SLOTS - 1)
    position = torch.where(counts, position, 0.0)
    lanes = LANES if owner is None else 4
    if owner is not None:
        slot = slot + owner * SLOTS
    slot = slot * lanes + torch.arange(bits.numel(), device=bits.device) % lanes
    for i, column in enumerate((counts.to(torch.float64), position, position * position)):
        sums = torch.zeros(n * SLOTS * lanes, dtype=torch.float64, device=bits.device)
        sums.scatter_add_(0, slot, column)
        part = tables[chunk.first : chunk.stop, i * SLOTS : (i + 1) * SLOTS]
        part += sums.view(n, SLOTS, lanes).sum(2)
