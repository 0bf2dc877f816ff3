"""The norms of a result as rows by tensor, layer or clip group; ordered, and the tail folded into one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from gradscope import results
from gradscope.roles import role_of
from gradscope.spread import Spread
from gradscope.views.choices import By, Sort

# A default table ends where it has shown this share of the squared norm, or that many rows.
ENOUGH_SHARE = 0.99
MOST_ROWS = 12


@dataclass(frozen=True, slots=True)
class NormRow:
    """One tensor, layer or clip group, or several folded into one.  ``norm`` is the median, recent or weight norm.

    ``steps`` is how many steps the numbers are over.  What is not known is None.
    """

    name: str
    norm: float | None
    share: float | None
    numel: int | None = None
    spread: Spread | None = None
    tensor: results.TensorNorm | results.TensorWeights | None = None
    mean_norm: float | None = None
    consistency: float | None = None
    update_ratio: float | None = None
    steps: int | None = None
    noise_scale: results.NoiseScale | None = None
    mean_cosine: float | None = None


def gradient_rows(
    gradients: results.GradientSummary, by: By, batch: results.MinibatchNoise | None = None
) -> list[NormRow]:
    """The gradients' rows, in the order of the source; ``batch`` is what its minibatches tell of signal and noise."""
    noise: dict[str, results.NoiseScale] = {}
    cosines: dict[str, float | None] = {}
    if batch is not None and by != "tensor":
        noise = {entry.name: entry.noise_scale for entry in (batch.layers if by == "layer" else batch.groups)}
        cosines = {layer.name: layer.mean_cosine for layer in batch.layers} if by == "layer" else {}
    entries: Sequence[results.TensorNorm | results.LayerNorm | results.GroupNorm]
    entries = gradients.tensors if by == "tensor" else gradients.layers if by == "layer" else gradients.groups
    return [
        NormRow(
            entry.name,
            entry.l2_norm.p50,
            entry.share,
            entry.numel,
            entry.l2_norm,
            entry if isinstance(entry, results.TensorNorm) else None,
            update_ratio=None if isinstance(entry, results.GroupNorm) else entry.update_ratio,
            steps=entry.steps,
            noise_scale=noise.get(entry.name),
            mean_cosine=cosines.get(entry.name),
        )
        for entry in entries
    ]


def optimizer_rows(optimizer: results.OptimizerReport, by: By) -> list[NormRow]:
    """What an optimizer knows of each tensor, layer or clip group, as far as its state holds a norm."""
    if by == "layer":
        return _by_layer(optimizer.tensors)
    entries: Sequence[results.OptimizerTensor | results.OptimizerGroup]
    entries = optimizer.tensors if by == "tensor" else optimizer.groups
    return [
        NormRow(
            entry.name,
            entry.recent_norm,
            entry.share,
            mean_norm=entry.mean_norm,
            consistency=entry.consistency,
        )
        for entry in entries
        if entry.recent_norm is not None
    ]


def _by_layer(tensors: Iterable[results.OptimizerTensor]) -> list[NormRow]:
    layers: dict[str, list[results.OptimizerTensor]] = {}
    for tensor in tensors:
        if tensor.recent_norm is not None:
            layers.setdefault(tensor.name.rsplit(".", 1)[0], []).append(tensor)
    rows = []
    for name, members in layers.items():
        means = [member.mean_norm for member in members if member.mean_norm is not None]
        rows.append(
            NormRow(
                name,
                math.hypot(*(_known(member.recent_norm) for member in members)),
                math.fsum(_known(member.share) for member in members),
                mean_norm=math.hypot(*means) if len(means) == len(members) else None,
                consistency=members[0].consistency if len(members) == 1 else None,
            )
        )
    return rows


def weight_rows(weights: results.WeightSummary, by: By) -> list[NormRow]:
    """The weights' rows; a clip group has no weights of its own, so by group there is one row."""
    if by == "group":
        return [NormRow("all weights", weights.global_.l2_norm, 1.0, weights.global_.numel)]
    entries: Sequence[results.TensorWeights | results.LayerWeights]
    entries = weights.tensors if by == "tensor" else weights.layers
    total = weights.global_.l2_norm
    return [
        NormRow(
            entry.name,
            entry.l2_norm,
            (entry.l2_norm / total) ** 2 if total > 0 and entry.l2_norm <= total else math.nan if total != 0 else 0.0,
            entry.numel,
            tensor=entry if isinstance(entry, results.TensorWeights) else None,
        )
        for entry in entries
    ]


def ordered(rows: list[NormRow], sort: Sort) -> list[NormRow]:
    """``rows`` by ``sort``: largest first, names in alphabetical order; NaN in front, since it matters most."""
    if sort == "order":
        return rows
    if sort == "name":
        return sorted(rows, key=lambda row: row.name)

    def size(row: NormRow) -> float:
        if row.steps == 0:
            return -1.0
        value = row.share if sort == "share" else row.norm
        return math.inf if value is None or math.isnan(value) else value

    return sorted(rows, key=size, reverse=True)


def shown_and_folded(rows: list[NormRow], top: int | None, by: By) -> tuple[list[NormRow], NormRow | None]:
    """The rows to show, and the others as one; of the default selection a single row is never folded."""
    keep = _enough(rows) if top is None else top
    if top is None and len(rows) - keep == 1:
        keep += 1
    return rows[:keep], _folded(rows[keep:], by) if rows[keep:] else None


def _enough(rows: Sequence[NormRow]) -> int:
    """How many rows hold nearly all of the squared norm, where they are sorted by it; at most MOST_ROWS."""
    shares = [_known(row.share) for row in rows]
    descending = all(share >= following for share, following in pairwise(shares))
    shown = 0.0
    for number, share in enumerate(shares[:MOST_ROWS], start=1):
        shown += share
        if descending and shown >= ENOUGH_SHARE:
            return number
    return min(len(rows), MOST_ROWS)


def _folded(rows: Sequence[NormRow], by: By) -> NormRow:
    """``rows`` as one: ``3 actor layers`` where all are the actor's, else ``12 more layers``.

    Norms of one moment combine; medians of several steps do not.
    """
    roles = {role_of(row.name) for row in rows}
    kind = (roles.pop() if len(roles) == 1 else None) or "more"
    combines = all(row.spread is None or row.spread.min == row.spread.max for row in rows)
    numels = [row.numel for row in rows if row.numel is not None]
    return NormRow(
        name=f"{len(rows):,} {kind} {by}{'s' * (len(rows) > 1)}",
        norm=math.hypot(*(_known(row.norm) for row in rows)) if combines else None,
        share=math.fsum(_known(row.share) for row in rows),
        numel=sum(numels) if len(numels) == len(rows) else None,
    )


def _known(value: float | None) -> float:
    return math.nan if value is None else value
