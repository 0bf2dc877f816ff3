"""The peer: what somebody who knows PyTorch writes to get the same figures from the same file.

    python benchmarks/torch_script.py FILE --max-norm 0.5 --clip-value 1e-4 1e-3 [--form plain|script|tuned]

Per layer and over all, what ``gradscope simulate`` reports of one step: the norm and, for each value threshold, how
many elements it clips, the factor that is left of the length, and the angle between the gradient before and after.
``plain`` is the first thing that comes to mind: ``clamp`` and ``cosine_similarity``.  ``script``, the default, takes
the cosine from ``torch.dot`` and the norms.  ``tuned`` reuses every buffer, too, which is as far as we could push it.
All convert to float32, for in bfloat16 neither norm nor angle would be right.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors import safe_open
from torch.nn.functional import cosine_similarity

Moments = tuple[float, float, int]
"""g·c and ‖c‖² of a gradient g and its clipped version c, and how many elements differ."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--max-norm", type=float, required=True)
    parser.add_argument("--clip-value", type=float, nargs="+", required=True)
    parser.add_argument("--form", choices=["plain", "script", "tuned"], default="script")
    options = parser.parse_args()

    clip = {"plain": clip_plainly, "script": clip_directly, "tuned": clip_in_buffers()}[options.form]
    squares: dict[str, float] = defaultdict(float)
    moments: dict[tuple[str, float], Moments] = defaultdict(lambda: (0.0, 0.0, 0))
    for name, gradient in gradients(options.file):
        layer = name.rsplit(".", 1)[0]
        norm = torch.linalg.vector_norm(gradient).item()
        squares[layer] += norm**2
        for value in options.clip_value:
            moments[layer, value] = add(moments[layer, value], clip(gradient, norm, value))
    print_table(squares, moments, options.max_norm, options.clip_value)


def gradients(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        names: Any = file.keys()
        for name in names:
            yield name, file.get_tensor(name).float()


def clip_plainly(gradient: torch.Tensor, norm: float, value: float) -> Moments:
    clipped = gradient.clamp(-value, value)
    cosine = cosine_similarity(gradient.flatten(), clipped.flatten(), dim=0).item()
    after = clipped.norm().item()
    return cosine * norm * after, after**2, int((gradient.abs() > value).sum())


def clip_directly(gradient: torch.Tensor, norm: float, value: float) -> Moments:
    clipped = gradient.clamp(-value, value)
    dot = torch.dot(gradient.flatten(), clipped.flatten()).item()
    return dot, torch.linalg.vector_norm(clipped).item() ** 2, int((gradient.abs() > value).sum())


def clip_in_buffers() -> Callable[[torch.Tensor, float, float], Moments]:
    buffer, differs = torch.empty(0), torch.empty(0, dtype=torch.bool)

    def clip(gradient: torch.Tensor, norm: float, value: float) -> Moments:
        nonlocal buffer, differs
        size = gradient.numel()
        if buffer.numel() < size:
            buffer, differs = torch.empty(size), torch.empty(size, dtype=torch.bool)
        flat = gradient.flatten()
        clipped = torch.clamp(flat, -value, value, out=buffer[:size])
        count = int(torch.count_nonzero(torch.ne(flat, clipped, out=differs[:size])))
        return torch.dot(flat, clipped).item(), torch.linalg.vector_norm(clipped).item() ** 2, count

    return clip


def add(one: Moments, other: Moments) -> Moments:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def print_table(
    squares: dict[str, float], moments: dict[tuple[str, float], Moments], max_norm: float, values: list[float]
) -> None:
    norm = math.sqrt(sum(squares.values()))
    print(f"norm {norm:.6g}, scale at max_norm {max_norm:g}: {min(1.0, max_norm / norm):.6g}")
    for value in values:
        total: Moments = (0.0, 0.0, 0)
        for layer in squares:
            total = add(total, moments[layer, value])
        print(f"clip_value {value:g}: {described(norm**2, total)}")
    for layer, own in squares.items():
        print(f"{layer} {math.sqrt(own):.6g} " + " | ".join(described(own, moments[layer, value]) for value in values))


def described(before: float, clipped: Moments) -> str:
    dot, after, count = clipped
    if before == 0.0:
        return "0 clipped"
    return f"{count} clipped, length {math.sqrt(after / before):.4f}, {angle(before, dot, after):.4f}°"


def angle(before: float, dot: float, after: float) -> float:
    if before == 0.0 or after == 0.0:
        return 0.0
    return math.degrees(math.acos(min(1.0, dot / math.sqrt(before * after))))


if __name__ == "__main__":
    main()
