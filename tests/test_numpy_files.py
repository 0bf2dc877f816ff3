"""numpy's .npy and .npz: equal to numpy.load, in place or inflated as they are read."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gradscope.errors import GradscopeError
from gradscope.sources import open_source
from gradscope.sources.formats.contents import read_contents
from gradscope.sources.formats.tree import UnreadableTensor
from gradscope.sources.stored import FileTensor, MemoryTensor, StreamTensor, read

ARRAYS = {
    "f4": np.linspace(-3, 3, 24, dtype="f4").reshape(2, 3, 4),
    "f8": np.linspace(-3, 3, 24).reshape(4, 6),
    "f2": np.linspace(-3, 3, 7, dtype="f2"),
    "big": np.linspace(-3, 3, 24, dtype=">f4").reshape(4, 6),
    "fortran": np.asfortranarray(np.linspace(-3, 3, 24).reshape(4, 6)),
    "zero_dim": np.array(2.5),
    "empty": np.zeros((0, 3), "f4"),
    "one": np.ones((1, 1, 1)),
}


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("name", ARRAYS)
def test_npy(tmp_path: Path, name: str, version: tuple[int, int]) -> None:
    with open(tmp_path / "g.npy", "wb") as file:
        np.lib.format.write_array(file, ARRAYS[name], version)
    leaf = read_contents(tmp_path / "g.npy").tree
    assert isinstance(leaf, StreamTensor if name == "big" else FileTensor)
    np.testing.assert_array_equal(read(leaf), np.load(tmp_path / "g.npy"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, save: Any) -> None:
    arrays = {name: array for name, array in ARRAYS.items() if name != "fortran"}
    save(tmp_path / "g.npz", **arrays)
    tree = read_contents(tmp_path / "g.npz").tree
    assert list(tree) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(read(tree[name]), array, err_msg=name)


def test_stored_members_are_read_in_place(tmp_path: Path) -> None:
    np.savez(tmp_path / "g.npz", w=np.ones(5))
    np.savez_compressed(tmp_path / "z.npz", w=np.ones(5))
    assert isinstance(read_contents(tmp_path / "g.npz").tree["w"], FileTensor)
    assert isinstance(read_contents(tmp_path / "z.npz").tree["w"], StreamTensor)


def test_a_compressed_fortran_array(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "z.npz", w=ARRAYS["fortran"], v=np.ones(2))
    source = open_source(tmp_path / "z.npz")
    assert dict(
        zip([info.name for info in source.tensors], next(source.read_steps(range(1))).sum_squares, strict=True)
    ) == (pytest.approx({"w": float((ARRAYS["fortran"] ** 2).sum()), "v": 2.0}))


def test_inflated_copies_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    np.savez_compressed(tmp_path / "z.npz", w=ARRAYS["fortran"])
    tree = read_contents(tmp_path / "z.npz").tree
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    np.testing.assert_array_equal(read(tree["w"]), ARRAYS["fortran"])
    del tree
    assert list((tmp_path / "temporary").iterdir()) == []


def test_many_compressed_members(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "z.npz", **{f"w{i}": np.full(3, float(i)) for i in range(2000)})
    (step,) = open_source(tmp_path / "z.npz").read_steps(range(1))
    assert step.max_abs.tolist() == [float(i) for i in range(2000)]


def test_names_with_dots_and_folders(tmp_path: Path) -> None:
    np.savez(tmp_path / "g.npz", **{"actor.0.weight": np.ones(2), "critic/bias": np.ones(1)})
    assert [info.name for info in open_source(tmp_path / "g.npz").tensors] == ["actor.0.weight", "critic/bias"]


def test_what_is_no_float_is_named(tmp_path: Path) -> None:
    others = {"i": np.arange(3), "c": np.ones(2, "c8"), "b": np.array([True]), "s": np.array(["x"])}
    others |= {"bf": np.ones(2, ml_dtypes.bfloat16), "r": np.zeros(2, [("x", "f4")]), "ld": np.ones(2, np.longdouble)}
    np.savez(tmp_path / "g.npz", w=np.ones(2), **others)
    source = open_source(tmp_path / "g.npz")
    assert [info.name for info in source.tensors] == ["w"]
    reasons = dict(text.split(": ", 1) for text in source.skipped)
    assert set(reasons) == set(others)
    assert (reasons["i"], reasons["c"], reasons["b"], reasons["r"]) == (
        "int64",
        "complex64",
        "bool",
        "structured array",
    )
    assert "bfloat16" in reasons["bf"]


def header(text: bytes, version: int = 1) -> bytes:
    return b"\x93NUMPY" + bytes((version, 0)) + struct.pack("<H" if version == 1 else "<I", len(text)) + text


def test_a_description_that_names_bfloat16(tmp_path: Path) -> None:
    values = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    text = b"{'descr': 'bfloat16', 'fortran_order': False, 'shape': (2,), }\n"
    (tmp_path / "g.npy").write_bytes(header(text) + values.tobytes())
    leaf = read_contents(tmp_path / "g.npy").tree
    assert leaf.info.dtype == "bfloat16"
    assert read(leaf).tolist() == [1.5, -2.0]


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "g.npy", np.array([{}, None], dtype=object), allow_pickle=True)
    with pytest.raises(GradscopeError, match="never unpickled"):
        open_source(tmp_path / "g.npy")


BAD_HEADERS = {
    "truncated": b"{'descr': '<f4', 'fortran_order': False, 'shape': (5,), }",
    "huge": b"{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 9), }",
    "negative": b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
    "no shape": b"{'descr': '<f4', 'fortran_order': False}",
    "more keys": b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'x': 1}",
    "a call": b"{'descr': '<f4', 'fortran_order': False, 'shape': (print('x'),), }",
    "no literal": b"__import__('os').system('false')",
    "deep": b"[" * 60_000,
    "unknown dtype": b"{'descr': '<q9', 'fortran_order': False, 'shape': (1,), }",
    "odd dtype": b"{'descr': 'f4,f4', 'fortran_order': False, 'shape': (1,), }",
    "empty": b"",
    "not latin": b"{'descr': '\xff', 'fortran_order': False, 'shape': (1,), }",
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_damaged_headers(tmp_path: Path, name: str) -> None:
    (tmp_path / "g.npy").write_bytes(header(BAD_HEADERS[name]) + bytes(16))
    with pytest.raises(GradscopeError) as caught:
        open_source(tmp_path / "g.npy")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\x93NUMPY", b"\x93NUMPY\x09\x00\x10\x00", b"\x93NUMPY\x02\x00\xff\xff\xff\xff"])
def test_headers_cut_short(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "g.npy").write_bytes(content)
    with pytest.raises(GradscopeError):
        open_source(tmp_path / "g.npy")


# --- zip files that lie ----------------------------------------------------------------------------------------------


def zip_of(tmp_path: Path, content: bytes, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(tmp_path / "g.npz", "w", compression) as archive:
        archive.writestr("w.npy", content)
    return tmp_path / "g.npz"


def array_bytes(array: np.ndarray[Any, Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_a_zip_bomb_is_refused_before_it_is_inflated(tmp_path: Path) -> None:
    text = b"{'descr': '|u1', 'fortran_order': False, 'shape': (2000000000,), }"
    path = tmp_path / "bomb.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("w.npy", "w", force_zip64=True) as member,
    ):
        member.write(header(text))
        for _ in range(16):
            member.write(bytes(1 << 20))
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.rindex(b"PK\x01\x02") + 24, 2_000_000_000 + len(header(text)))
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(GradscopeError, match="zip bomb"):
        open_source(path)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_compressible_gradients_are_no_bomb(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "g.npz", w=np.zeros(10_000_000, "f4"))
    step = next(open_source(tmp_path / "g.npz").read_steps(range(1)))
    assert step.zeros.tolist() == [10_000_000]


def test_a_member_shorter_than_its_header_says(tmp_path: Path) -> None:
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with pytest.raises(GradscopeError):
            open_source(zip_of(tmp_path, array_bytes(np.ones(100))[:-8], compression))


def test_a_damaged_compressed_member_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    path = zip_of(tmp_path, array_bytes(np.random.default_rng(0).normal(size=3000)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(GradscopeError, match=r"w\.npy") as caught:
        next(open_source(path).read_steps(range(1)))
    assert "\n" not in str(caught.value)


def test_unusual_compression_and_encryption(tmp_path: Path) -> None:
    with pytest.raises(GradscopeError, match="unusual"):
        open_source(zip_of(tmp_path, array_bytes(np.ones(3)), zipfile.ZIP_BZIP2))
    content = bytearray(zip_of(tmp_path, array_bytes(np.ones(3))).read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "g.npz").write_bytes(content)
    with pytest.raises(GradscopeError, match="encrypted"):
        open_source(tmp_path / "g.npz")


def test_a_directory_too_large_to_read(tmp_path: Path) -> None:
    content = bytearray(zip_of(tmp_path, array_bytes(np.ones(3))).read_bytes())
    struct.pack_into("<I", content, content.rindex(b"PK\x05\x06") + 12, 1 << 30)
    (tmp_path / "g.npz").write_bytes(content)
    with pytest.raises(GradscopeError, match="directory"):
        open_source(tmp_path / "g.npz")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_truncated_at_every_byte(tmp_path: Path, compression: int) -> None:
    content = zip_of(tmp_path, array_bytes(np.arange(5.0)), compression).read_bytes()
    for length in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(GradscopeError):
            open_source(tmp_path / "cut")


@pytest.mark.parametrize("kind", ["npy", "stored", "deflated"])
def test_flipped_bytes_give_arrays_or_one_error(tmp_path: Path, kind: str) -> None:
    content = array_bytes(np.arange(6, dtype="f4").reshape(2, 3))
    if kind != "npy":
        content = zip_of(tmp_path, content, getattr(zipfile, f"ZIP_{kind.upper()}")).read_bytes()
    generator = random.Random(1)
    for _ in range(700):
        damaged = bytearray(content)
        for _ in range(generator.choice((1, 1, 2, 4))):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            tree = read_contents(tmp_path / "damaged").tree
            for leaf in tree.values() if isinstance(tree, dict) else [tree]:
                if isinstance(leaf, FileTensor | StreamTensor | MemoryTensor) and leaf.info.dtype.startswith("float"):
                    read(leaf)
                else:
                    assert isinstance(leaf, UnreadableTensor) or "float" not in leaf.info.dtype
        except GradscopeError as error:
            assert "\n" not in str(error)
