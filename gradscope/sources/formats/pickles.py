"""An unpickler that imports nothing and calls nothing.

It runs the opcodes of pickle protocols 0 to 5 (Python's ``pickletools`` documents them).  Containers and numbers come
out as themselves; a GLOBAL becomes a ``Global`` that is never looked up; calling one gives what the table of known
constructors makes of it, all of them written here or in ``torch_files``, else an ``Opaque``.
"""

from __future__ import annotations

import codecs
import io
import struct
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, TypeAlias

from gradscope.errors import GradscopeError
from gradscope.sources.formats.file_region import FileRegion
from gradscope.sources.formats.tree import ByteRange, Global, Opaque, Tree

Constructor: TypeAlias = Callable[..., Any]
Constructors: TypeAlias = Mapping[tuple[str, str], Constructor]

# One opcode makes at most some 100 bytes of objects, so this bounds the memory; 100,000 tensors need less.
MAX_OPCODES = 4_000_000
MAX_TEXT_BYTES = 256 << 20
MAX_ARGUMENTS = 16
SMALL_BYTES = 1 << 20
LONG_BYTES = 1 << 16
MAX_INTEGER_BYTES = 64

MALFORMED = (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, UnicodeError, ValueError, struct.error)


class MalformedPickleError(ValueError):
    """The pickle breaks a rule; the message says which."""


class Unbuilt(Opaque):
    """An object that BUILD completes: ``build(state)`` gives what takes its place."""

    __slots__ = ("build", "memo_keys")

    def __init__(self, module: str, name: str, args: tuple[Any, ...], build: Callable[[Any], Any]) -> None:
        super().__init__(module, name, args)
        self.build = build
        self.memo_keys: list[int] = []


def read_pickle(
    region: FileRegion,
    what: str,
    constructors: Constructors,
    persistent_load: Callable[[Any], Any] | None = None,
) -> Tree:
    """What the pickle that starts ``region`` holds.

    Byte strings of 64 KiB and more stay in the file and come out as ``ByteRange``.  ``persistent_load`` gets the
    persistent ids; without it they become ``Opaque``.

    Raises:
        GradscopeError: the pickle is damaged, truncated, or larger than any honest one.
    """
    with _fast_stream(region) as stream:
        machine = _Machine(stream, region, constructors, persistent_load)
        try:
            return machine.run()
        except MALFORMED as error:
            reason = str(error) if isinstance(error, MalformedPickleError) else "it is damaged"
            raise GradscopeError(what, f"cannot read its pickle: {reason}") from None


def _fast_stream(region: FileRegion) -> BinaryIO:
    return io.BytesIO(region.read()) if region.size <= SMALL_BYTES else region.open()


_MARK = object()


