"""PyTorch's zip files, read without torch, hold what torch.load says they hold."""

from __future__ import annotations

import argparse
import collections
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradscope.errors import GradscopeError
from gradscope.sources import open_source
from gradscope.sources.formats.contents import read_contents
from gradscope.sources.formats.tree import Opaque, UnreadableTensor, named_leaves, same_storage
from gradscope.sources.stored import FileTensor, MemoryTensor, StreamTensor, read

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
OTHERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128]
OTHERS += [torch.uint16, torch.uint32, torch.uint64]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def saved(tmp_path: Path, value: Any, **options: Any) -> Path:
    path = tmp_path / "saved.pt"
    torch.save(value, path, **options)
    return path


def raw(leaf: Any) -> np.ndarray[Any, Any]:
    """The leaf's elements as the bytes they are stored in, by a way of its own."""
    itemsize = np.dtype(
        {"bfloat16": "u2"}.get(
            leaf.info.dtype, leaf.info.dtype.replace("float8_e4m3fn", "u1").replace("float8_e5m2", "u1")
        )
    ).itemsize
    kind = np.dtype(f"V{itemsize}")
    if isinstance(leaf, MemoryTensor):
        return np.ascontiguousarray(leaf.array).reshape(-1).view(kind).reshape(leaf.info.shape)
    if isinstance(leaf, StreamTensor):
        with leaf.open_stream() as stream:
            content = b"".join(iter(lambda: stream.read(7777), b""))
        return np.frombuffer(content, kind, leaf.info.numel).reshape(leaf.info.shape)
    whole = np.frombuffer(Path(leaf.path).read_bytes()[leaf.offset :][: 1 << 24], "u1")
    whole = whole[: len(whole) // itemsize * itemsize].view(kind)
    if leaf.strides is None:
        return whole[: leaf.info.numel].reshape(leaf.info.shape)
    return np.lib.stride_tricks.as_strided(whole, leaf.info.shape, [stride * itemsize for stride in leaf.strides])


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, torch.Tensor):
        assert ours.info.shape == tuple(theirs.shape)
        assert f"torch.{ours.info.dtype}" == str(theirs.dtype)
        dense = theirs.detach().resolve_conj().contiguous()
        expected = dense.reshape(-1).view(BITS[dense.element_size()]).numpy().tobytes() if dense.numel() else b""
        assert np.ascontiguousarray(raw(ours)).tobytes() == expected
        if theirs.dtype in FLOATS:
            np.testing.assert_array_equal(read(ours), dense.double().numpy())
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for mine, yours in zip(ours, theirs, strict=True):
            assert_same(mine, yours)
    else:
        assert type(ours) is type(theirs)
        assert ours == theirs or (ours != ours and theirs != theirs)


def assert_equal_to_torch(path: Path) -> None:
    assert_same(read_contents(path).tree, torch.load(path, weights_only=True, map_location="cpu"))


