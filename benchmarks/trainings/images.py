"""Plain and residual stacks and a small convolutional network on classes that can be learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

FEATURES, CLASSES, SIDE = 32, 8, 12


@dataclass(frozen=True)
class Clusters:
    """Points around a centre for each class."""

    centres: Tensor
    generator: torch.Generator

    @classmethod
    def drawn(cls, seed: int, shape: tuple[int, ...] = (FEATURES,)) -> Clusters:
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.randn(CLASSES, *shape, generator=generator), generator)

    def batches(self, steps: int, size: int = 64, noise: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
        """Points, and int64 [size] of which class they are."""
        for _ in range(steps):
            classes = torch.randint(0, CLASSES, (size,), generator=self.generator)
            points = self.centres[classes]
            yield points + noise * torch.randn(points.shape, generator=self.generator), classes


class Residual(nn.Module):
    """x + W relu(norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(functional.relu(self.norm(x)))  # type: ignore[no-any-return]


def stack(depth: int, activation: type[nn.Module], width: int = 64) -> nn.Sequential:
    """``depth`` linear layers with torch's own initialisation, the activation between them."""
    layers: list[nn.Module] = [nn.Linear(FEATURES, width), activation()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def no_normalisation(seed: int) -> None:
    """Fifty linear layers and ReLUs."""
    _classify(seed, stack(50, nn.ReLU))


def sigmoid_stack(seed: int) -> None:
    """Fifteen linear layers and sigmoids."""
    _classify(seed, stack(15, nn.Sigmoid))


def dead_relu_bias(seed: int) -> None:
    """The biases of one layer start far below zero: none of its units ever fires."""
    model = stack(4, nn.ReLU)
    nn.init.constant_(model[2].bias, -20.0)  # type: ignore[arg-type]
    _classify(seed, model)


def dead_relu_most(seed: int) -> None:
    """Three quarters of the units of every layer start far below zero."""
    model = stack(4, nn.ReLU)
    for name, parameter in list(model.named_parameters())[:-2]:
        if name.endswith("bias"):
            nn.init.constant_(parameter[:48], -20.0)
    _classify(seed, model)


def dead_relu_rate(seed: int) -> None:
    """Targets of about fifty, as they come, and SGD at a learning rate whose steps push unit after unit below zero."""
    model = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=20.0, momentum=0.9)
    for points, classes in Clusters.drawn(seed).batches(400):
        targets = 50.0 + 5.0 * classes[:, None]
        _update(model, optimizer, functional.mse_loss(model(points), targets), 1.0)


def residual(seed: int) -> None:
    """Fifty layers as they are built: residual, with LayerNorm."""
    blocks = [Residual(64) for _ in range(48)]
    _classify(seed, nn.Sequential(nn.Linear(FEATURES, 64), *blocks, nn.LayerNorm(64), nn.Linear(64, CLASSES)), steps=80)


def mlp(seed: int) -> None:
    """Three linear layers and ReLUs, Adam."""
    _classify(seed, stack(3, nn.ReLU), steps=300)


def mlp_deeper(seed: int) -> None:
    """Eight linear layers and ReLUs, initialised for ReLU (He et al. 2015)."""
    model = stack(8, nn.ReLU)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    _classify(seed, model)


def momentum(seed: int) -> None:
    """Three linear layers and ReLUs, SGD with momentum, not clipped."""
    model = stack(3, nn.ReLU)
    _classify(seed, model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), max_norm=None, steps=300)


def convolutional(seed: int) -> None:
    """Three convolutions with BatchNorm, SGD with momentum."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 16), (16, 32)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 4, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for points, classes in Clusters.drawn(seed, (1, SIDE, SIDE)).batches(150, noise=2.0):
        _update(model, optimizer, functional.cross_entropy(model(points), classes), None)


def _classify(
    seed: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    max_norm: float | None = 1.0,
    steps: int = 150,
) -> None:
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=1e-3)
    for points, classes in Clusters.drawn(seed).batches(steps):
        _update(model, optimizer, functional.cross_entropy(model(points), classes), max_norm)


def _update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, max_norm: float | None) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
