"""A stretch of a regular file, readable as a stream of its own."""

from __future__ import annotations

import errno
import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from gradscope.errors import GradscopeError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


@dataclass(frozen=True, slots=True)
class FileRegion:
    """``size`` bytes from ``offset`` on, in the file at ``path``."""

    path: str
    offset: int
    size: int

    @classmethod
    def whole(cls, path: Path | str) -> FileRegion:
        """All of the file at ``path``.

        Raises:
            GradscopeError: it is missing, unreadable, or no regular file (a pipe or device would block).
        """
        descriptor = open_regular_file(path)
        try:
            return cls(str(path), 0, os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)

    def open(self) -> BinaryIO:
        """A buffered, seekable stream of exactly this stretch."""
        return cast(BinaryIO, io.BufferedReader(_RegionStream(self), 1 << 16))

    def read(self) -> bytes:
        """All of it; for small regions."""
        with self.open() as stream:
            return stream.read()


def open_regular_file(path: Path | str) -> int:
    """A file descriptor for reading the regular file at ``path``; never blocks.

    Raises:
        GradscopeError: there is no such file, it may not be read, or it is a pipe, device or directory.
    """
    # A FIFO without a writer blocks in open() unless it is opened without blocking.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise GradscopeError(str(path), "is not a regular file")
    return descriptor


def unreadable(path: Path | str, error: OSError | ValueError) -> GradscopeError:
    """What to tell when the operating system refuses ``path``."""
    reasons = {
        errno.ENOENT: "no such file or directory",
        errno.EACCES: "permission denied",
        errno.EPERM: "permission denied",
        errno.ENOTDIR: "no such file or directory",
        errno.ELOOP: "too many levels of symbolic links",
        errno.ENAMETOOLONG: "the name is too long",
    }
    code = error.errno if isinstance(error, OSError) else None
    return GradscopeError(str(path).replace("\0", "\\0"), reasons.get(code or 0, str(error)))


class _RegionStream(io.RawIOBase):
    def __init__(self, region: FileRegion) -> None:
        self._region = region
        self._position = 0
        self._file = os.fdopen(open_regular_file(region.path), "rb", buffering=0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._region.size}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, "seek before the start")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._region.size - self._position)]
        self._file.seek(self._region.offset + self._position)
        count = self._file.readinto(view) if len(view) else 0
        self._position += count
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
