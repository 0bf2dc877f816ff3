"""g = (10, 0.1) from every file format and float type: value:0.5 turns it by 10.7370°, norm:0.5 scales by 0.0499975."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from in_memory_source import angle_deg
from safetensors.torch import save_file

import gradscope

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
NUMPY_DTYPES = {torch.float64, torch.float32, torch.float16}
Save = Callable[[torch.Tensor, Path], Path]


def safetensors(gradient: torch.Tensor, folder: Path) -> Path:
    save_file({"layer.weight": gradient}, folder / "g.safetensors")
    return folder / "g.safetensors"


def sharded(gradient: torch.Tensor, folder: Path) -> Path:
    files = {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"}
    for i, (name, file) in enumerate(files.items()):
        save_file({name: gradient[i : i + 1].clone()}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder / "model.safetensors.index.json"


def torch_zip(gradient: torch.Tensor, folder: Path) -> Path:
    torch.save({"layer.weight": gradient}, folder / "g.pt")
    return folder / "g.pt"


def nested(gradient: torch.Tensor, folder: Path) -> Path:
    torch.save({"actor": {"weight": gradient[:1].clone()}, "critic": [gradient[1:].clone()]}, folder / "g.pth")
    return folder / "g.pth"


def legacy_torch(gradient: torch.Tensor, folder: Path) -> Path:
    torch.save({"layer.weight": gradient}, folder / "old.pt", _use_new_zipfile_serialization=False)
    return folder / "old.pt"


def npz(gradient: torch.Tensor, folder: Path) -> Path:
    np.savez(folder / "g.npz", gradient.numpy())
    return folder / "g.npz"


def compressed_npz(gradient: torch.Tensor, folder: Path) -> Path:
    np.savez_compressed(folder / "g.npz", gradient.numpy())
    return folder / "g.npz"


def npy(gradient: torch.Tensor, folder: Path) -> Path:
    np.save(folder / "g.npy", gradient.numpy())
    return folder / "g.npy"


def directory(gradient: torch.Tensor, folder: Path) -> Path:
    for step in range(3):
        save_file({"layer.weight": gradient}, folder / f"step_{step}.safetensors")
    return folder


# torch itself cannot read float8 back from its legacy format.
CASES = [
    (save, dtype)
    for save in (safetensors, sharded, torch_zip, nested, legacy_torch, npz, compressed_npz, npy, directory)
    for dtype in DTYPES
    if not (save in (npz, compressed_npz, npy) and dtype not in NUMPY_DTYPES)
    and not (save is legacy_torch and dtype.itemsize == 1)
]


@pytest.mark.parametrize(("save", "dtype"), CASES, ids=lambda case: getattr(case, "__name__", str(case)))
def test_the_worked_example(save: Save, dtype: torch.dtype, tmp_path: Path) -> None:
    gradient = torch.tensor([10.0, 0.1], dtype=torch.float64).to(dtype)
    stored = gradient.to(torch.float64).numpy()
    simulation = gradscope.simulate(save(gradient, tmp_path), ["value:0.5", "norm:0.5"])
    by_value, by_norm = simulation.results

    assert by_value.direction_change_deg is not None and by_norm.direction_change_deg is not None
    true_angle = angle_deg(stored, np.clip(stored, -0.5, 0.5))
    error = by_value.direction_change_error_deg
    assert error <= (1e-5 if dtype.itemsize <= 2 else 0.1)
    assert abs(by_value.direction_change_deg.max - true_angle) <= error + 1e-9
    assert by_norm.direction_change_deg.max == 0.0
    assert by_norm.scale.max == pytest.approx(0.5 / np.linalg.norm(stored), rel=1e-6)
    # The smaller types hold another number than 0.1, and so another angle.
    if dtype.itemsize >= 4:
        assert by_value.direction_change_deg.max == pytest.approx(10.7370, abs=5e-5)
        assert by_norm.scale.max == pytest.approx(0.0499975, abs=5e-8)
