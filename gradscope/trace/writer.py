"""Writing one rank's rows while training goes on."""

from __future__ import annotations

import atexit
import errno
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gradscope.trace.columns import arrow_schema
from gradscope.trace.measurement import Row
from gradscope.trace.metadata_json import metadata_to_json
from gradscope.trace.pending_rows import PackedRows, PendingRows
from gradscope.trace.schema import TraceMetadata, metadata_name, stream_name

if TYPE_CHECKING:
    import pyarrow as pa

# What may wait for a disk that has stopped taking anything.
MOST_PENDING_BYTES = 256 << 20
# How an Arrow stream ends: the continuation mark and a message of no length.
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_EXCLUSIVELY = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | getattr(os, "O_BINARY", 0)


class TraceWriter:
    """Appends one rank's rows to its stream from any thread; a thread of its own does the writing.

    Whatever is appended is with the operating system ``flush_seconds`` later, plus what a write takes.  Nothing raises
    once it is made: after a failed write ``error`` says what happened, no more is written, and what lies on the disk
    stays readable.
    """

    def __init__(self, directory: Path, metadata: TraceMetadata, *, flush_seconds: float = 0.25) -> None:
        """Create the files of ``metadata.rank`` in ``directory``, which is made where its parent exists.

        ``metadata`` stays the caller's: it is written now, at every ``metadata_changed()`` and at ``close()``.

        Raises FileExistsError where this rank has a stream already, and OSError where the files cannot be made.
        """
        self.error: str | None = None
        # Called by the writing thread: to do something else for so many seconds (False: nothing to do), and before it
        # writes, for rows that are made only then.
        self.meanwhile: Callable[[float], bool] | None = None
        self.before_flush: Callable[[], None] | None = None
        self.path = directory / stream_name(metadata.rank)
        self._metadata = metadata
        self._metadata_path = directory / metadata_name(metadata.rank)
        self._schema = arrow_schema()
        self._pending = PendingRows()
        self._changed: bytes | None = None
        self._written = 0
        self._renew_locks()
        directory.mkdir(exist_ok=True)
        stream = os.open(self.path, _EXCLUSIVELY, 0o666)
        self._stream: int | None = stream
        self._file = _file_of(stream)
        try:
            self._replace_metadata(metadata_to_json(metadata))
            self._write(stream, self._schema.serialize())
        except OSError:
            os.close(stream)
            self.path.unlink(missing_ok=True)
            raise
        _writers.add(self)
        threading.Thread(target=self._flush_every, args=(flush_seconds,), name="gradscope", daemon=True).start()

    def _renew_locks(self) -> None:
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._ended = threading.Event()

    def append(self, row: Row) -> None:
        """Take in a copy of ``row``; nothing after ``close()`` or a failed write."""
        with self._lock:
            if self._stream is None or self.error is not None:
                return
            self._pending.append(row)
            self._look_at_pending()

    def extend(self, rows: PackedRows) -> None:
        """The same, of many rows at once."""
        with self._lock:
            if self._stream is None or self.error is not None:
                return
            self._pending.extend(rows)
            self._look_at_pending()

    def _look_at_pending(self) -> None:
        # Only a disk that is slower than training can let so much wait.
        if self._flushing.locked() and self._pending.nbytes > MOST_PENDING_BYTES:
            self.error = f"the disk is too slow: {MOST_PENDING_BYTES >> 20} MiB wait to be written"
            self._pending = PendingRows()

    def metadata_changed(self) -> None:
        """Write the metadata as it is now, before any row that is appended from here on."""
        text = metadata_to_json(self._metadata)
        with self._lock:
            self._changed = text

    def flush(self) -> None:
        """Hand everything appended so far to the operating system."""
        with self._flushing:
            self._flush()

    def close(self) -> None:
        """Write what is pending, the metadata and the end of the stream; more than once does no harm."""
        self._ended.set()
        self.metadata_changed()
        with self._flushing:
            self._flush()
            if self._stream is None:
                return
            if self.error is None:
                self._try(partial(self._write, self._stream, END_OF_STREAM))
            self._close_stream()
        _writers.discard(self)

    def abandon(self) -> None:
        """Forget everything without writing: what a forked child does, whose parent owns the stream."""
        # A thread of the parent may have held them; it does not exist here.
        self._renew_locks()
        self._ended.set()
        self._pending = PendingRows()
        self._close_stream()

    def _close_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None and _file_of(stream) == self._file:
            try:
                os.close(stream)
            except OSError as error:
                self.error = self.error or error.strerror

    def _flush_every(self, seconds: float) -> None:
        while not self._ended.is_set():
            if self.meanwhile is None or not self.meanwhile(seconds):
                self._ended.wait(seconds)
            if self.before_flush is not None:
                self.before_flush()
            self.flush()

    def _flush(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, PendingRows()
            metadata, self._changed = self._changed, None
        if self._stream is None:
            return
        if metadata is not None:
            self._try(partial(self._replace_metadata, metadata))
        if len(pending) and self.error is None:
            self._try(partial(self._write_rows, self._stream, pending))

    def _try(self, write: Callable[[], None]) -> None:
        """Write unless the stream was deleted: somebody may record anew under its name.

        Nor where the program has closed its descriptor, as daemons close all: the number may be another file's by now.
        """
        assert self._stream is not None
        if _file_of(self._stream) != self._file:
            with self._lock:
                self.error = self.error or "the program has closed its file descriptor"
                self._pending = PendingRows()
            return
        try:
            if os.fstat(self._stream).st_nlink == 0:
                raise FileNotFoundError(errno.ENOENT, "it was deleted")
            write()
        except (OSError, ValueError) as error:
            with self._lock:
                self.error = self.error or getattr(error, "strerror", None) or str(error)
                self._pending = PendingRows()
            # A reader would drop an incomplete batch, too.
            with suppress(OSError):
                os.ftruncate(self._stream, self._written)

    def _write_rows(self, stream: int, pending: PendingRows) -> None:
        self._write(stream, pending.serialized(self._schema))

    def _write(self, stream: int, message: pa.Buffer | bytes) -> None:
        rest = memoryview(message)
        nbytes = len(rest)
        while rest:
            rest = rest[os.write(stream, rest) :]
        self._written += nbytes

    def _replace_metadata(self, text: bytes) -> None:
        temporary = self._metadata_path.with_name(f".{self._metadata_path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(text)
            os.replace(temporary, self._metadata_path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def _file_of(descriptor: int) -> tuple[int, int] | None:
    """Which file it is that is open there; None: none."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return status.st_dev, status.st_ino


_writers: set[TraceWriter] = set()


def _abandon_all() -> None:
    for writer in _writers:
        writer.abandon()
    _writers.clear()


def _close_all() -> None:
    for writer in list(_writers):
        writer.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)
atexit.register(_close_all)