@pytest.mark.parametrize("dtype", FLOATS + OTHERS, ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = (torch.arange(600) % 100).reshape(20, 30).to(torch.float32).to(dtype)
    assert_equal_to_torch(
        saved(tmp_path, {"a": tensor, "b": tensor[3:, ::2], "zero_dim": tensor[1, 1], "empty": tensor[:0]})
    )


def test_views_transposes_and_expanded_tensors(tmp_path: Path) -> None:
    base = torch.randn(6, 5, 4)
    views = [
        base.t() if base.ndim == 2 else base.permute(2, 0, 1),
        base[1:3],
        base[:, 2],
        base.flatten()[7:],
        base[..., ::3],
    ]
    views += [torch.randn(3, 1).expand(3, 8), torch.tensor(2.5).expand(4, 4), base[::2, 1:, 1].t(), torch.empty(0, 3)]
    assert_equal_to_torch(saved(tmp_path, views))


def test_parameters_modules_and_optimizers(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2)).to(torch.float64)
    optimizers = [torch.optim.AdamW(model.parameters(), amsgrad=True), torch.optim.SGD(model.parameters(), 0.1, 0.9)]
    for optimizer in optimizers:
        optimizer.zero_grad()
        model(torch.randn(5, 4, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    everything = {
        "model": model.state_dict(),
        "optimizer": [optimizer.state_dict() for optimizer in optimizers],
        "parameters": dict(model.named_parameters()),
        "epoch": 3,
        "best": float("nan"),
        "size": torch.Size([2, 3]),
        "nested": {"deep": [(1, 2.5, None, True, b"bytes", "text", 1 + 2j, -(2**40))]},
    }
    assert_equal_to_torch(saved(tmp_path, everything))


def test_small_integers_can_be_read_as_values(tmp_path: Path) -> None:
    tree = read_contents(saved(tmp_path, {"step": torch.tensor(123456789), "flags": torch.tensor([True, False])})).tree
    assert tree["step"].array.item() == 123456789
    assert tree["flags"].array.tolist() == [True, False]


def test_tied_weights_have_the_same_storage(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    path = saved(
        tmp_path, {"a": weight, "tied": weight, "transposed": weight.t(), "row": weight[1], "copy": weight.clone()}
    )
    tensors = dict(named_leaves(read_contents(path).tree, "saved"))
    keys = {name: same_storage(leaf) for name, leaf in tensors.items()}
    assert keys["a"] == keys["tied"]
    assert len(set(keys.values())) == 4


def test_what_is_no_dense_tensor_is_named(tmp_path: Path) -> None:
    sparse = torch.eye(3).to_sparse()
    csr = torch.eye(3).to_sparse_csr()
    quantized = torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8)
    meta = torch.empty(3, device="meta")
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    tree = read_contents(saved(tmp_path, [sparse, csr, quantized, meta, nested, torch.ones(2)])).tree
    assert [type(leaf) for leaf in tree] == [UnreadableTensor] * 5 + [FileTensor]
    assert [leaf.reason.split()[0] for leaf in tree[:5]] == ["sparse", "sparse", "quantized", "meta", "nested"]


class Custom:
    def __init__(self) -> None:
        self.rate = 0.5
        self.weight = torch.ones(3)


class CustomDict(dict):  # type: ignore[type-arg]
    pass


def test_unknown_classes_are_opaque_and_readable(tmp_path: Path) -> None:
    value = {
        "args": argparse.Namespace(lr=3e-4, layers=[64, 64]),
        "custom": Custom(),
        "subclass": CustomDict(a=torch.ones(2)),
        "scalar": np.float64(2.5),
        "count": np.int64(7),
        "array": np.arange(6.0, dtype=">f4").reshape(2, 3),
        "ordered": collections.OrderedDict(a=1),
        "default": collections.defaultdict(list, {"x": [1]}),
        "deque": collections.deque([1, 2], maxlen=5),
        "class": Custom,
        "dtype": torch.bfloat16,
        "device": torch.device("cuda", 1),
        "path": Path("/some/where"),
        "set": {1, 2},
    }
    tree = read_contents(saved(tmp_path, value)).tree
    assert tree["args"].name == "Namespace" and tree["args"].state == {"lr": 3e-4, "layers": [64, 64]}
    assert isinstance(tree["custom"], Opaque) and tree["custom"].state["rate"] == 0.5
    assert tree["custom"].state["weight"].info.shape == (3,)
    assert tree["subclass"].mapping["a"].info.shape == (2,)
    assert type(tree["scalar"]) is float and tree["scalar"] == 2.5
    assert type(tree["count"]) is int and tree["count"] == 7
    np.testing.assert_array_equal(read(tree["array"]), np.arange(6.0).reshape(2, 3))
    assert tree["ordered"] == {"a": 1} and tree["default"] == {"x": [1]} and tree["deque"] == [1, 2]
    assert (tree["class"].name, tree["dtype"].name, tree["device"]) == ("Custom", "bfloat16", "cuda:1")
    assert tree["path"].endswith("some/where") and tree["set"] == {1, 2}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    value = {"w": torch.randn(3, 3), "e": collections.OrderedDict(x=torch.ones(1)), "n": [1, 2**70, -1.5, "ü", b"\xff"]}
    assert_same(read_contents(saved(tmp_path, value, pickle_protocol=protocol)).tree, value)


def test_storages_in_big_endian_order(tmp_path: Path) -> None:
    value = {
        "f": torch.randn(4, 3),
        "view": torch.randn(4, 3).t(),
        "h": torch.randn(5).bfloat16(),
        "i": torch.tensor([1, 2]),
    }
    little = saved(tmp_path, value)
    big = tmp_path / "big.pt"
    widths = {0: 4, 1: 4, 2: 2, 3: 8}
    with zipfile.ZipFile(little) as source, zipfile.ZipFile(big, "w") as target:
        for info in source.infolist():
            content = source.read(info)
            if info.filename.endswith("byteorder"):
                content = b"big"
            if "/data/" in info.filename:
                width = widths[int(info.filename.rsplit("/", 1)[1])]
                content = np.frombuffer(content, f"u{width}").byteswap().tobytes()
            target.writestr(info.filename, content)
    assert_same(read_contents(big).tree, value)


def test_a_recompressed_archive(tmp_path: Path) -> None:
    value = {"w": torch.randn(40, 30), "t": torch.randn(40, 30).t(), "tail": torch.randn(100)[10:]}
    with (
        zipfile.ZipFile(saved(tmp_path, value)) as source,
        zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    assert_same(read_contents(tmp_path / "z.pt").tree, value)


def test_sharded_files_with_their_index(tmp_path: Path) -> None:
    tensors = {f"layer.{i}.weight": torch.randn(3, i + 1) for i in range(4)}
    weight_map = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for source in (open_source(tmp_path, as_="weights"), open_source(tmp_path / "pytorch_model.bin.index.json")):
        found = source.weights()
        names = [info.name for info in (found.tensors if found else source.tensors)]
        assert sorted(names) == sorted(tensors)


def test_legacy_files_go_through_torch(tmp_path: Path) -> None:
    value = {"w": torch.randn(3, 4), "b": torch.randn(3).bfloat16(), "n": torch.tensor([4])}
    assert_same(read_contents(saved(tmp_path, value, _use_new_zipfile_serialization=False)).tree, value)


def test_a_legacy_file_that_torch_refuses(tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": torch.ones(3), "a": Custom()}, _use_new_zipfile_serialization=False)
    with pytest.raises(GradscopeError, match=r"weights_only") as caught:
        read_contents(path)
    assert "\n" not in str(caught.value)


def test_a_legacy_file_without_torch_names_the_extra(tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": torch.ones(3)}, _use_new_zipfile_serialization=False)
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from gradscope.errors import GradscopeError\n"
        "from gradscope.sources.formats.contents import read_contents\n"
        "try: read_contents(Path(sys.argv[1]))\n"
        "except GradscopeError as error: print(error, error.hint)\n"
    )
    shown = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True).stdout
    assert "gradscope[torch]" in shown


def test_a_zip_file_is_read_without_torch(tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": torch.randn(3, 4)})
    script = (
        "import sys\n"
        "from gradscope.sources import open_source\n"
        "source = open_source(sys.argv[1])\n"
        "step = next(source.read_steps(range(1)))\n"
        "print(step.sum_squares[0], 'torch' in sys.modules)\n"
    )
    shown = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True).stdout
    squares, imported = shown.split()
    assert float(squares) == pytest.approx(float(torch.load(path)["w"].double().square().sum()), rel=1e-12)
    assert imported == "False"


def test_torchscript_is_read_as_weights(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    torch.jit.save(torch.jit.script(model), tmp_path / "script.pt")
    contents = read_contents(tmp_path / "script.pt")
    ours = {name: leaf for name, leaf in named_leaves(contents.tree, "script") if leaf is not None}
    assert contents.weights
    assert set(ours) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert_same(ours[name], tensor)


def test_a_large_storage_stays_in_the_file(tmp_path: Path) -> None:
    (leaf,) = read_contents(saved(tmp_path, [torch.zeros(1 << 20)])).tree
    assert isinstance(leaf, FileTensor) and leaf.strides is None and leaf.offset % 64 == 0


DTYPES = st.sampled_from(FLOATS + OTHERS)
SHAPES = st.lists(st.integers(0, 4), max_size=3)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(SHAPES)
    tensor = torch.randint(0, 100, shape).float().to(draw(DTYPES))
    if tensor.ndim and draw(st.booleans()):
        tensor = tensor.transpose(0, -1)
    if tensor.ndim and draw(st.booleans()):
        tensor = tensor[:: draw(st.integers(1, 3))]
    if draw(st.booleans()) and tensor.dtype in FLOATS[:4]:
        return torch.nn.Parameter(tensor)
    return tensor


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**100), 2**100), st.floats(), st.text(max_size=5))
TREES = st.recursive(
    st.one_of(tensors(), SCALARS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.text(max_size=6), st.integers(0, 9)), inner, max_size=4),
        st.dictionaries(st.text(max_size=6), inner, max_size=3).map(collections.OrderedDict),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(tree=TREES)
def test_any_nesting_equals_torch_load(tmp_path: Path, tree: Any) -> None:
    assert_equal_to_torch(saved(tmp_path, tree))


# --- archives that lie -----------------------------------------------------------------------------------------------


def patched(tmp_path: Path, change: Any, value: Any = None) -> Path:
    """An archive whose pickle was changed by ``change``."""
    source = io.BytesIO()
    torch.save({"w": torch.arange(8.0).reshape(2, 4)} if value is None else value, source)
    path = tmp_path / "patched.pt"
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(path, "w") as target:
        for info in archive.infolist():
            content = archive.read(info)
            target.writestr(info.filename, change(content) if info.filename.endswith("data.pkl") else content)
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"K\x08tq", b"K\x7ftq", "larger than its member"),
        (b"K\x08tq", b"J\xff\xff\xff\xfftq", "odd storage"),
        (b"K\x02K\x04\x86", b"K\x02K\x7f\x86", "beyond its storage"),
        (b"K\x04K\x01\x86", b"K\x7fK\x01\x86", "beyond its storage"),
        (b"K\x02K\x04\x86", b"J\xff\xff\xff\xffK\x04\x86", "impossible shape"),
        (b"K\x04K\x01\x86", b"J\xff\xff\xff\xffK\x01\x86", "impossible shape"),
        (b"K\x02K\x04\x86", b"K\x02K\x04K\x01\x87", "impossible shape"),
        (b"K\x02K\x04\x86", b"NK\x04\x86", "impossible shape"),
        (b"K\x02K\x04\x86", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7fK\x04\x86", "impossible shape|storage"),
        (b"X\x07\x00\x00\x00storage", b"X\x07\x00\x00\x00storagf", "other than a storage"),
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009", "lacks its member"),
        (b"FloatStorage", b"FloatSt0rage", "no floating|FloatSt0rage"),
    ],
)
def test_a_tensor_that_does_not_fit_its_storage(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    def change(content: bytes) -> bytes:
        assert content.count(old) == 1
        return content.replace(old, new)

    with pytest.raises(GradscopeError, match=message):
        open_source(patched(tmp_path, change))


def test_an_expanded_tensor_of_absurd_size(tmp_path: Path) -> None:
    huge = torch.ones(1).expand(1 << 40)
    with pytest.raises(GradscopeError, match="repeats 1 elements"):
        read_contents(saved(tmp_path, {"w": huge}))


def test_two_members_of_one_name(tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": torch.ones(2)})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning):
        archive.writestr("saved/data.pkl", b"N.")
    with pytest.raises(GradscopeError, match="two members"):
        read_contents(path)


def test_an_empty_member_is_fine_for_an_empty_storage(tmp_path: Path) -> None:
    assert_equal_to_torch(saved(tmp_path, {"w": torch.empty(0), "v": torch.empty(3, 0, 2).double()}))
