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
# Of a process's flags in Linux: made by fork, and no program was started in it since.
_FORKED = 0x40


@functools.cache
def join_torch_threads() -> None:
    """Have ``_meter`` work in torch's threads from here on, where their library can be found."""
    library = None if _forked() else _loaded_openmp()
    if library is None:
        return
    try:
        calls = ctypes.CDLL(library)
    except OSError:
        # Replaced on the disk since it was loaded.
        return
    # Not such a library after all, where it is missing: threads of our own do it.
    parallel = getattr(calls, "GOMP_parallel", None)
    if parallel is not None:
        use_openmp(ctypes.cast(parallel, ctypes.c_void_p).value or 0)


def _leave_torch_threads() -> None:
    """In a forked child GNU's library waits for ever for threads that only the parent has."""
    use_openmp(0)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_torch_threads)


def _forked() -> bool:
    """Whether this process may know of OpenMP threads that only its parent has."""
    try:
        # Behind the name, which may hold anything: the state is the first field, the flags are the seventh.
        fields = Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()
        return bool(int(fields[6]) & _FORKED)
    except (OSError, ValueError, IndexError):
        return True


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
