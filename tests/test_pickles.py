"""The unpickler that imports nothing: equal to pickle on plain data, inert on everything else."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pickle
import pickletools
import random
import struct
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradscope.errors import GradscopeError
from gradscope.sources.formats.file_region import FileRegion
from gradscope.sources.formats.known_constructors import plain_constructors
from gradscope.sources.formats.pickles import read_pickle
from gradscope.sources.formats.tree import Global, Opaque, UnreadableTensor, named_leaves
from gradscope.sources.stored import FileTensor, read

PROTOCOLS = range(6)


@pytest.fixture
def unpickle(tmp_path: Path) -> Any:
    path = tmp_path / "some.pkl"

    def run(content: bytes) -> Any:
        path.write_bytes(content)
        region = FileRegion.whole(path)
        return read_pickle(region, "some.pkl", plain_constructors(region))

    return run


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**200), 2**200), st.floats(), st.text(), st.binary(), st.complex_numbers()
)
KEYS = st.one_of(st.text(), st.integers(-(2**62), 2**62), st.tuples(st.integers(0, 5), st.text()))
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(KEYS, inner),
        st.dictionaries(KEYS, inner).map(collections.OrderedDict),
        st.sets(st.integers(-9, 9)),
        st.frozensets(st.text(max_size=3)),
    ),
    max_leaves=20,
)


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list | tuple):
        return type(ours) is type(theirs) and len(ours) == len(theirs) and all(map(same, ours, theirs))
    return repr(ours) == repr(theirs) if isinstance(theirs, float | complex) else ours == theirs


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(tree=TREES, protocol=st.sampled_from(PROTOCOLS))
def test_plain_data_equals_pickle(unpickle: Any, tree: Any, protocol: int) -> None:
    assert same(unpickle(pickle.dumps(tree, protocol)), tree)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numpy_arrays_and_numbers(unpickle: Any, protocol: int) -> None:
    arrays = {
        "c": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(12, dtype="f4").reshape(3, 4)),
        "big": np.arange(5, dtype=">f8"),
        "half": np.arange(4, dtype="f2"),
        "bf16": np.arange(4).astype(ml_dtypes.bfloat16),
        "long": np.random.default_rng(0).normal(size=(100, 200)),
        "long_fortran": np.asfortranarray(np.random.default_rng(0).normal(size=(100, 200))),
        "long_big": np.random.default_rng(0).normal(size=(100, 200)).astype(">f4"),
    }
    tree = unpickle(pickle.dumps({**arrays, "number": np.float32(1.5), "count": np.int16(3)}, protocol))
    for name, array in arrays.items():
        np.testing.assert_array_equal(read(tree[name]), array.astype("f8"), err_msg=name)
    assert (tree["number"], tree["count"]) == (1.5, 3)


def test_a_long_array_stays_in_the_file(unpickle: Any) -> None:
    assert isinstance(unpickle(pickle.dumps(np.zeros(100_000), 4)), FileTensor)


def test_an_array_of_objects_is_not_read(unpickle: Any) -> None:
    leaf = unpickle(pickle.dumps(np.array([{}, None], dtype=object)))
    assert isinstance(leaf, UnreadableTensor) and leaf.reason == "object"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_unknown_classes_are_inert(unpickle: Any, protocol: int) -> None:
    made = unpickle(pickle.dumps(Recorder(3), protocol))
    assert isinstance(made, Opaque) and made.name in ("Recorder", "_reconstructor")
    assert made.state == {"value": 3}
    assert Recorder.revived == 0


class Recorder:
    """Counts how often it is brought back to life."""

    revived = 0

    def __init__(self, value: int) -> None:
        self.value = value

    def __setstate__(self, state: dict[str, Any]) -> None:
        Recorder.revived += 1
        self.__dict__.update(state)


class Runs:
    """Asks its reader to execute a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_is_executed(unpickle: Any, tmp_path: Path, protocol: int) -> None:
    witness = tmp_path / "executed"
    made = unpickle(pickle.dumps(Runs(f"touch {witness}"), protocol))
    assert isinstance(made, Opaque) and made.name == "system"
    assert made.args == (f"touch {witness}",)
    assert not witness.exists()


