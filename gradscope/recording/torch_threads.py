"""The threads that torch computes with, for measuring large groups.

Between two operations torch's OpenMP threads wait in a busy loop for the next.  A thread of our own would share their
cores with them, and take twice as long; theirs start at once.  torch has no call to run something of ours in them, but
its OpenMP library has.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from pathlib import Path

import torch

from gradscope._meter import use_openmp

# GNU's, Intel's and LLVM's; all have the calls of the first.
_OPENMP = re.compile(r"/lib(gomp|iomp5|omp)[^/]*\.so")


@functools.cache
def join_torch_threads() -> None:
    """Have ``_meter`` work in torch's threads from here on, where their library can be found."""
    library = _loaded_openmp()
    if library is None:
        return
    calls = ctypes.CDLL(library)
    # Not such a library after all, where it is missing: threads of our own do it.
    parallel = getattr(calls, "GOMP_parallel", None)
    if parallel is not None:
        use_openmp(ctypes.cast(parallel, ctypes.c_void_p).value or 0)


def _loaded_openmp() -> str | None:
    """The OpenMP library that torch has loaded; None where that cannot be told."""
    try:
        maps = Path("/proc/self/maps").read_text(errors="replace")
    except OSError:
        return None
    found = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if _OPENMP.search(line)}
    home = os.path.dirname(os.path.abspath(torch.__file__))
    of_torch = {path for path in found if path.startswith((f"{home}{os.sep}", f"{home}.libs{os.sep}"))}
    found = of_torch or found
    return found.pop() if len(found) == 1 else None
