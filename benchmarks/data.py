"""The benchmark's data: gradients of a LLaMA-like network in float32 and bfloat16, and a file of every format.

``python -m benchmarks.data large FOLDER GIGABYTES`` and ``python -m benchmarks.data small FOLDER``: processes of their
own, so that what they need does not count in anybody's peak memory.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

LAYERS = 32
VOCABULARY = 32_000
ROWS_AT_ONCE = 2048
CLIP_VALUE = 1e-3
LARGE = {"float32": "gradients_float32.safetensors", "bfloat16": "gradients_bfloat16.safetensors"}
EXPECTED = "expected.json"

Bits = NDArray[np.uint32] | NDArray[np.uint16]


def shapes(gigabytes: float) -> dict[str, tuple[int, int]]:
    """291 tensors, 7 matrices and 2 norms a block, that take ``gigabytes`` in float32."""
    # Solves 32 blocks of 12.1 h² and two embeddings of 32000 h for the width h; one-column shapes stand for vectors.
    elements = gigabytes * 1e9 / 4
    vocabulary = round(VOCABULARY * min(1.0, gigabytes / 2.1))
    blocks = LAYERS * 12.1
    width = max(16, round((math.sqrt(vocabulary**2 + blocks * elements) - vocabulary) / blocks / 16) * 16)
    inner = round(2.7 * width / 16) * 16
    found = {"model.embed_tokens.weight": (vocabulary, width)}
    for block in range(LAYERS):
        prefix = f"model.layers.{block}"
        found |= {f"{prefix}.self_attn.{part}_proj.weight": (width, width) for part in "qkvo"}
        found |= {f"{prefix}.mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
        found |= {f"{prefix}.mlp.down_proj.weight": (width, inner)}
        found |= {f"{prefix}.{part}_layernorm.weight": (width, 1) for part in ("input", "post_attention")}
    return found | {"model.norm.weight": (width, 1), "lm_head.weight": (vocabulary, width)}


def write_large(folder: Path, gigabytes: float) -> None:
    """Both large files, in pieces of a few megabytes, and what a float64 computation says about them."""
    tensors = shapes(gigabytes)
    random = np.random.default_rng(0)
    expected: dict[str, dict[str, Any]] = {
        dtype: {"squares": dict.fromkeys(tensors, 0.0), "dot": 0.0, "square": 0.0} for dtype in LARGE
    }
    with ExitStack() as stack:
        files = {dtype: stack.enter_context((folder / name).open("wb")) for dtype, name in LARGE.items()}
        write_header(files["float32"], tensors, "F32", 4)
        write_header(files["bfloat16"], tensors, "BF16", 2)
        for name, shape in tensors.items():
            for piece in gradient(random, shape):
                stored: dict[str, Bits] = {"float32": piece.view(np.uint32), "bfloat16": to_bfloat16(piece)}
                for dtype, bits in stored.items():
                    files[dtype].write(bits.tobytes())
                    note(expected[dtype], name, bits)
    (folder / EXPECTED).write_text(json.dumps(expected))


def gradient(random: np.random.Generator, shape: tuple[int, int]) -> Iterator[NDArray[np.float32]]:
    """Normal, times a scale per tensor and one per row (both lognormal: heavy tails); a fifth of the rows is zero."""
    rows, columns = shape
    scale = 1e-4 * math.exp(random.normal())
    for start in range(0, rows, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, rows - start)
        row_scales = scale * np.exp(random.standard_normal((count, 1))) * (random.random((count, 1)) >= 0.2)
        yield random.standard_normal((count, columns), dtype=np.float32) * row_scales.astype(np.float32)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def note(expected: dict[str, Any], name: str, bits: Bits) -> None:
    """Add one piece to the float64 sums: Σg² per tensor; g·c and ‖c‖² of the gradient clipped at ``CLIP_VALUE``."""
    wide = bits if bits.dtype == np.uint32 else bits.astype(np.uint32) << 16
    exact = wide.view(np.float32).astype(np.float64)
    clipped = exact.clip(-CLIP_VALUE, CLIP_VALUE)
    expected["squares"][name] += float(np.vdot(exact, exact))
    expected["dot"] += float(np.vdot(exact, clipped))
    expected["square"] += float(np.vdot(clipped, clipped))


def write_header(file: BinaryIO, tensors: dict[str, tuple[int, int]], dtype: str, size: int) -> None:
    header, offset = {}, 0
    for name, (rows, columns) in tensors.items():
        end = offset + rows * columns * size
        shape = [rows] if columns == 1 else [rows, columns]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded = encoded.ljust(-(-len(encoded) // 8) * 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)


def write_small(folder: Path) -> None:
    """One file of every format that the samples do not have, as PyTorch and numpy write it."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(16, 4)).square().mean().backward()
    optimizer.step()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    weights = model.state_dict()

    torch.save(gradients, folder / "gradients.pt")
    arrays: dict[str, Any] = {name: g.numpy() for name, g in gradients.items()}
    np.savez(folder / "gradients.npz", **arrays)
    np.save(folder / "gradients.npy", gradients["0.weight"].numpy())
    shards = folder / "sharded"
    shards.mkdir(exist_ok=True)
    parts = {name: f"model-{part:05d}-of-00004.safetensors" for part, name in enumerate(gradients, start=1)}
    for name, part in parts.items():
        save_file({name: gradients[name]}, shards / part)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))

    torch.save({"model": weights, "optimizer": optimizer.state_dict(), "epoch": 1}, folder / "training.pt")
    lightning = {
        "pytorch-lightning_version": "2.6.6",
        "state_dict": weights,
        "optimizer_states": [optimizer.state_dict()],
    }
    torch.save(lightning | {"epoch": 1, "global_step": 1, "lr_schedulers": [], "loops": {}}, folder / "lightning.ckpt")
    trainer = folder / "checkpoint-1"
    trainer.mkdir(exist_ok=True)
    save_file(weights, trainer / "model.safetensors", metadata={"format": "pt"})
    torch.save(optimizer.state_dict(), trainer / "optimizer.pt")
    (trainer / "config.json").write_text(json.dumps({"model_type": "mlp"}))
    (trainer / "trainer_state.json").write_text(json.dumps({"global_step": 1, "log_history": []}))


if __name__ == "__main__":
    if sys.argv[1] == "large":
        write_large(Path(sys.argv[2]), float(sys.argv[3]))
    else:
        write_small(Path(sys.argv[2]))
