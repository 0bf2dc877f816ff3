"""A captured batch is read whole, of its own dtypes, and refused where its columns do not belong together."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gradscope.backward.captured import read_batch, write_batch
from gradscope.errors import GradscopeError

COLUMNS = {
    "obs": np.arange(600, dtype=np.float32).reshape(100, 2, 3),
    "actions": np.arange(100, dtype=np.int64) - 50,
    "dones": np.arange(100) % 3 == 0,
    "half": np.linspace(-1, 1, 100, dtype=np.float16),
    "precise": np.linspace(0, 1, 100),
    "pixels": np.arange(100, dtype=np.uint8)[:, None],
}


def saved(path: Path, columns: dict[str, Any]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **columns)
    elif path.suffix == ".pt":
        torch.save({name: torch.from_numpy(column) for name, column in columns.items()}, path)
    else:
        save_file({name: torch.from_numpy(column) for name, column in columns.items()}, path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_every_column_comes_back_as_it_was(suffix: str, tmp_path: Path) -> None:
    batch = read_batch(saved(tmp_path / f"batch{suffix}", COLUMNS))
    assert batch.rows == 100 and set(batch.columns) == set(COLUMNS)
    for name, column in COLUMNS.items():
        assert batch.columns[name].dtype == column.dtype
        np.testing.assert_array_equal(batch.columns[name], column)
        assert torch.equal(batch.tensors()[name], torch.from_numpy(column))


def test_compressed_big_endian_and_strided_columns(tmp_path: Path) -> None:
    np.savez_compressed(
        tmp_path / "c.npz", swapped=COLUMNS["precise"].astype(">f8"), fortran=np.asfortranarray(COLUMNS["obs"])
    )
    packed = read_batch(tmp_path / "c.npz")
    np.testing.assert_array_equal(packed.columns["swapped"], COLUMNS["precise"])
    np.testing.assert_array_equal(packed.columns["fortran"], COLUMNS["obs"])
    views = {
        "t": torch.arange(200).reshape(2, 100).t(),
        "every": torch.arange(200.0)[::2],
        "same": torch.ones(1).expand(100),
    }
    torch.save(views, tmp_path / "v.pt")
    strided = read_batch(tmp_path / "v.pt").tensors()
    assert all(torch.equal(strided[name], view) for name, view in views.items())


def test_types_that_numpy_lacks_are_torchs(tmp_path: Path) -> None:
    columns = {"b": torch.randn(80, 2).to(torch.bfloat16), "f": torch.randn(80).to(torch.float8_e4m3fn)}
    save_file(columns, tmp_path / "b.safetensors")
    found = read_batch(tmp_path / "b.safetensors").tensors()
    for name, column in columns.items():
        assert found[name].dtype == column.dtype
        assert torch.equal(found[name].float(), column.float())


def test_nested_columns_have_dotted_names() -> None:
    batch = read_batch({"obs": {"policy": np.ones((2, 3)), "critic": torch.zeros(2)}, "gamma": 0.99, "info": None})
    assert list(batch.columns) == ["obs.policy", "obs.critic"] and batch.rows == 2


def test_metadata_travel_with_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "rollout.safetensors"
    path.write_bytes(b"older")
    metadata = {"kind": "rollout", "library": "stable_baselines3", "n_envs": 4}
    write_batch(path, {**COLUMNS, "columns": np.asfortranarray(COLUMNS["obs"][:, 0])}, metadata)
    batch = read_batch(path)
    assert batch.metadata == metadata
    np.testing.assert_array_equal(batch.columns["columns"], COLUMNS["obs"][:, 0])
    assert [left.name for left in tmp_path.iterdir()] == ["rollout.safetensors"]


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(GradscopeError, match="No such file or directory"):
        write_batch(tmp_path / "none" / "b.safetensors", COLUMNS, {})


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"x": np.ones((4, 2)), "y": np.ones(3)}, "no common first dimension: 'x' has 4 rows, 'y' has 3"),
        ({"x": np.ones((0, 2))}, "has no rows"),
        ({"x": np.ones(())}, "'x' is a single number"),
        ({}, "holds no tensors"),
        ({"epoch": 3}, "holds no tensors"),
        ({"x": torch.ones(3).to_sparse()}, "'x' cannot be read (sparse tensor)"),
    ],
)
def test_columns_that_make_no_batch(columns: dict[str, Any], why: str) -> None:
    with pytest.raises(GradscopeError) as refused:
        read_batch(columns)
    assert why in refused.value.why


def test_files_that_hold_no_batch(tmp_path: Path) -> None:
    (tmp_path / "empty.pt").touch()
    whole = io.BytesIO()
    np.savez(whole, **COLUMNS)
    (tmp_path / "cut.npz").write_bytes(whole.getvalue()[:-300])
    save_file({"x": torch.ones(2)}, tmp_path / "odd.safetensors", {"gradscope.batch": "[1"})
    for name, why in [
        ("empty.pt", "is empty"),
        ("none.pt", "no such file"),
        ("", "is a directory"),
        ("cut.npz", ""),
        ("odd.safetensors", "gradscope.batch is no JSON object"),
    ]:
        with pytest.raises(GradscopeError) as refused:
            read_batch(tmp_path / name)
        assert why in refused.value.why and str(tmp_path) in refused.value.what
