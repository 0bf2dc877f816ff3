"""Zip directories read safely: where a member's bytes lie, and streams of those that are compressed."""

from __future__ import annotations

import io
import os
import shutil
import struct
import tempfile
import weakref
import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, cast

from gradscope.errors import GradscopeError
from gradscope.sources.formats.file_region import FileRegion
from gradscope.sources.formats.magic import ZIP_MAGIC

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# A directory of 32 MiB names several 100,000 members and takes some ten times its size in memory.
MAX_DIRECTORY_BYTES = 32 << 20
# Real gradients, even sparse ones, shrink less than 200-fold; deflate itself can reach 1032.
MAX_RATIO = 200
FREE_INFLATED_BYTES = 1 << 30

BAD_ZIP = (
    zipfile.BadZipFile,
    NotImplementedError,
    struct.error,
    zlib.error,
    EOFError,
    UnicodeError,
    ValueError,
    OSError,
)


class ZipMembers:
    """The members of a zip file, or of a zip stored inside another file.

    Raises:
        GradscopeError: the directory is damaged, too large or ambiguous, or its members expand like a zip bomb's.
    """

    def __init__(self, region: FileRegion, what: str) -> None:
        self.what = what
        self.region = region
        with region.open() as stream:
            _check_directory_size(stream, region.size, what)
            try:
                with zipfile.ZipFile(stream) as archive:
                    infos = [info for info in archive.infolist() if not info.filename.endswith("/")]
            except BAD_ZIP as error:
                raise GradscopeError(what, f"is a damaged zip file ({str(error)[:80]})") from None
        self._infos = {info.filename: info for info in infos}
        if len(self._infos) != len(infos):
            raise GradscopeError(what, "is a zip file with two members of one name")
        self._check_members()

    @property
    def names(self) -> list[str]:
        """In the order of the directory, folders left out."""
        return list(self._infos)

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def size(self, name: str) -> int:
        """The declared size of a member, inflated."""
        return self._info(name).file_size

    def is_stored(self, name: str) -> bool:
        """Whether the member lies in the file as it is, not compressed."""
        return self._info(name).compress_type == zipfile.ZIP_STORED

    def stored_region(self, name: str) -> FileRegion:
        """Where a stored member's bytes lie."""
        return self._place(name)

    def _place(self, name: str) -> FileRegion:
        """Where a member's bytes lie, compressed or not.  The local header tells: torch pads it for alignment."""
        info = self._info(name)
        with self.region.open() as stream:
            stream.seek(info.header_offset)
            header = stream.read(30)
        if len(header) < 30 or header[:4] != ZIP_MAGIC:
            raise GradscopeError(self.what, f"is a damaged zip file (no member at the place of {name!r})")
        name_size, extra_size = struct.unpack_from("<HH", header, 26)
        offset = info.header_offset + 30 + name_size + extra_size
        if offset + info.compress_size > self.region.size:
            raise GradscopeError(self.what, f"is truncated: {name!r} reaches beyond its end")
        return FileRegion(self.region.path, self.region.offset + offset, info.compress_size)

    def inflated_region(self, name: str) -> FileRegion:
        """A stored member in place; a compressed one as a temporary file that lives as long as its path object."""
        if self.is_stored(name):
            return self.stored_region(name)
        path = _TemporaryPath.create()
        with self.open(name) as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        size = os.path.getsize(path)
        if size != self.size(name):
            raise GradscopeError(self.what, f"{name!r} holds {size} bytes, not {self.size(name)} as declared")
        return FileRegion(path, 0, size)

    def read(self, name: str, limit: int) -> bytes:
        """A small member whole.

        Raises:
            GradscopeError: it is larger than ``limit`` bytes, or damaged.
        """
        if self.size(name) > limit:
            raise GradscopeError(self.what, f"{name!r} is too large ({self.size(name):,} bytes)")
        if self.is_stored(name):
            return self.stored_region(name).read()
        with self.open(name) as stream:
            content = stream.read(limit + 1)
        if len(content) != self.size(name):
            raise GradscopeError(self.what, f"{name!r} does not have its declared size")
        return content

    def open(self, name: str) -> BinaryIO:
        """A member's bytes as a sequential stream, inflated as they are read."""
        return self.stored_region(name).open() if self.is_stored(name) else self.inflating(name)()

    def inflating(self, name: str, skip: int = 0) -> MemberStream:
        """What opens a compressed member as a stream, ``skip`` bytes from its start."""
        info = self._info(name)
        return MemberStream(self._place(name), info.file_size, info.CRC, f"{self.what}: {name}", skip)

    def _info(self, name: str) -> zipfile.ZipInfo:
        if name not in self._infos:
            raise GradscopeError(self.what, f"lacks its member {name!r}")
        return self._infos[name]

    def _check_members(self) -> None:
        # In a zip file that lost its end, zipfile finds the directory of a zip file within, and takes it for the whole.
        if self._infos and min(info.header_offset for info in self._infos.values()) != 0:
            raise GradscopeError(self.what, "is a truncated zip file")
        inflated = 0
        for info in self._infos.values():
            if info.flag_bits & 1:
                raise GradscopeError(self.what, f"its member {info.filename!r} is encrypted")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise GradscopeError(self.what, f"its member {info.filename!r} is compressed in an unusual way")
            if info.compress_type == zipfile.ZIP_STORED:
                if info.file_size != info.compress_size or info.file_size > self.region.size:
                    raise GradscopeError(self.what, f"is a damaged zip file (the size of {info.filename!r} is wrong)")
            else:
                inflated += info.file_size
        if inflated > FREE_INFLATED_BYTES and inflated > MAX_RATIO * self.region.size:
            raise GradscopeError(
                self.what, f"would expand from {self.region.size:,} to {inflated:,} bytes: refused as a zip bomb"
            )