class _Machine:
    def __init__(
        self,
        stream: BinaryIO,
        region: FileRegion,
        constructors: Constructors,
        persistent_load: Callable[[Any], Any] | None,
    ) -> None:
        self._stream = stream
        self._size = region.size
        self._constructors = constructors
        self._persistent_load = persistent_load
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        # What constructors may copy: a memoised string copied by every opcode would fill the memory.
        self._budget = 4 * region.size + (1 << 20)
        self._text_left = min(MAX_TEXT_BYTES, region.size)

    def run(self) -> Tree:
        for _ in range(MAX_OPCODES):
            code = self._stream.read(1)
            if code == b".":
                return self._pop()
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise MalformedPickleError(f"unknown opcode {code!r}" if code else "it is truncated")
            operation(self)
        raise MalformedPickleError(f"it has more than {MAX_OPCODES:,} opcodes")

    # --- the stream ---

    def _take(self, count: int) -> bytes:
        self._count_text(count)
        content = self._stream.read(count)
        if len(content) != count:
            raise MalformedPickleError("it is truncated")
        return content

    def _line(self) -> bytes:
        line = self._stream.readline(self._text_left + 1)
        self._count_text(len(line))
        if not line.endswith(b"\n"):
            raise MalformedPickleError("it is truncated")
        return line[:-1]

    def _count_text(self, count: int) -> None:
        self._text_left -= count
        if self._text_left < 0:
            raise MalformedPickleError(f"it holds more than {MAX_TEXT_BYTES:,} bytes of text")

    def skip(self, count: int) -> None:
        self._take(count)

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _text_line(self) -> str:
        return self._line().decode("utf-8")

    # --- the stack ---

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise MalformedPickleError("a value is missing")
        return value

    def _top(self) -> Any:
        if self._stack[-1] is _MARK:
            raise MalformedPickleError("a value is missing")
        return self._stack[-1]

    def _pop_to_mark(self) -> list[Any]:
        stack = self._stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is _MARK:
                values = stack[index + 1 :]
                del stack[index:]
                return values
        raise MalformedPickleError("a mark is missing")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def drop(self) -> None:
        self._stack.pop()

    def drop_to_mark(self) -> None:
        self._pop_to_mark()

    # --- scalars ---

    def int_line(self) -> None:
        line = self._line()
        self._push({b"00": False, b"01": True}[line] if line in (b"00", b"01") else self._integer(line))

    def long_line(self) -> None:
        self._push(self._integer(self._line().rstrip(b"L")))

    def _integer(self, line: bytes) -> int:
        if len(line) > 2 * MAX_INTEGER_BYTES:
            raise MalformedPickleError("it holds an integer of more than 64 bytes")
        return int(line)

    def float_line(self) -> None:
        self._push(float(self._line()))

    def long_bytes(self, count: int) -> None:
        if not 0 <= count <= MAX_INTEGER_BYTES:
            raise MalformedPickleError("it holds an integer of more than 64 bytes")
        self._push(int.from_bytes(self._take(count), "little", signed=True))

    def string_line(self) -> None:
        line = self._line()
        if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
            raise MalformedPickleError("a string is not quoted")
        self._push(_text_or_bytes(codecs.escape_decode(line[1:-1])[0]))

    def unicode_line(self) -> None:
        self._push(self._line().decode("raw-unicode-escape"))

    def old_string(self, count: int) -> None:
        if count < 0:
            raise MalformedPickleError("a string has a negative length")
        self._push(_text_or_bytes(self._take(count)))

    def text(self, count: int) -> None:
        self._push(self._take(count).decode("utf-8", "surrogatepass"))

    def byte_string(self, count: int) -> None:
        if count < LONG_BYTES:
            self._push(self._take(count))
            return
        start = self._stream.tell()
        if count > self._size - start:
            raise MalformedPickleError("it is truncated")
        self._stream.seek(start + count)
        self._push(ByteRange(start, start + count))

    # --- containers ---

    def tuple_of(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(values)))

    def dict_to_mark(self) -> None:
        values = self._pop_to_mark()
        self._push(_dict_of(values))

    def append(self) -> None:
        value = self._pop()
        self._extend(self._top(), [value])

    def appends(self) -> None:
        values = self._pop_to_mark()
        self._extend(self._top(), values)

    def _extend(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, Opaque):
            if target.sequence is None:
                target.sequence = []
            target = target.sequence
        if not isinstance(target, list):
            raise MalformedPickleError("it appends to what is no list")
        target.extend(values)

    def set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._update(self._top(), [key, value])

    def set_items(self) -> None:
        values = self._pop_to_mark()
        self._update(self._top(), values)

    def _update(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, Opaque):
            if target.mapping is None:
                target.mapping = {}
            target = target.mapping
        if not isinstance(target, dict):
            raise MalformedPickleError("it sets items of what is no mapping")
        target.update(_dict_of(values))

    def add_items(self) -> None:
        values = self._pop_to_mark()
        target = self._top()
        if not isinstance(target, set):
            raise MalformedPickleError("it adds items to what is no set")
        target.update(hashable(value) for value in values)

    def frozen_set(self) -> None:
        self._push(frozenset(hashable(value) for value in self._pop_to_mark()))

    # --- the memo ---

    def get(self, key: int) -> None:
        if key not in self._memo:
            raise MalformedPickleError("it refers to what it never stored")
        self._push(self._memo[key])

    def put(self, key: int) -> None:
        value = self._top()
        self._memo[key] = value
        if isinstance(value, Unbuilt):
            value.memo_keys.append(key)

    # --- objects ---

    def name_lines(self) -> None:
        self._push(Global(self._text_line(), self._text_line()))

    def stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise MalformedPickleError("the name of a class is no string")
        self._push(Global(module, name))

    def reduce(self) -> None:
        args, target = self._pop(), self._pop()
        self._push(self._call(target, args))

    def new_object_with_keywords(self) -> None:
        keywords, args, target = self._pop(), self._pop(), self._pop()
        if not isinstance(keywords, dict):
            raise MalformedPickleError("keyword arguments are no mapping")
        made = self._call(target, args)
        if keywords and isinstance(made, Opaque):
            made.state = keywords
        self._push(made)

    def instance_of_name(self) -> None:
        target = Global(self._text_line(), self._text_line())
        self._push(self._call(target, tuple(self._pop_to_mark())))

    def instance(self) -> None:
        values = self._pop_to_mark()
        if not values:
            raise MalformedPickleError("a class is missing")
        self._push(self._call(values[0], tuple(values[1:])))

    def _call(self, target: Any, args: Any) -> Any:
        if not isinstance(args, tuple):
            raise MalformedPickleError("arguments are no tuple")
        if not isinstance(target, Global):
            return Opaque("", "called object", args)
        constructor = self._constructors.get((target.module, target.name))
        if constructor is None:
            return Opaque(target.module, target.name, args)
        if len(args) > MAX_ARGUMENTS:
            raise MalformedPickleError(f"{target.name} is called with {len(args)} arguments")
        self._spend(args)
        return constructor(*args)

    def _spend(self, parts: tuple[Any, ...]) -> None:
        self._budget -= sum(len(part) for part in parts if isinstance(part, str | bytes | list | tuple | dict | set))
        if self._budget < 0:
            raise MalformedPickleError("it unfolds into far more than it holds")

    def build(self) -> None:
        state = self._pop()
        target = self._top()
        if isinstance(target, Unbuilt):
            built = target.build(state)
            self._stack[-1] = built
            for key in target.memo_keys:
                self._memo[key] = built
        elif isinstance(target, Opaque):
            target.state = self._merged_state(state)

    def _merged_state(self, state: Any) -> Any:
        """The state of an object with ``__slots__`` is a pair of mappings."""
        if isinstance(state, tuple) and len(state) == 2 and all(isinstance(part, dict | None) for part in state):
            self._spend(state)
            return {**(state[0] or {}), **(state[1] or {})}
        return state

    def persistent_id_line(self) -> None:
        self._push(self._load_persistent(self._text_line()))

    def persistent_id(self) -> None:
        self._push(self._load_persistent(self._pop()))

    def _load_persistent(self, identity: Any) -> Any:
        if self._persistent_load is None:
            return Opaque("", "persistent id", (identity,))
        return self._persistent_load(identity)

    def refuse_extension(self) -> None:
        raise MalformedPickleError("it uses the extension registry or out-of-band buffers")


