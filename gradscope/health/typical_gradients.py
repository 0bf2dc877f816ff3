"""How large the gradient of each tensor typically was: from the steps, or from what an optimizer remembers of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradscope.health.evidence import Evidence
from gradscope.tensors import TensorInfo, places_by_layer

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TypicalGradient:
    """Some tensors together: their gradient's L2 ``norm``, their number of elements, and the norm of their weights.

    ``norm`` is the median over the finite steps at which they had a gradient, or what an optimizer remembers: the root
    of the bias-corrected mean square.  ``weight`` is None where it is not known.  ``name`` is what they are called.
    """

    name: str
    norm: float
    numel: int
    weight: float | None = None

    @property
    def rms(self) -> float:
        """The root mean square of an element."""
        return self.norm / math.sqrt(self.numel)


@dataclass(frozen=True, slots=True, eq=False)
class TypicalGradients:
    """What ``typical_gradients`` read, or in ``missing`` why there is none.

    ``steps`` are the first and last step read, None for an optimizer's memory, whose ``recalled`` is true.
    ``tensors`` are those with a gradient, in module order.
    """

    tensors: tuple[TensorInfo, ...] = ()
    steps: tuple[int, int] | None = None
    recalled: bool = False
    missing: str | None = None
    _norms: FloatArray | None = None
    _weights: FloatArray | None = None

    @property
    def word(self) -> str:
        """What a norm of these is called."""
        return "recent" if self.recalled else "median"

    def together(self, name: str, places: Sequence[int]) -> TypicalGradient:
        """The tensors at ``places`` of ``tensors`` as one."""
        assert self._norms is not None and self._weights is not None
        there = ~np.isnan(self._norms[:, places]).all(axis=1)
        joint = np.sqrt(np.nansum(np.square(self._norms[there][:, places]), axis=1))
        weight = float(np.sqrt(np.square(self._weights[places]).sum()))
        numel = sum(self.tensors[place].numel for place in places)
        return TypicalGradient(name, float(np.median(joint)), numel, weight if math.isfinite(weight) else None)

    def by_layer(self) -> list[TypicalGradient]:
        """Each layer's, in module order."""
        return [self.together(name, places) for name, places in places_by_layer(self.tensors).items()]

    def shares(self) -> FloatArray:
        """Each tensor's share of the squared norm, float64 [steps, tensors]; steps without a gradient are left out."""
        assert self._norms is not None
        energy = np.square(np.nan_to_num(self._norms))
        totals = energy.sum(axis=1)
        told = (totals > 0.0) & np.isfinite(totals)
        return np.asarray(energy[told] / totals[told, None])


def typical_gradients(evidence: Evidence) -> TypicalGradients:
    """What ``evidence`` tells of each tensor's gradient, by its steps or, without those, by its optimizers' state.

    A step counts for the tensors that had a gradient at it; steps with NaN or Inf anywhere are left out.
    """
    if evidence.source.info.kind == "norm-log":
        return TypicalGradients(missing="a log of norms does not tell layers apart")
    if evidence.table is not None:
        return _of_steps(evidence)
    return _of_optimizers(evidence)


def _of_steps(evidence: Evidence) -> TypicalGradients:
    table = evidence.table
    assert table is not None
    rows = np.flatnonzero(evidence.finite)
    sizes = np.array([tensor.numel for tensor in evidence.tensors])
    places = np.flatnonzero(table.present[rows].any(axis=0) & (sizes > 0))
    if not len(rows):
        return TypicalGradients(missing="every step holds NaN or Inf")
    if not len(places):
        return TypicalGradients(missing="no tensor had a gradient")
    norms = np.sqrt(table.energy[np.ix_(rows, places)])
    norms[~table.present[np.ix_(rows, places)]] = math.nan
    tensors = tuple(evidence.tensors[place] for place in places)
    return TypicalGradients(
        tensors=tensors, steps=evidence.steps_of(rows), _norms=norms, _weights=_weight_norms(evidence, places)
    )


def _weight_norms(evidence: Evidence, places: NDArray[np.int64]) -> FloatArray:
    """The weights' norms of the tensors at ``places``, NaN where not known."""
    table = evidence.table
    if table is not None and table.weight_norm is not None:
        measured = table.weight_norm[:, places]
        known = ~np.isnan(measured).all(axis=0)
        norms = np.full(len(places), math.nan)
        norms[known] = np.nanmedian(measured[:, known], axis=0)
        return norms
    known_norms = _checkpoint_weights(evidence)
    return np.array([known_norms.get(evidence.tensors[place].name, math.nan) for place in places])


def _checkpoint_weights(evidence: Evidence) -> Mapping[str, float]:
    if evidence.weights is None:
        return {}
    pairs = zip(evidence.weights.tensors, evidence.weights.spectra, strict=True)
    return {tensor.name: spectrum.norm if not spectrum.nonfinite else math.nan for tensor, spectrum in pairs}


def _of_optimizers(evidence: Evidence) -> TypicalGradients:
    if not evidence.reports:
        return TypicalGradients(missing="the source holds neither gradients nor optimizer state")
    remembered = {
        tensor.name: tensor.recent_norm
        for report in evidence.reports
        for tensor in report.tensors
        if tensor.recent_norm is not None
    }
    shapes = {
        parameter.name: parameter.shape
        for state in evidence.optimizers
        for parameter in state.parameters
        if parameter.shape is not None
    }
    tensors = tuple(TensorInfo(name, shapes[name], "") for name in remembered if name in shapes)
    tensors = tuple(tensor for tensor in tensors if tensor.numel)
    if not tensors:
        why = next((report.unavailable for report in evidence.reports if report.unavailable), None)
        return TypicalGradients(missing=f"the optimizer does not tell the size of its gradients{_because(why)}")
    weights = _checkpoint_weights(evidence)
    return TypicalGradients(
        tensors=tensors,
        recalled=True,
        _norms=np.array([[remembered[tensor.name] for tensor in tensors]], dtype=np.float64),
        _weights=np.array([weights.get(tensor.name, math.nan) for tensor in tensors]),
    )


def _because(why: str | None) -> str:
    return f": {why}" if why else ""
