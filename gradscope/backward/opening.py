"""From a checkpoint and a captured batch to a source of gradients.  torch is imported here, and not before."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from gradscope.backward.options import BatchOptions
from gradscope.errors import GradscopeError
from gradscope.sources import open_source

if TYPE_CHECKING:
    from gradscope.gradients import GradientSource


def open_with_batch(
    source: Any, options: BatchOptions, *, as_: str | None = None, weights: Any = None, tag: str | None = None
) -> GradientSource:
    """The gradients of a captured batch, by the model in ``source``: whatever ``open_source`` takes for a checkpoint.

    Raises:
        GradscopeError: ``source`` is no checkpoint, torch is missing, or the batch does not serve.
    """
    checkpoint = _checkpoint(source, as_, weights, tag)
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise GradscopeError("--batch", "needs PyTorch", "pip install 'gradscope[torch]'") from None
    from gradscope.backward.batch_gradients import open_batch

    return open_batch(checkpoint, options)


def _checkpoint(source: Any, as_: str | None, weights: Any, tag: str | None) -> GradientSource:
    """``source`` opened; a bare mapping of tensors is a model's weights here."""
    if not isinstance(source, str | os.PathLike | list | tuple):
        # A module has buffers beside its parameters.
        state = source.state_dict() if callable(getattr(source, "state_dict", None)) else source
        return open_source(state, as_=as_ or "weights", weights=weights, tag=tag)
    opened = open_source(source, as_=as_, weights=weights, tag=tag)
    if as_ is None and opened.info.kind == "gradients" and opened.info.steps == 1:
        return open_source(source, as_="weights")
    return opened
