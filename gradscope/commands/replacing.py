"""Writing a file of bytes in one piece: a table that is streamed to it is there whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from gradscope.errors import GradscopeError


@contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A stream into a file beside ``path``, which takes its place when all is written.

    Raises GradscopeError where ``path`` is something else than a file, or the file cannot be written.
    """
    target = os.path.realpath(path)
    temporary = f"{target}.{os.getpid()}.tmp"
    try:
        if os.path.exists(target) and not stat.S_ISREG(os.stat(target).st_mode):
            raise GradscopeError(f"-o {path}", "is not a regular file")
        with open(temporary, "xb") as out:
            yield out
        os.replace(temporary, target)
    except OSError as error:
        raise GradscopeError(f"-o {path}", error.strerror or str(error)) from None
    finally:
        if os.path.lexists(temporary):
            os.unlink(temporary)
