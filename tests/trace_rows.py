"""Traces made without recording anything: rows with known gradients, and the bins of an array by numpy alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradscope.trace.measurement import Bins, Measurement, Row
from gradscope.trace.schema import RecordedGroup, RecordedTensor, TraceMetadata
from gradscope.trace.writer import TraceWriter

START = 1.7e9


def bins_of(gradient: NDArray[Any]) -> Bins:
    """The finest bins: 8 an octave."""
    g = np.abs(gradient.astype(np.float64).ravel())
    g = g[np.isfinite(g) & (g > 0)]
    codes, which = np.unique(g.view(np.uint64) >> np.uint64(49), return_inverse=True)
    lower = (codes << np.uint64(49)).view(np.float64)
    width = ((codes << np.uint64(49)) + np.uint64((1 << 49) - 1)).view(np.float64) - lower
    count = np.bincount(which, minlength=len(codes))
    mean = np.bincount(which, (g - lower[which]) / width[which], minlength=len(codes)) / np.maximum(count, 1)
    spread = np.bincount(
        which, ((g - lower[which]) / width[which] - mean[which]) ** 2, minlength=len(codes)
    ) / np.maximum(count, 1)
    return Bins(
        codes.astype(np.uint16),
        count.astype(np.uint32),
        np.clip(mean, 0, 1).astype(np.float32),
        np.clip(spread, 0, 1).astype(np.float32),
    )


def joined(parts: Sequence[Bins]) -> Bins:
    return Bins(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("code", "count", "mean", "spread")))


def measured(gradients: Sequence[NDArray[Any] | None], *, group: bool = True, tensors: bool = False) -> Measurement:
    """What a meter makes of the gradients of one clip group; None: no gradient."""
    arrays = [np.zeros(0) if g is None else g.astype(np.float64).ravel() for g in gradients]
    finite = [a[np.isfinite(a)] for a in arrays]
    each = [bins_of(a) for a in arrays]
    return Measurement(
        sum_squares=np.array(
            [np.nan if g is None else float((f * f).sum()) for g, f in zip(gradients, finite, strict=True)]
        ),
        max_abs=np.array([np.abs(f).max(initial=0.0) for f in finite]),
        zeros=np.array([(a == 0).sum() for a in arrays], dtype=np.int64),
        nan=np.array([np.isnan(a).sum() for a in arrays], dtype=np.int64),
        inf=np.array([np.isinf(a).sum() for a in arrays], dtype=np.int64),
        group_bins=bins_of(np.concatenate(arrays)) if group else None,
        tensor_bins=joined(each) if tensors else None,
        tensor_bin_counts=np.array([len(b.code) for b in each], dtype=np.int32) if tensors else None,
    )


def row(step: int, gradients: Sequence[NDArray[Any] | None], group: int = 0, **fields: Any) -> Row:
    """A row at ``step``; ``spectra`` is "none", "group" or "all"."""
    spectra = fields.pop("spectra", "group")
    measurement = measured(gradients, group=spectra != "none", tensors=spectra == "all")
    return Row(step, group, START + step, measurement, **fields)


def described(
    shapes: dict[str, tuple[int, ...]], groups: dict[str, list[str]] | None = None, **fields: Any
) -> TraceMetadata:
    """Metadata of a run that ended, with tensors of these shapes; one group ``"all"`` without ``groups``."""
    names = list(shapes)
    tensors = [RecordedTensor(name, shape, "float32", name.rpartition(".")[0], shape) for name, shape in shapes.items()]
    members = groups or {"all": names}
    recorded = [RecordedGroup(group, [names.index(name) for name in held]) for group, held in members.items()]
    return TraceMetadata(
        **{"run": "a run", "started": START, "ended": START + 1e6, "tensors": tensors, "groups": recorded, **fields}
    )


def write(directory: Path, metadata: TraceMetadata, rows: Iterable[Row], *, flush_every: int | None = None) -> Path:
    """A finished stream; one batch, or one for every ``flush_every`` rows.  Returns ``directory``."""
    writer = TraceWriter(directory, metadata, flush_seconds=1e6)
    for number, each in enumerate(rows, 1):
        writer.append(each)
        if flush_every is not None and number % flush_every == 0:
            writer.flush()
    writer.close()
    assert writer.error is None
    return directory
