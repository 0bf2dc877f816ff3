"""Writing a file in one piece: what reads it finds all of it, or what was there before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A stream into a file beside ``path``, or what that links to, which takes its place when all is written.

    Raises OSError where that is not possible; nothing is left then of what was written.
    """
    target = os.path.realpath(path)
    temporary = f"{target}.{os.getpid()}.tmp"
    with open(temporary, "xb") as out:
        try:
            yield out
            out.close()
            os.replace(temporary, target)
        finally:
            if os.path.lexists(temporary):
                os.unlink(temporary)
