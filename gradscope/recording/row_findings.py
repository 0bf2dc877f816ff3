"""What a row shows that the clip call alone did not: norms that are not finite, or were rounded over the threshold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradscope.recording.clip_calls import ClipCall
from gradscope.recording.lint import ClipLint
from gradscope.trace.measurement import Measurement, Row, unpacked
from gradscope.trace.schema import RecordedGroup


def look_at_norm(row: Row, call: ClipCall, group: RecordedGroup, lint: ClipLint) -> None:
    """Compare what the library returned with what was measured."""
    returned = row.returned_norm
    if returned is None or row.norm_type != 2.0:
        return
    function = call.function or "clipping"
    if not math.isfinite(returned):
        if nonfinite_tensors(row):
            lint.nonfinite(function, call.where, row.step, group.name)
        else:
            lint.overflow(function, call.where, _norm(unpacked(row.measurement)), row.step, group.name)
    elif _is_coarse(call.total_norm) and row.max_norm is not None and not group.returned_partial:
        exact = _norm(unpacked(row.measurement))
        if (returned > row.max_norm) != (exact > row.max_norm):
            dtype = str(call.total_norm.dtype).removeprefix("torch.")
            lint.rounded(dtype, returned, exact, row.max_norm, row.step, group.name)


def nonfinite_tensors(row: Row) -> list[int]:
    """The positions, in the group, of the tensors that hold NaN or Inf."""
    measured = unpacked(row.measurement)
    positions: list[int] = (measured.nan + measured.inf).nonzero()[0].tolist()
    return positions


def _is_coarse(total_norm: Any) -> bool:
    return isinstance(total_norm, Tensor) and total_norm.dtype in (torch.bfloat16, torch.float16)


def _norm(measured: Measurement) -> float:
    """The L2 norm of a group; tensors without a gradient count for nothing."""
    return math.sqrt(float(np.nansum(measured.sum_squares)))
