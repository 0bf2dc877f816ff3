"""Training in float16: with a loss scale, without one, and with a clip that comes too early."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

POINTS, BATCH = 256, 128
Order = Literal["unscale, clip", "clip, unscale"]


class Autoencoder(nn.Module):
    """Eight numbers in the middle, from which everything is restored."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(POINTS, 64), nn.GELU(), nn.Linear(64, 8))
        self.decoder = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, POINTS))

    def forward(self, fields: Tensor) -> Tensor:
        return self.decoder(self.encoder(fields))  # type: ignore[no-any-return]


class Fields:
    """Displacements in metres, of about a centimetre, at each of many points.

    Small inputs, small errors, and a mean over all points of all fields: in float32 that trains well.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.modes = 0.01 * torch.randn(8, POINTS, generator=self.generator)

    def batch(self) -> Tensor:
        """float32 [BATCH, POINTS]."""
        return torch.randn(BATCH, 8, generator=self.generator) @ self.modes / math.sqrt(8)


def autocast_unscaled(seed: int) -> None:
    """``autocast(float16)`` and no ``GradScaler``."""
    fields, model = Fields(seed), Autoencoder()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(80):
        optimizer.zero_grad()
        _loss(model, fields.batch()).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def weights_in_half(seed: int) -> None:
    """``model.half()``: weights and gradients in float16, SGD, no loss scale."""
    fields, model = Fields(seed), Autoencoder().half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(80):
        batch = fields.batch().half()
        optimizer.zero_grad()
        functional.mse_loss(model(batch), batch).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def scaled(seed: int, order: Order = "unscale, clip") -> None:
    """``autocast(float16)`` with a ``GradScaler``."""
    fields, model = Fields(seed), Autoencoder()
    optimizer, scaler = torch.optim.Adam(model.parameters(), lr=1e-3), torch.amp.GradScaler("cpu")
    for _ in range(80):
        optimizer.zero_grad()
        scaler.scale(_loss(model, fields.batch())).backward()  # type: ignore[no-untyped-call]
        if order == "unscale, clip":
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()


def clipped_before_unscale(seed: int) -> None:
    """The clip stands before ``scaler.step``, and nothing calls ``unscale_``."""
    scaled(seed, "clip, unscale")


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.float16):
        restored = model(batch)
    return functional.mse_loss(restored.float(), batch)
