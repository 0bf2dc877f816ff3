"""Writing a file of bytes in one piece: a table that is streamed to it is there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from gradscope.errors import GradscopeError
from gradscope.whole_file import whole_file


@contextmanager
def replacing(path: str) -> Iterator[BinaryIO]:
    """A stream into a file beside ``path``, which takes its place when all is written.

    Raises GradscopeError where ``path`` is something else than a file, or the file cannot be written.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise GradscopeError(f"-o {path}", "is not a regular file")
        with whole_file(path) as out:
            yield out
    except OSError as error:
        raise GradscopeError(f"-o {path}", error.strerror or str(error)) from None
