"""Looking at the variables of a running function without leaving a trace in it."""

from __future__ import annotations

import inspect
import sys
from types import FrameType
from typing import Any


def variables(frame: FrameType) -> dict[str, Any]:
    """The local variables of ``frame``, as a copy.

    Before Python 3.13 a function's frame keeps the snapshot that ``f_locals`` makes, and with it everything that the
    function let go of since: an old model would live on.  So the snapshot is emptied; a frame of a module, whose
    ``f_locals`` are its globals, has none.
    """
    held = frame.f_locals
    copy = dict(held)
    if sys.version_info < (3, 13) and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        held.clear()
    return copy
