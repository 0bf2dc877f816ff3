"""Where the messages of an Arrow IPC stream lie, found without decoding them and without trusting their claims.

The format of a message is in "Encapsulated message format" of the Arrow columnar specification: a continuation mark,
the length of the metadata, the metadata (a FlatBuffers ``Message``), the body.  Of the metadata three fields are read
here: what the message is, how long its body is, and whether that is compressed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct, error
from typing import BinaryIO

SCHEMA, RECORD_BATCH = 1, 3
# A trace's batches hold a quarter of a second; whatever claims more than this is not one of them.
LARGEST_METADATA = 16 << 20
LARGEST_BODY = 1 << 30

_PREFIX = Struct("<Ii")
_CONTINUATION = 0xFFFFFFFF
_U16, _I32, _U32, _I64 = Struct("<H"), Struct("<i"), Struct("<I"), Struct("<q")
# Positions of the fields in their FlatBuffers tables (Message.fbs).
_HEADER_TYPE, _HEADER, _BODY_LENGTH, _COMPRESSION = 1, 2, 3, 3


@dataclass(frozen=True, slots=True)
class Message:
    """A whole message: where it begins, its length in all, and its kind."""

    offset: int
    nbytes: int
    kind: int


def whole_messages(stream: BinaryIO, size: int) -> Iterator[Message]:
    """The messages that lie wholly within the first ``size`` bytes, and the mark that ends a stream as one of kind 0.

    Raises ValueError where a message is none, claims more than a trace holds, or is compressed.
    """
    offset = 0
    while offset + _PREFIX.size <= size:
        stream.seek(offset)
        prefix = stream.read(_PREFIX.size)
        # What a file system leaves of a write that a power failure cut short.
        if not any(prefix):
            return
        continuation, length = _PREFIX.unpack(prefix)
        if continuation != _CONTINUATION or not 0 <= length <= LARGEST_METADATA:
            raise ValueError(f"no Arrow message at byte {offset}")
        if length == 0:
            yield Message(offset, _PREFIX.size, 0)
            return
        if offset + _PREFIX.size + length > size:
            return
        kind, body = _peek(stream.read(length), offset)
        nbytes = _PREFIX.size + length + body
        if offset + nbytes > size:
            return
        yield Message(offset, nbytes, kind)
        offset += nbytes


def _peek(metadata: bytes, offset: int) -> tuple[int, int]:
    """The kind of a message and the length of its body."""
    try:
        message = _U32.unpack_from(metadata)[0]
        at = _field(metadata, message, _HEADER_TYPE)
        kind = metadata[at] if at else 0
        at = _field(metadata, message, _BODY_LENGTH)
        body = _I64.unpack_from(metadata, at)[0] if at else 0
        at = _field(metadata, message, _HEADER)
        header = at + _U32.unpack_from(metadata, at)[0]
        compressed = kind == RECORD_BATCH and _field(metadata, header, _COMPRESSION) != 0
    except (error, IndexError):
        raise ValueError(f"the message at byte {offset} is damaged") from None
    if not 0 <= body <= LARGEST_BODY or kind not in (SCHEMA, RECORD_BATCH) or compressed:
        raise ValueError(f"the message at byte {offset} is none of a trace's")
    return kind, int(body)


def _field(buffer: bytes, table: int, number: int) -> int:
    """Where a field of a FlatBuffers table lies; 0 where it is absent."""
    vtable = table - _I32.unpack_from(buffer, table)[0]
    slot = 4 + 2 * number
    if vtable < 0 or slot >= _U16.unpack_from(buffer, vtable)[0]:
        return 0
    relative = _U16.unpack_from(buffer, vtable + slot)[0]
    return int(table + relative) if relative else 0