def _text_or_bytes(content: bytes) -> str | bytes:
    return content.decode("ascii") if content.isascii() else content


def _dict_of(values: list[Any]) -> dict[Any, Any]:
    if len(values) % 2:
        raise MalformedPickleError("a key has no value")
    return {hashable(key): value for key, value in zip(values[::2], values[1::2], strict=True)}


def hashable(value: Any) -> Any:
    """``value`` as a key of a dict or set.

    Only what hashes at once stays itself: the hash of a tuple that holds one tuple twice, and so on, takes for ever.
    """
    if value is None or isinstance(value, str | bytes | float | Global | Opaque):
        return value
    if isinstance(value, int):
        return value if -(1 << 63) <= value < 1 << 63 else Opaque("builtins", "int", (value,))
    if (
        isinstance(value, tuple)
        and len(value) <= MAX_ARGUMENTS
        and all(isinstance(part, str | int | float | None) for part in value)
    ):
        return value
    return Opaque("", "unhashable key", (value,))


def _sized(layout: str, operation: Callable[[_Machine, Any], None]) -> Callable[[_Machine], None]:
    return lambda machine: operation(machine, machine._number(layout))


def _push(make: Callable[[], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine._push(make())


_OPERATIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"(": lambda m: m._push(_MARK),
    b"0": _Machine.drop,
    b"1": _Machine.drop_to_mark,
    b"2": lambda m: m._push(m._top()),
    b"N": _push(lambda: None),
    b"\x88": _push(lambda: True),
    b"\x89": _push(lambda: False),
    b"I": _Machine.int_line,
    b"L": _Machine.long_line,
    b"F": _Machine.float_line,
    b"J": _sized("<i", _Machine._push),
    b"K": _sized("<B", _Machine._push),
    b"M": _sized("<H", _Machine._push),
    b"G": _sized(">d", _Machine._push),
    b"\x8a": _sized("<B", _Machine.long_bytes),
    b"\x8b": _sized("<i", _Machine.long_bytes),
    b"S": _Machine.string_line,
    b"T": _sized("<i", _Machine.old_string),
    b"U": _sized("<B", _Machine.old_string),
    b"V": _Machine.unicode_line,
    b"X": _sized("<I", _Machine.text),
    b"\x8c": _sized("<B", _Machine.text),
    b"\x8d": _sized("<Q", _Machine.text),
    b"B": _sized("<I", _Machine.byte_string),
    b"C": _sized("<B", _Machine.byte_string),
    b"\x8e": _sized("<Q", _Machine.byte_string),
    b"\x96": _sized("<Q", _Machine.byte_string),
    b"]": _push(list),
    b"}": _push(dict),
    b")": _push(tuple),
    b"\x8f": _push(set),
    b"l": lambda m: m._push(m._pop_to_mark()),
    b"t": lambda m: m._push(tuple(m._pop_to_mark())),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"d": _Machine.dict_to_mark,
    b"a": _Machine.append,
    b"e": _Machine.appends,
    b"s": _Machine.set_item,
    b"u": _Machine.set_items,
    b"\x90": _Machine.add_items,
    b"\x91": _Machine.frozen_set,
    b"g": lambda m: m.get(m._integer(m._line())),
    b"h": _sized("<B", _Machine.get),
    b"j": _sized("<I", _Machine.get),
    b"p": lambda m: m.put(m._integer(m._line())),
    b"q": _sized("<B", _Machine.put),
    b"r": _sized("<I", _Machine.put),
    b"\x94": lambda m: m.put(len(m._memo)),
    b"c": _Machine.name_lines,
    b"\x93": _Machine.stack_global,
    b"R": _Machine.reduce,
    b"\x81": _Machine.reduce,
    b"\x92": _Machine.new_object_with_keywords,
    b"i": _Machine.instance_of_name,
    b"o": _Machine.instance,
    b"b": _Machine.build,
    b"P": _Machine.persistent_id_line,
    b"Q": _Machine.persistent_id,
    b"\x80": lambda m: m.skip(1),
    b"\x95": lambda m: m.skip(8),
    b"\x82": _Machine.refuse_extension,
    b"\x83": _Machine.refuse_extension,
    b"\x84": _Machine.refuse_extension,
    b"\x97": _Machine.refuse_extension,
    b"\x98": _Machine.refuse_extension,
}
