"""DistributedDataParallel: ``torchrun --nproc-per-node 2 ddp.py --out weights.pt``."""

import argparse

import torch
import torch.distributed

# Its default arguments hold the group that exists when it is first imported, for as long as the process lives.
# DistributedDataParallel imports it; imported before, it finds none.
import torch.distributed.nn
from torch.nn.parallel import DistributedDataParallel

STEPS = 15


# A function, so that the wrapper lets go of the group before it is destroyed, which then ends Gloo's threads. One that
# lives on and drops its last work while the interpreter ends takes the GIL for it, which aborts the process.
def train(out: str, seed: int) -> None:
    rank = torch.distributed.get_rank()
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(parallel.parameters(), lr=1e-2)
    torch.manual_seed(seed + 1 + rank)
    for _ in range(STEPS):
        optimizer.zero_grad()
        parallel(torch.randn(16, 8)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parallel.parameters(), 0.1)
        optimizer.step()
    if rank == 0:
        torch.save({"weights": model.state_dict(), "updates": STEPS}, out)


parser = argparse.ArgumentParser()
parser.add_argument("--out")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
torch.distributed.init_process_group("gloo")
train(options.out, options.seed)
torch.distributed.destroy_process_group()
