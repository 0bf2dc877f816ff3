"""FSDP2: ``torchrun --nproc-per-node 2 fsdp2.py --out weights.pt``.  Every rank holds a shard of every parameter."""

import argparse
import gc

import torch
import torch.distributed

# It must find no group when it is first imported, or it keeps that group (see ddp.py).
import torch.distributed.nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

STEPS = 15


def train(out: str, seed: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    rank = torch.distributed.get_rank()
    torch.manual_seed(seed)
    # An odd width: the ranks' shards differ in size.
    model = torch.nn.Sequential(torch.nn.Linear(8, 17), torch.nn.Tanh(), torch.nn.Linear(17, 1))
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(seed + 1 + rank)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(16, 8)).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if not torch.isfinite(norm.full_tensor()):
            raise SystemExit("the gradient is not finite")
        optimizer.step()
    weights = {name: value.full_tensor() for name, value in model.state_dict().items()}
    if rank == 0:
        torch.save({"weights": weights, "updates": STEPS}, out)
    # DTensor's caches keep the mesh for as long as the process lives; it need not keep the group.
    getattr(mesh, "_pg_registry", {}).clear()


parser = argparse.ArgumentParser()
parser.add_argument("--out")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
train(options.out, options.seed)
# FSDP's modules are reference cycles, which hold the group. It must end here, and Gloo's threads with it (see ddp.py).
gc.collect()
torch.distributed.destroy_process_group()