EXECUTING = [
    b"cos\nsystem\n(S'touch {}'\ntR.",
    b"(S'touch {}'\nios\nsystem\n.",
    b"(cos\nsystem\nS'touch {}'\no.",
    b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c@touch {}\x85R.",
    b'c__builtin__\neval\n(S\'__import__("os").system("touch {}")\'\ntR.',
    b'cbuiltins\nexec\n(S\'open("{}", "w")\'\ntR.',
    b"\x80\x04\x8c\x08builtins\x8c\x0cobject.__subclasses__\x93)R.",
    b"\x80\x04\x8c\x02os\x8c\x0bpath.os.system\x93\x8c\x01x\x85R.",
    b"cbuiltins\ngetattr\n(cos\nS'system'\ntR.",
    b"c__main__\nX\n)\x81}(S'__setstate__'\ncos\nsystem\nub(S'touch {}'\nb.",
    b"cnumpy\nload\n(S'{}'\ntR.",
    b"cposix\nsystem\n(S'touch {}'\ntR0N.",
    b"ctorch.hub\nload\n(S'{}'\ntR.",
]


@pytest.mark.parametrize("content", EXECUTING)
def test_hostile_pickles_do_nothing(unpickle: Any, tmp_path: Path, content: bytes) -> None:
    witness = tmp_path / "executed"
    modules = set(sys.modules)
    with contextlib.suppress(GradscopeError):
        unpickle(content.replace(b"{}", str(witness).encode()))
    assert not witness.exists()
    assert set(sys.modules) == modules


def test_names_are_never_looked_up(unpickle: Any) -> None:
    assert unpickle(b"cthis_module_does_not_exist.at.all\nnor_this.name\n.") == Global(
        "this_module_does_not_exist.at.all", "nor_this.name"
    )


# --- bombs -----------------------------------------------------------------------------------------------------------


def billion_laughs(levels: int, opcode: bytes) -> bytes:
    """Each level holds the one before it ten times."""
    content = b"\x80\x04]\x94"
    for level in range(levels):
        content += b"(" + b"j" + struct.pack("<I", level)
        content += (b"j" + struct.pack("<I", level)) * 9 + opcode + b"\x94"
    return content + b"."


BOMBS = {
    "declared length": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.",
    "declared text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x.",
    "declared string": b"T" + struct.pack("<i", (1 << 31) - 1) + b"x.",
    "negative string": b"T" + struct.pack("<i", -5) + b"x.",
    "declared integer": b"\x8b" + struct.pack("<i", (1 << 31) - 1) + b"x.",
    "negative integer": b"\x8b" + struct.pack("<i", -1) + b"x.",
    "digits": b"I" + b"9" * 100_000 + b"\n.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
    "big memo": b"N" + b"r" + b"\xff\xff\xff\xff" + b".",
    "deep lists": b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep tuples": b")" + b"\x85" * 100_000 + b".",
    "deep marks": b"(" * 200_000 + b".",
    "deep calls": b"cx\ny\n" + b")R" * 100_000 + b".",
    "lists of lists": billion_laughs(60, b"l"),
    "tuples of tuples": billion_laughs(60, b"t"),
    "tuple as key": billion_laughs(60, b"t")[:-1] + b"\x94}" + b"h\x3cNs.",
    "tuple in set": billion_laughs(60, b"t")[:-1] + b"\x94\x8f(h\x3c\x90.",
    "tuple in frozenset": billion_laughs(60, b"t")[:-1] + b"\x94(h\x3c\x91.",
    "self reference": b"]\x94h\x00a.",
    "copied text": b"X"
    + struct.pack("<I", 1 << 16)
    + b"x" * (1 << 16)
    + b"\x94"
    + b"(c_codecs\nencode\nh\x00S'latin1'\ntR" * 50_000
    + b"l.",
    "copied lists": b"(" + b"N" * 50_000 + b"l\x94" + b"0cbuiltins\nlist\n(h\x00tR" * 50_000 + b".",
    "copied mappings": b"}("
    + b"".join(b"I%d\nN" % i for i in range(20_000))
    + b"u\x94"
    + b"0cx\ny\n)Rh\x00h\x00\x86b" * 20_000
    + b".",
    "colliding keys": b"}(" + b"".join(b"L%dL\nN" % (i * ((1 << 61) - 1)) for i in range(30_000)) + b"u.",
    "allocated bytes": b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR.",
    "range": b"cbuiltins\nlist\n(cbuiltins\nrange\n(J\xff\xff\xff\x7ftRtR.",
    "many arguments": b"cbuiltins\ncomplex\n(" + b"K\x01" * 100_000 + b"tR.",
    "numpy size": b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tS'b'\ntR"
    b"(K\x01(L4611686018427387904L\ntcnumpy\ndtype\n(S'f8'\ntRI00\nS'x'\ntb.",
    "numpy dtype": b"cnumpy\ndtype\n(S'V2147483647'\nI00\nI01\ntR.",
    "numpy structured": b"cnumpy\ndtype\n(S'f8,f8,(1000000,1000000)f8'\ntR.",
    "dup": b"](" + b"2" * 100 + b".",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_in_little_memory(unpickle: Any, name: str) -> None:
    tracemalloc.start()
    try:
        tree = unpickle(BOMBS[name])
        for _ in named_leaves(tree, "bomb"):
            pass
    except GradscopeError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 64 << 20


