"""Mixed precision on the CPU as PyTorch's recipe has it: scale, unscale, clip, step.

``--clip none`` leaves unscaling to the scaler, with ``--fused`` to the optimizer; ``--overflow`` spoils one batch.
"""

import argparse

import torch

parser = argparse.ArgumentParser()
parser.add_argument("--out")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--clip", choices=["norm", "none"], default="norm")
parser.add_argument("--fused", action="store_true")
parser.add_argument("--overflow", action="store_true")
options = parser.parse_args()

torch.manual_seed(options.seed)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=options.fused)
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
for step in range(40):
    inputs, targets = torch.randn(16, 8), torch.randn(16, 1)
    if options.overflow and step == 7:
        targets[0] = float("inf")
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
    scaler.scale(loss).backward()
    if options.clip == "norm":
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    scaler.step(optimizer)
    scaler.update()

updates = int(optimizer.state[model[0].weight]["step"])
torch.save({"weights": model.state_dict(), "updates": updates}, options.out)
