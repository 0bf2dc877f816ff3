"""safetensors files: the offsets are ours, and equal to what the safetensors package reads."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gradscope.errors import GradscopeError
from gradscope.sources import open_source
from gradscope.sources.formats.contents import read_contents
from gradscope.sources.formats.tree import UnreadableTensor
from gradscope.sources.stored import FileTensor, read

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def written(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str, shape: list[Any], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_float_type(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"w": torch.randn(7, 5).to(dtype), "b": torch.randn(3).to(dtype), "none": torch.empty(0, 2).to(dtype)}
    tensors["scalar"] = torch.tensor(2.0).to(dtype)
    save_file(tensors, tmp_path / "g.safetensors", metadata={"format": "pt"})
    tree = read_contents(tmp_path / "g.safetensors").tree
    theirs = load_file(tmp_path / "g.safetensors")
    assert set(tree) == set(theirs)
    for name, tensor in theirs.items():
        assert tree[name].info.shape == tuple(tensor.shape)
        assert f"torch.{tree[name].info.dtype}" == str(tensor.dtype)
        np.testing.assert_array_equal(read(tree[name]), tensor.double().numpy())


def test_integers_and_unknown_types_are_named(tmp_path: Path) -> None:
    header = {"w": entry("F32", [2], 0, 8), "i": entry("I64", [1], 8, 16), "odd": entry("F4", [4], 16, 18)}
    path = written(tmp_path / "g.safetensors", header, np.array([3, 4], "f4").tobytes() + bytes(10))
    source = open_source(path)
    assert source.skipped == ("i: int64", "odd: F4")
    assert next(source.read_steps(range(1))).sum_squares.tolist() == [25.0]


def test_the_name_of_a_file_does_not_matter(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4)}, tmp_path / "misleading.npz")
    assert open_source(tmp_path / "misleading.npz").info.format == "gradient dumps (safetensors)"


def sharded(directory: Path) -> dict[str, torch.Tensor]:
    tensors = {f"layer.{i}.weight": torch.randn(4, i + 1) for i in range(6)}
    names = list(tensors)
    weight_map = {}
    for shard in range(3):
        part = {name: tensors[name] for name in names[shard::3]}
        save_file(part, directory / f"model-0000{shard + 1}-of-00003.safetensors")
        weight_map |= dict.fromkeys(part, f"model-0000{shard + 1}-of-00003.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


@pytest.mark.parametrize("given", ["", "model.safetensors.index.json"])
def test_sharded_files_are_one_step(tmp_path: Path, given: str) -> None:
    tensors = sharded(tmp_path)
    source = open_source(tmp_path / given)
    assert source.info.steps == 1
    assert {info.name for info in source.tensors} == set(tensors)
    step = next(source.read_steps(range(1)))
    assert step.sum_squares.sum() == pytest.approx(sum(float(t.double().square().sum()) for t in tensors.values()))


def test_shards_without_their_index(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert {info.name for info in open_source(tmp_path).tensors} == set(tensors)


@pytest.mark.parametrize("shard", ["../g.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 5, "c:x", "a\\b"])
def test_shards_lie_beside_their_index(tmp_path: Path, shard: Any) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "g.safetensors")
    (tmp_path / "sub").mkdir()
    index = tmp_path / "sub" / "g.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(GradscopeError, match="outside its own directory"):
        open_source(index)


def test_a_missing_shard(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(GradscopeError, match=r"model-00002-of-00003\.safetensors: no such file"):
        open_source(tmp_path / "model.safetensors.index.json")


def test_shards_of_any_name_are_one_step(tmp_path: Path) -> None:
    weight_map = {}
    for shard in range(3):
        save_file({f"layer.{shard}.weight": torch.full((2,), float(shard))}, tmp_path / f"{shard}.safetensors")
        weight_map[f"layer.{shard}.weight"] = f"{shard}.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = open_source(tmp_path)
    assert source.info.steps == 1
    assert [info.name for info in source.tensors] == list(weight_map)
    assert source.notes == ()


def test_files_that_no_index_names_stay_steps(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "0.safetensors")
    (tmp_path / "a.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "0.safetensors"}}))
    for step in (1, 2):
        save_file({"w": torch.ones(2)}, tmp_path / f"{step}.safetensors")
    source = open_source(tmp_path)
    assert source.info.steps == 2
    assert source.notes == ("Left out: a.safetensors.index.json.",)


@pytest.mark.parametrize("name", ["g.safetensors.index.json", "other.index.json"])
def test_an_index_is_no_shard(tmp_path: Path, name: str) -> None:
    for index in ("g.safetensors.index.json", "other.index.json"):
        (tmp_path / index).write_text(json.dumps({"weight_map": {"w": name}}))
    for given in (tmp_path / "g.safetensors.index.json", tmp_path):
        with pytest.raises(GradscopeError, match="names an index as a shard"):
            open_source(given)


def test_a_shard_that_lacks_what_its_index_promises(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "0.safetensors")
    index = tmp_path / "g.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "0.safetensors", "lost": "0.safetensors"}}))
    with pytest.raises(GradscopeError, match=r"0\.safetensors: lacks the tensor 'lost', which g\.safetensors\.index"):
        open_source(index)


@pytest.mark.parametrize(
    "index", [b"", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": 3}', b"{" * 5000, b"\xff"]
)
def test_a_damaged_index(tmp_path: Path, index: bytes) -> None:
    (tmp_path / "g.safetensors.index.json").write_bytes(index)
    with pytest.raises(GradscopeError):
        open_source(tmp_path / "g.safetensors.index.json")


HOSTILE = {
    "hole": ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, 12, "leaves a hole"),
    "late start": ({"a": entry("F32", [1], 4, 8)}, 8, "leaves a hole"),
    "overlap": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, 12, "overlaps"),
    "beyond the end": ({"a": entry("F32", [4], 0, 16)}, 8, "beyond its end"),
    "more data": ({"a": entry("F32", [1], 0, 4)}, 8, "4 bytes more"),
    "negative": ({"a": entry("F32", [1], -4, 0)}, 4, "impossible"),
    "backwards": ({"a": entry("F32", [1], 4, 0)}, 4, "impossible|hole"),
    "shape": ({"a": entry("F32", [3], 0, 8)}, 8, "do not match"),
    "negative shape": ({"a": entry("F32", [-1, -2], 0, 8)}, 8, "impossible shape"),
    "huge shape": ({"a": entry("F32", [1 << 62, 4], 0, 8)}, 8, "impossible shape"),
    "overflowing shape": ({"a": entry("F32", [1 << 33, 1 << 33], 0, 8)}, 8, "do not match"),
    "fractional shape": ({"a": entry("F32", [2.0], 0, 8)}, 8, "impossible shape"),
    "boolean shape": ({"a": entry("F32", [True], 0, 4)}, 4, "impossible shape"),
    "many dimensions": ({"a": entry("F32", [1] * 1000, 0, 4)}, 4, "impossible shape"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, 4, "no offsets"),
    "float offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}}, 4, "no offsets"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4, "impossible shape"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, 4, "unknown way"),
    "a list": ({"a": [1, 2]}, 4, "unknown way"),
    "no json": (b'{"a": ', 4, "JSON"),
    "duplicates": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        4,
        "duplicate",
    ),
    "deep": (b'{"a":' + b"[" * 100_000, 4, "JSON"),
    "not utf-8": (b'{"\xff": 1}', 4, "JSON"),
    "digits": (b'{"a":' + b"9" * 10_000 + b"}", 4, "JSON|unknown way"),
    "nothing": ({}, 0, "no floating"),
    "only metadata": ({"__metadata__": {"a": "b"}}, 0, "no floating"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(tmp_path: Path, name: str) -> None:
    header, size, message = HOSTILE[name]
    path = written(tmp_path / "g.safetensors", header, bytes(size))
    with pytest.raises(GradscopeError, match=message) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("length", "message"), [(1 << 60, "header of"), (50_000_000, "header of"), (500, "truncated")])
def test_a_header_that_is_too_long(tmp_path: Path, length: int, message: str) -> None:
    path = written(tmp_path / "g.safetensors", b'{"w":{"dtype":"F32"}}', bytes(64), length)
    with pytest.raises(GradscopeError, match=message):
        open_source(path)


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    save_file({"w": torch.randn(3, 2), "b": torch.randn(2).bfloat16()}, tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for length in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(GradscopeError):
            open_source(tmp_path / "cut")


def test_flipped_bytes_give_tensors_or_one_error(tmp_path: Path) -> None:
    save_file({"w": torch.randn(3, 2), "b": torch.randn(2).bfloat16(), "n": torch.tensor(3)}, tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    generator = random.Random(0)
    for _ in range(1000):
        damaged = bytearray(content)
        for _ in range(generator.choice((1, 2, 4))):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            tree = read_contents(tmp_path / "damaged").tree
        except GradscopeError as error:
            assert "\n" not in str(error)
            continue
        for leaf in tree.values() if isinstance(tree, dict) else ():
            assert isinstance(leaf, UnreadableTensor) or leaf.info.numel < 100
            if isinstance(leaf, FileTensor) and leaf.info.dtype.startswith(("float", "bf")):
                read(leaf)