def test_too_many_opcodes(unpickle: Any) -> None:
    with pytest.raises(GradscopeError, match="opcodes"):
        unpickle(b"N0" * 2_000_001 + b"N.")


def test_exponential_names_are_refused(unpickle: Any) -> None:
    with pytest.raises(GradscopeError, match="repeats its parts"):
        list(named_leaves(unpickle(BOMBS["lists of lists"]), "bomb"))


def test_nesting_is_bounded(unpickle: Any) -> None:
    with pytest.raises(GradscopeError, match="deep"):
        list(named_leaves(unpickle(BOMBS["deep lists"]), "bomb"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b".",
        b"\x80",
        b"N",
        b"(.",
        b"a.",
        b"NNa.",
        b"}Na.",
        b"]NNs.",
        b"}(Nu.",
        b"(Nd.",
        b"R.",
        b"NNR.",
        b"cos\nsystem\nNR.",
        b"h\x05.",
        b"g5\n.",
        b"gx\n.",
        b"Ix\n.",
        b"Fx\n.",
        b"Sx\n.",
        b"S'\n.",
        b"V\\ud8\n.",
        b"X\x02\x00\x00\x00\xff\xfe.",
        b"c\xff\n\xff\n.",
        b"KK\x93.",
        b"K\x01K\x02\x93.",
        b"\x82\x01.",
        b"\x97.",
        b"N\x98.",
        b"(o.",
        b"Nb.",
        b"cx\ny\n))N\x92.",
        b"Px\n.",
        b"NQ.",
        b"0.",
        b"1.",
        b"2.",
        b"\xfe.",
        b"cnumpy\ndtype\n(K\x01tR.",
        b"cnumpy\ndtype\n(S'f8'\ntRNb.",
        b"ccollections\nOrderedDict\n(K\x01tR.",
        b"cbuiltins\nset\n(K\x01tR.",
    ],
)
def test_malformed_pickles(unpickle: Any, content: bytes) -> None:
    try:
        unpickle(content)
    except GradscopeError as error:
        assert "\n" not in str(error)
    else:
        assert content in (b"Px\n.", b"NQ.")


def rich_pickle(protocol: int) -> bytes:
    value = {
        "array": np.arange(6.0).reshape(2, 3),
        "ordered": collections.OrderedDict(a=1, b=[2, 3.5, None]),
        "recorder": Recorder(5),
        "scalar": np.float32(2),
        "set": {1, "x"},
        "numbers": [2**70, -5, 1e300, True, 3 + 4j],
        "bytes": b"\x00\xff" * 20,
        "shared": [collections.deque([1])] * 3,
    }
    return pickle.dumps(value, protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_truncated_at_every_byte(unpickle: Any, protocol: int) -> None:
    content = rich_pickle(protocol)
    for length in range(len(content)):
        with pytest.raises(GradscopeError):
            unpickle(content[:length])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_flipped_bytes_give_a_tree_or_one_error(unpickle: Any, protocol: int) -> None:
    content = rich_pickle(protocol)
    generator = random.Random(protocol)
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(generator.choice((1, 1, 2, 5))):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        try:
            list(named_leaves(unpickle(bytes(damaged)), "damaged"))
        except GradscopeError as error:
            assert "\n" not in str(error)


def test_random_opcodes_give_a_tree_or_one_error(unpickle: Any) -> None:
    generator = random.Random(7)
    codes = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
    for _ in range(2000):
        stream = io.BytesIO()
        for _ in range(generator.randrange(1, 30)):
            stream.write(generator.choice(codes))
            if generator.random() < 0.3:
                stream.write(generator.randbytes(generator.randrange(6)))
        try:
            list(named_leaves(unpickle(stream.getvalue() + b"."), "random"))
        except GradscopeError as error:
            assert "\n" not in str(error)
