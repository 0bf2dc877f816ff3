"""Policies with one fixed limit: clip by norm over whatever unit, and by root mean square."""

from __future__ import annotations

import numpy as np

from gradscope.clipping.layout import Level
from gradscope.clipping.policy import Convention, Factors, FloatArray, IntArray, ScalePolicy, limit_norm

_UNITS: dict[str, Level] = {
    "norm": "group",
    "joint-norm": "joint",
    "per-layer-norm": "layer",
    "per-tensor-norm": "tensor",
}


class ClipByNorm(ScalePolicy):
    """If ‖g‖ > υ then g ← υ g/‖g‖ (Pascanu, Mikolov, Bengio 2013), the norm taken over one unit.

    ``norm`` takes it over each clip group (PyTorch ``clip_grad_norm_``, optax ``clip_by_global_norm``, Keras
    ``global_clipnorm``), ``joint-norm`` over all tensors, ``per-layer-norm`` over each layer and ``per-tensor-norm``
    over each tensor (Keras ``clipnorm``).
    """

    __slots__ = ()

    @property
    def unit(self) -> Level:
        """What the policy's name says."""
        return _UNITS[self.name]

    def factors(self, norms: FloatArray, numel: IntArray, convention: Convention) -> Factors:
        """min(1, υ/n), by ``convention``."""
        return limit_norm(norms, self.arguments[0], convention)


class BlockRms(ScalePolicy):
    """g ← g/max(1, rms(g)/r) with rms(g) = ‖g‖/√numel (Shazeer and Stern 2018; optax ``clip_by_block_rms``).

    It is no rule of PyTorch's, so the factor is exact by either convention.
    """

    __slots__ = ()

    @property
    def unit(self) -> Level:
        """A block is a tensor."""
        return "tensor"

    def factors(self, norms: FloatArray, numel: IntArray, convention: Convention) -> Factors:
        """min(1, r/rms)."""
        rms = norms / np.sqrt(np.maximum(numel, 1))
        return limit_norm(rms, self.arguments[0], "exact")
