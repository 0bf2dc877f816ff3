"""What part of a parameter this rank holds: DTensor (FSDP2, tensor parallelism) and FSDP1."""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch
from torch import Tensor

from gradscope.tensors import TensorInfo
from gradscope.trace.schema import RecordedTensor

# By ``id`` of a parameter: its whole shape, this rank and how many ranks share it.
Shards = dict[int, tuple[tuple[int, ...], int, int]]
_FSDP = "torch.distributed.fsdp.fully_sharded_data_parallel"


def describe(name: str, parameter: Tensor, shards: Shards) -> RecordedTensor:
    """``parameter`` as the trace's metadata holds it; ``shards`` are those of ``fsdp_shards``."""
    dtype = str(parameter.dtype).removeprefix("torch.")
    layer = TensorInfo(name, (), dtype).layer
    shape = tuple(parameter.shape)
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is not None:
        return RecordedTensor(
            name,
            shape,
            dtype,
            layer,
            tuple(local(parameter).shape),
            tuple(_placement(placement) for placement in parameter.placements),  # type: ignore[attr-defined]
            tuple(mesh.mesh.shape),
            tuple(mesh.get_coordinate() or ()),
        )
    sharded = shards.get(id(parameter))
    if sharded is not None:
        whole, rank, world = sharded
        return RecordedTensor(name, whole, dtype, layer, shape, ("S(0)",), (world,), (rank,))
    return RecordedTensor(name, shape, dtype, layer, shape)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, without communication; any other tensor itself."""
    return getattr(tensor, "_local_tensor", tensor)


def returned_is_partial(total_norm: Any) -> bool:
    """Whether a clip call returned a norm of which each rank holds its part."""
    return any(placement.is_partial() for placement in getattr(total_norm, "placements", ()))


def _placement(placement: Any) -> str:
    if placement.is_replicate():
        return "R"
    return "P" if placement.is_partial() else f"S({placement.dim})"


def _can_be_sharded() -> bool:
    """Optimizers import FSDP, too; looking for its modules takes as long for each parameter as a large step."""
    return _FSDP in sys.modules and torch.distributed.is_available() and torch.distributed.is_initialized()


def fsdp_shards() -> Shards:
    """The parameters that FSDP1 shards."""
    shards: Shards = {}
    if not _can_be_sharded():
        return shards
    kind = sys.modules[_FSDP].FullyShardedDataParallel
    for module in gc.get_objects():
        if type(module) is not kind or getattr(module, "_handle", None) is None:
            continue
        handle = module._handle
        if not handle.uses_sharded_strategy:
            continue
        flat, world = handle.flat_param, handle.world_size
        shards[id(flat)] = ((flat._unpadded_unsharded_size.numel(),), handle.rank, world)
        for parameter, shape in zip(flat._params or (), flat._shapes, strict=False):
            shards[id(parameter)] = (tuple(shape), handle.rank, world)
    return shards
