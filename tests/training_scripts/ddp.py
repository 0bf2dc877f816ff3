"""DistributedDataParallel: ``torchrun --nproc-per-node 2 ddp.py --out weights.pt``."""

import argparse

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

STEPS = 15

parser = argparse.ArgumentParser()
parser.add_argument("--out")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(options.seed)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
parallel = DistributedDataParallel(model)
optimizer = torch.optim.Adam(parallel.parameters(), lr=1e-2)
torch.manual_seed(options.seed + 1 + rank)
for _ in range(STEPS):
    optimizer.zero_grad()
    parallel(torch.randn(16, 8)).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(parallel.parameters(), 0.1)
    optimizer.step()
if rank == 0:
    torch.save({"weights": model.state_dict(), "updates": STEPS}, options.out)
torch.distributed.destroy_process_group()
