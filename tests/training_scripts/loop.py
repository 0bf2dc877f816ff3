"""Plain training loops, one for each way of clipping: ``loop.py WAY --out weights.pt``."""

import argparse

import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

STEPS = 30


def data():
    return torch.randn(16, 8), torch.randn(16, 1)


def loss_of(model):
    inputs, targets = data()
    return (model(inputs) - targets).square().mean()


def never_clipping(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return STEPS


def clipping_by_value(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        clip_grad_value_(model.parameters(), 0.05)
        optimizer.step()
    return STEPS


def lbfgs(model):
    """The gradient exists only inside the closure, which runs several times in a step."""
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    for _ in range(STEPS // 3):
        inputs, targets = data()

        def closure(inputs=inputs, targets=targets):
            optimizer.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    return STEPS // 3


def joint_norm(model):
    """Two lists of parameters, one norm: as sharded trainers combine what they hold."""
    body, head = list(model[0].parameters()), list(model[2].parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        norms = [get_total_norm([p.grad for p in part]) for part in (body, head)]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        for part in (body, head):
            clip_grads_with_norm_(part, 0.5, norm)
        optimizer.step()
    return STEPS


def accumulating(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for batch in range(4 * STEPS):
        (loss_of(model) / 4).backward()
        if batch % 4 == 3:
            clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad()
    return STEPS


def two_optimizers(model):
    """Body and head have an optimizer and a threshold of their own, clipped in one line."""
    body = torch.optim.Adam(model[0].parameters(), lr=1e-2)
    head = torch.optim.SGD(model[2].parameters(), lr=1e-2)
    for _ in range(STEPS):
        model.zero_grad()
        loss_of(model).backward()
        for part, optimizer, max_norm in ((model[0], body, 0.5), (model[2], head, 0.2)):
            clip_grad_norm_(part.parameters(), max_norm)
            optimizer.step()
    return STEPS


WAYS = [never_clipping, clipping_by_value, lbfgs, joint_norm, accumulating, two_optimizers]

parser = argparse.ArgumentParser()
parser.add_argument("way", choices=[way.__name__ for way in WAYS])
parser.add_argument("--out")
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()

torch.manual_seed(options.seed)
network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
updates = next(way for way in WAYS if way.__name__ == options.way)(network)
torch.save({"weights": network.state_dict(), "updates": updates}, options.out)
