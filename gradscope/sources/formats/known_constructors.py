"""What gradscope makes of the classes and functions that honest pickles name: containers, numbers, numpy arrays.

Each is written here anew from its documented meaning; the named one is never imported.  Arguments come from an
untrusted file: a constructor that gets odd ones raises ``MalformedPickleError`` or gives an ``Opaque``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gradscope.sources.formats.file_region import FileRegion
from gradscope.sources.formats.numpy_arrays import array_in_file, array_in_memory, checked_shape, layout_of
from gradscope.sources.formats.pickles import Constructor, MalformedPickleError, Unbuilt, hashable
from gradscope.sources.formats.tree import ByteRange, Global, Leaf, Opaque, UnreadableTensor

ML_DTYPES = frozenset(("bfloat16", "float8_e4m3fn", "float8_e5m2"))
PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath")


def plain_constructors(region: FileRegion) -> dict[tuple[str, str], Constructor]:
    """The table for ``read_pickle``; ``region`` is the pickle's own, where its long byte strings stay."""
    builtin: dict[str, Constructor] = {
        "list": _list,
        "tuple": lambda *args: tuple(_list(*args)),
        "dict": _dict,
        "set": lambda *args: {hashable(value) for value in _list(*args)},
        "frozenset": lambda *args: frozenset(hashable(value) for value in _list(*args)),
        "bytearray": _bytes,
        "bytes": _bytes,
        "complex": _complex,
        "slice": lambda *args: Opaque("builtins", "slice", args),
        "object": lambda *args: Opaque("builtins", "object", args),
    }
    table = {(module, name): make for name, make in builtin.items() for module in ("builtins", "__builtin__")}
    table |= {
        ("collections", "OrderedDict"): _dict,
        ("collections", "Counter"): _dict,
        ("collections", "defaultdict"): _default_dict,
        ("collections", "deque"): lambda values=(), _length=None: _list(values),
        ("_codecs", "encode"): _encode,
        ("copy_reg", "_reconstructor"): _reconstructor,
        ("copyreg", "_reconstructor"): _reconstructor,
    }
    table |= {("pathlib", name): _path for name in PATHS}
    table |= {("pathlib._local", name): _path for name in PATHS}
    return table | _numpy_constructors(region)


def _list(values: Any = ()) -> list[Any]:
    if not isinstance(values, list | tuple | set | frozenset | dict):
        raise MalformedPickleError("a container is made of what is none")
    return list(values)


def _dict(items: Any = ()) -> dict[Any, Any]:
    if isinstance(items, dict):
        return dict(items)
    pairs = _list(items)
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise MalformedPickleError("a mapping is made of what are no pairs")
    return {hashable(key): value for key, value in pairs}


def _default_dict(_factory: Any = None, items: Any = ()) -> dict[Any, Any]:
    return _dict(items)


def _bytes(content: Any = b"", encoding: str = "") -> bytes | ByteRange:
    if isinstance(content, str) and encoding in ("latin-1", "latin1"):
        return content.encode("latin-1")
    if not isinstance(content, bytes | ByteRange):
        raise MalformedPickleError("bytes are made of what are none")
    return content


def _encode(text: Any, encoding: str = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise MalformedPickleError("bytes are made of what is no text")
    return text.encode(encoding)


def _complex(real: Any = 0.0, imaginary: Any = 0.0) -> complex:
    if not all(isinstance(part, float | int) for part in (real, imaginary)):
        raise MalformedPickleError("a complex number is made of what are no numbers")
    return complex(real, imaginary)


def _path(*parts: Any) -> str:
    if not all(isinstance(part, str) for part in parts):
        raise MalformedPickleError("a path is made of what is no text")
    return "/".join(parts)


def _reconstructor(cls: Any, base: Any, content: Any) -> Any:
    """How protocols 0 and 1 make an object: its class, its built-in base and that base's value."""
    if not isinstance(cls, Global):
        raise MalformedPickleError("a class is missing")
    if (cls.module, cls.name) == ("collections", "OrderedDict"):
        return _dict(content or ())
    made = Opaque(cls.module, cls.name, (base, content))
    if isinstance(content, dict):
        made.mapping = dict(content)
    elif isinstance(content, list):
        made.sequence = list(content)
    return made


# --- numpy -----------------------------------------------------------------------------------------------------------


def _numpy_constructors(region: FileRegion) -> dict[tuple[str, str], Constructor]:
    def array(raw: Any, dtype: Any, shape: Any, fortran: bool) -> Leaf:
        return _array(region, raw, dtype, shape, fortran)

    def reconstruct(*args: Any) -> Unbuilt:
        def build(state: Any) -> Leaf:
            _version, shape, dtype, fortran, raw = state
            return array(raw, dtype, shape, bool(fortran))

        return Unbuilt("numpy", "ndarray", args, build)

    def from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> Leaf:
        return array(raw, dtype, shape, order == "F")

    table: dict[tuple[str, str], Constructor] = {("numpy", "dtype"): _dtype}
    for core in ("numpy.core", "numpy._core"):
        table |= {
            (f"{core}.multiarray", "_reconstruct"): reconstruct,
            (f"{core}.multiarray", "scalar"): _scalar,
            (f"{core}.numeric", "_frombuffer"): from_buffer,
        }
    return table


def _dtype(code: Any, *_flags: Any) -> Any:
    """A dtype whose state, which BUILD brings, tells the byte order; one of ml_dtypes is kept as its name."""
    if isinstance(code, Global):
        if code.module.startswith("ml_dtypes") and code.name in ML_DTYPES:
            return Unbuilt("numpy", "dtype", (code,), lambda _state: code.name)
        return Opaque("numpy", "dtype", (code,))
    if not isinstance(code, str) or len(code) > 12 or code.lstrip("<>|=")[:1] not in tuple("biufcSUVO?"):
        raise MalformedPickleError("an unknown numpy dtype")
    try:
        dtype = np.dtype(code)
    except TypeError:
        raise MalformedPickleError("an unknown numpy dtype") from None

    def build(state: Any) -> Any:
        if state[4] is not None:
            return Opaque("numpy", "dtype", (code,))
        return dtype.newbyteorder(state[1]) if state[1] in ("<", ">") else dtype

    return Unbuilt("numpy", "dtype", (code,), build)


def _scalar(dtype: Any, content: Any = b"") -> Any:
    if not isinstance(dtype, np.dtype) or dtype.kind not in "biufc" or not isinstance(content, bytes):
        return Opaque("numpy", "scalar", (dtype, content))
    if len(content) != dtype.itemsize:
        raise MalformedPickleError("a numpy number has the wrong size")
    return np.frombuffer(content, dtype)[0].item()


def _array(region: FileRegion, raw: Any, dtype: Any, shape: Any, fortran: bool) -> Leaf:
    if not isinstance(dtype, np.dtype | str):
        return UnreadableTensor("numpy array of unknown type")
    layout = layout_of(dtype, checked_shape(shape, str(region.path)), fortran)
    if layout is None:
        return UnreadableTensor(str(dtype))
    if not isinstance(raw, bytes | ByteRange) or len(raw) != layout.nbytes:
        raise MalformedPickleError("a numpy array has the wrong size")
    if isinstance(raw, ByteRange):
        return array_in_file(layout, FileRegion(region.path, region.offset + raw.start, len(raw)))
    array = np.frombuffer(raw, layout.bits).reshape(layout.shape, order="F" if fortran else "C")
    return array_in_memory(array, layout.dtype)
