"""``depth-decay``: gradients that shrink from layer to layer on their way to the input."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradscope.check_results import Reading
from gradscope.health.embeddings import is_embedding
from gradscope.health.evidence import Evidence
from gradscope.health.rule import Limit, Limits, Rule, Verdict
from gradscope.health.typical_gradients import TypicalGradient, TypicalGradients, typical_gradients
from gradscope.notation import number

FEWEST_BLOCKS = 5


def judge(evidence: Evidence, limits: Limits) -> Verdict:
    """Fit a line to the log of each layer's gradient, along each chain of layers."""
    typical = typical_gradients(evidence)
    if typical.missing is not None:
        return Verdict.cannot_tell(typical.missing)
    chains = [chain for chain in _chains(typical) if len(chain.blocks) >= FEWEST_BLOCKS]
    if not chains:
        return Verdict.cannot_tell(f"no chain of at least {FEWEST_BLOCKS} layers with matrices that have a gradient")
    ratio, least_correlation = limits.number("ratio"), limits.number("min-correlation")
    fits = sorted((_fit(chain) for chain in chains), key=lambda fit: -fit.decay)
    readings = [_reading(typical, fit, ratio) for fit in fits]
    beyond = [
        reading
        for reading, fit in zip(readings, fits, strict=True)
        if fit.decay > ratio and fit.correlation >= least_correlation
    ]
    return Verdict.violated(beyond) if beyond else Verdict.well(readings[0])


@dataclass(frozen=True, slots=True)
class _Chain:
    """Layers that follow one another, from the input on; a block (of a transformer, say) counts as one."""

    name: str
    blocks: tuple[TypicalGradient, ...]


@dataclass(frozen=True, slots=True)
class _Fit:
    """``decay`` is how much smaller the line is at the first than at the last layer of ``chain``."""

    chain: _Chain
    decay: float
    correlation: float


def _chains(typical: TypicalGradients) -> list[_Chain]:
    matrices = [
        (place, tensor.name)
        for place, tensor in enumerate(typical.tensors)
        if len(tensor.shape) >= 2 and not is_embedding(tensor.name)
    ]
    return _divide(typical, matrices, 0)


def _divide(typical: TypicalGradients, members: Sequence[tuple[int, str]], level: int) -> list[_Chain]:
    """Chains by the part of the name before its ``level``-th number; too short a chain may hold longer ones."""
    chains: dict[str, dict[str, list[tuple[int, str]]]] = {}
    for place, name in members:
        prefix, block = _split(name, level)
        chains.setdefault(prefix, {}).setdefault(block, []).append((place, name))
    found: list[_Chain] = []
    for prefix, blocks in chains.items():
        typicals = [typical.together(name, [place for place, _ in blocks[name]]) for name in _from_the_input(blocks)]
        chain = _Chain(prefix, tuple(block for block in typicals if block.norm > 0.0))
        deeper = [member for block in blocks.values() for member in block if _numbers(member[1]) > level + 1]
        if len(chain.blocks) >= FEWEST_BLOCKS or not deeper:
            found.append(chain)
        else:
            found += _divide(typical, deeper, level + 1)
    return found


def _from_the_input(blocks: Iterable[str]) -> list[str]:
    """Those with a number in the order of that, since files may hold 10 before 2; others stay where they are."""
    numbers = {block: int(found[0]) for block in blocks if (found := re.search(r"\d+$", block)) is not None}
    numbered = iter(sorted(numbers, key=lambda block: numbers[block]))
    return [next(numbered) if block in numbers else block for block in blocks]


def _numbers(name: str) -> int:
    return len(list(re.finditer(r"\d+(?=\.)", name)))


def _split(name: str, level: int) -> tuple[str, str]:
    """What stands before the ``level``-th number that ends a part of a tensor's name, and up to it; else the module."""
    ends = list(re.finditer(r"\d+(?=\.)", name))
    module = name.rpartition(".")[0]
    if level >= len(ends):
        return module.rpartition(".")[0], module
    return name[: ends[level].start()].rstrip("."), name[: ends[level].end()]


def _fit(chain: _Chain) -> _Fit:
    logs = np.log([block.rms for block in chain.blocks])
    depth = len(logs) - 1
    exponent = theil_sen_slope(logs) * depth
    return _Fit(chain, math.exp(min(exponent, 700.0)), kendall_tau(logs))


def theil_sen_slope(values: NDArray[np.float64]) -> float:
    """The median of the slopes between all pairs of ``values`` (float64 [n], at 0, 1, 2 …); n ≥ 2.  Sen 1968."""
    i, j = np.triu_indices(len(values), 1)
    return float(np.median((values[j] - values[i]) / (j - i)))


def kendall_tau(values: NDArray[np.float64]) -> float:
    """Kendall's rank correlation of ``values`` (float64 [n]) with their order; n ≥ 2.  Kendall 1938."""
    i, j = np.triu_indices(len(values), 1)
    return float(np.sign(values[j] - values[i]).mean())


def _reading(typical: TypicalGradients, fit: _Fit, limit: float) -> Reading:
    blocks = fit.chain.blocks
    first, last = blocks[0], blocks[-1]
    per_layer = fit.decay ** (1.0 / (len(blocks) - 1))
    message = (
        f"From layer {last.name} back to {first.name} the gradient per element shrinks {number(fit.decay)} times over "
        f"{len(blocks)} layers, {number(per_layer)} times a layer"
    )
    if fit.decay <= 1.0:
        message = (
            f"From layer {last.name} back to {first.name}, over {len(blocks)} layers, the gradient does not shrink"
        )
    if fit.decay > limit:
        message += "; normalise the layers, add residual connections, or initialise them for their activation"
    return Reading(fit.decay, limit, first.name, typical.steps, f"{message}.")


DEPTH_DECAY = Rule(
    name="depth-decay",
    severity="error",
    about="Gradients shrink from layer to layer on their way to the input.",
    formula=(
        "exp(slope * (layers - 1)), slope = Theil-Sen slope of the log of the root mean square of each layer's "
        "gradient (median over the steps) along a chain of at least 5 layers or blocks with matrices, where Kendall's "
        "tau with the depth is at least min-correlation"
    ),
    source=(
        "Glorot & Bengio 2010, Understanding the difficulty of training deep feedforward neural networks; He et al. "
        "2015, Delving deep into rectifiers; Sen 1968, Estimates of the regression coefficient based on Kendall's tau"
    ),
    limits=(
        Limit("ratio", 1e4, "largest decay over the whole depth of a chain", least=1.0),
        Limit("min-correlation", 0.7, "smallest rank correlation with depth for which it counts", most=1.0),
    ),
    judge=judge,
)
