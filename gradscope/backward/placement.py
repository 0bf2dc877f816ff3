"""``--device`` and ``--dtype``, by torch's names."""

from __future__ import annotations

import torch

from gradscope.backward.options import BatchOptions
from gradscope.errors import GradscopeError

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def device_of(options: BatchOptions) -> torch.device:
    """Where model and batch are put.

    Raises:
        GradscopeError: torch knows no such device, or this machine has none.
    """
    what = f"--device {options.device}"
    try:
        device = torch.device(options.device)
    except RuntimeError:
        raise GradscopeError(what, "is no device that torch knows", "cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise GradscopeError(what, "torch finds no CUDA device here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise GradscopeError(what, f"torch finds only {torch.cuda.device_count()} CUDA devices here")
    if device.type == "meta":
        raise GradscopeError(what, "computes nothing")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise GradscopeError(what, f"torch finds no such device here ({device.type})") from None
    return device


def dtype_of(options: BatchOptions) -> torch.dtype | None:
    """What the model's and the batch's floating-point tensors become; None: they stay what they are.

    Raises:
        GradscopeError: it is none of ``DTYPES``.
    """
    if options.dtype is None:
        return None
    if options.dtype not in DTYPES:
        raise GradscopeError(f"--dtype {options.dtype}", f"must be one of {', '.join(DTYPES)}")
    return DTYPES[options.dtype]