@dataclass(frozen=True, slots=True)
class MemberStream:
    """Opens a compressed member as a sequential stream, ``skip`` bytes from its start.

    ``region`` holds the deflated bytes; ``size`` and ``checksum`` (CRC-32) are those declared for the inflated ones.
    """

    region: FileRegion
    size: int
    checksum: int
    what: str
    skip: int = 0

    def __call__(self) -> BinaryIO:
        """A stream at the member's byte ``skip``.

        Raises:
            GradscopeError: the member is damaged before that.
        """
        stream = _InflatedStream(self)
        left = self.skip
        while left > 0:
            piece = stream.read(min(left, 1 << 20))
            if not piece:
                raise GradscopeError(self.what, "ends early")
            left -= len(piece)
        return cast(BinaryIO, stream)


class _InflatedStream(io.RawIOBase):
    """A member while it is inflated, never more of it than is asked for; damage comes out as GradscopeError."""

    def __init__(self, source: MemberStream) -> None:
        self._source = source
        self._file = source.region.open()
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        self._left = source.size
        self._checksum = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        piece = self._inflate(min(len(view), self._left))
        view[: len(piece)] = piece
        self._left -= len(piece)
        self._checksum = zlib.crc32(piece, self._checksum)
        if self._left == 0 and self._checksum != self._source.checksum:
            raise GradscopeError(self._source.what, "is damaged (its checksum is wrong)")
        return len(piece)

    def _inflate(self, count: int) -> bytes:
        piece = b""
        while count and not piece:
            compressed = self._inflater.unconsumed_tail or self._file.read(1 << 16)
            if self._inflater.eof or not compressed:
                raise GradscopeError(self._source.what, "is damaged (it ends early)")
            try:
                piece = self._inflater.decompress(compressed, count)
            except zlib.error:
                raise GradscopeError(self._source.what, "is damaged (it cannot be inflated)") from None
        return piece

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _TemporaryPath(str):
    """A path whose file is removed once nothing refers to the path any more."""

    @classmethod
    def create(cls) -> _TemporaryPath:
        descriptor, name = tempfile.mkstemp(prefix="gradscope-")
        os.close(descriptor)
        path = cls(name)
        weakref.finalize(path, _remove, name)
        return path


def _remove(name: str) -> None:
    if os.path.exists(name):
        os.unlink(name)


def _check_directory_size(stream: BinaryIO, size: int, what: str) -> None:
    """Refuse a directory that would fill the memory, before zipfile reads it."""
    stream.seek(max(0, size - (1 << 16) - 22 - 76))
    tail = stream.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or end + 22 > len(tail):
        raise GradscopeError(what, "is a truncated zip file (its directory is missing)")
    (directory,) = struct.unpack_from("<I", tail, end + 12)
    zip64 = end - 20 - 56
    if zip64 >= 0 and tail[zip64 : zip64 + 4] == b"PK\x06\x06":
        (directory,) = struct.unpack_from("<Q", tail, zip64 + 40)
    if directory > MAX_DIRECTORY_BYTES:
        raise GradscopeError(what, f"is a zip file with a directory of {directory:,} bytes")
