"""One rank's stream as it is when opened: its whole batches, in blocks of a few MiB."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradscope.errors import GradscopeError
from gradscope.trace.columns import arrow_schema
from gradscope.trace.framing import RECORD_BATCH, SCHEMA, Message, whole_messages
from gradscope.trace.rows import IntArray, Rows

# Many small batches (a slow training step makes one each) are decoded together; one batch is never divided.
BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive batches."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class RowStream:
    """``blocks`` hold all whole batches; ``dropped`` bytes follow them; ``ended`` says that the stream was closed."""

    path: Path
    schema: Block
    blocks: tuple[Block, ...]
    dropped: int
    ended: bool

    @classmethod
    def open(cls, path: Path) -> RowStream:
        """Find the batches of a stream, which may be cut at any byte or still be written.

        Raises GradscopeError where it cannot be read or is no stream of a trace.
        """
        with _open(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            try:
                messages = list(whole_messages(stream, size))
            except ValueError as error:
                raise GradscopeError(str(path), f"is damaged: {error}") from None
        ended = bool(messages) and messages[-1].kind == 0
        dropped = size - (messages[-1].offset + messages[-1].nbytes if messages else 0)
        kinds = [message.kind for message in messages if message.kind]
        if kinds and kinds != [SCHEMA, *[RECORD_BATCH] * (len(kinds) - 1)]:
            raise GradscopeError(str(path), "is damaged: it does not begin with the one schema of a trace")
        schema = Block(messages[0].offset, messages[0].nbytes) if kinds else Block(0, 0)
        opened = cls(path, schema, tuple(_blocks(messages[1 : len(kinds)])), dropped, ended)
        if kinds:
            opened._check_schema()
        return opened

    @property
    def nbytes(self) -> int:
        """The bytes of all whole batches."""
        return sum(block.nbytes for block in self.blocks)

    def read(self, number: int, group_sizes: IntArray) -> Rows:
        """The rows of a block, which are of groups of these sizes (int64 [groups]).

        Raises GradscopeError where they are damaged, or the file is no longer what it was.
        """
        import pyarrow as pa

        block = self.blocks[number]
        try:
            with _open(self.path) as stream:
                stream.seek(self.schema.offset)
                schema = stream.read(self.schema.nbytes)
                stream.seek(block.offset)
                batches = stream.read(block.nbytes)
            with pa.ipc.open_stream(pa.py_buffer(schema + batches)) as reader:
                table = reader.read_all()
            table.validate(full=True)
            if not table.num_rows:
                raise ValueError("it holds no rows")
            rows = Rows.concatenate([Rows.from_batch(batch) for batch in table.combine_chunks().to_batches()])
            rows.check(group_sizes)
        except (ValueError, OSError, pa.ArrowException) as error:
            why = str(error).partition("\n")[0]
            raise GradscopeError(str(self.path), f"is damaged at byte {block.offset:,}: {why}") from None
        return rows

    def _check_schema(self) -> None:
        import pyarrow as pa

        with _open(self.path) as stream:
            stream.seek(self.schema.offset)
            message = stream.read(self.schema.nbytes)
        try:
            found = pa.ipc.read_schema(pa.py_buffer(message))
        except (ValueError, OSError, pa.ArrowException) as error:
            raise GradscopeError(str(self.path), f"is damaged: {error}") from None
        for field in arrow_schema():
            at = found.get_field_index(field.name)
            if at < 0 or found.field(at).type != field.type:
                raise GradscopeError(str(self.path), f"is no stream of a trace: it has no column {field.name}")


def _blocks(batches: list[Message]) -> list[Block]:
    blocks: list[Block] = []
    for batch in batches:
        if blocks and blocks[-1].nbytes + batch.nbytes <= BLOCK_BYTES:
            blocks[-1] = Block(blocks[-1].offset, blocks[-1].nbytes + batch.nbytes)
        else:
            blocks.append(Block(batch.offset, batch.nbytes))
    return blocks


def _open(path: Path) -> Any:
    """A regular file, opened for reading without ever blocking on a pipe."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise GradscopeError(str(path), (error.strerror or str(error)).lower()) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise GradscopeError(str(path), "is not a regular file")
    return os.fdopen(descriptor, "rb")


def file_bytes(path: Path, most: int) -> bytes:
    """The content of a small regular file.

    Raises GradscopeError where it cannot be read, or holds more than ``most`` bytes.
    """
    with _open(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            raise GradscopeError(str(path), f"holds more than {most >> 20} MiB")
        content: bytes = stream.read(size)
    return content
