"""The table of policies: how each is written, its rule in one sentence, and which library or paper has it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Argument:
    """One number of a policy: above ``above`` (or equal, if ``inclusive``) and at most ``at_most``; finite always."""

    name: str
    default: float | None = None
    above: float = 0.0
    inclusive: bool = False
    at_most: float = math.inf

    def fault(self, value: float) -> str | None:
        """What is wrong with ``value``, in words, or None."""
        if not math.isfinite(value):
            return f"{self.name} must be a finite number"
        if value < self.above or (value == self.above and not self.inclusive):
            return f"{self.name} must be {'at least' if self.inclusive else 'above'} {self.above:g}"
        if value > self.at_most:
            return f"{self.name} must be at most {self.at_most:g}"
        return None


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """One row of the table."""

    name: str
    arguments: tuple[Argument, ...]
    rule: str
    as_in: str

    @property
    def usage(self) -> str:
        """How it is written: ``agc:LAMBDA[,EPS]``."""
        needed = [argument.name.upper() for argument in self.arguments if argument.default is None]
        optional = [f"[,{argument.name.upper()}]" for argument in self.arguments if argument.default is not None]
        return f"{self.name}:{','.join(needed)}{''.join(optional)}"


_MAX_NORM = (Argument("max_norm"),)

POLICIES: tuple[PolicyRule, ...] = (
    PolicyRule(
        "norm",
        _MAX_NORM,
        "one norm over each clip group; above max_norm the group is scaled down to it",
        "PyTorch clip_grad_norm_, SB3, rsl_rl, optax clip_by_global_norm, Keras global_clipnorm",
    ),
    PolicyRule("joint-norm", _MAX_NORM, "one norm over all tensors, whatever the clip groups", "rsl_rl up to 3.x"),
    PolicyRule("per-layer-norm", _MAX_NORM, "one norm per layer", "Keras clipnorm, applied per layer"),
    PolicyRule("per-tensor-norm", _MAX_NORM, "one norm per tensor", "Keras clipnorm"),
    PolicyRule(
        "value",
        (Argument("clip_value"),),
        "every element clamped to [-clip_value, clip_value]",
        "PyTorch clip_grad_value_, Keras clipvalue, optax clip",
    ),
    PolicyRule("block-rms", (Argument("rms"),), "per-tensor root mean square at most rms", "optax clip_by_block_rms"),
    PolicyRule(
        "agc",
        (Argument("lambda"), Argument("eps", default=1e-3, inclusive=True)),
        "norm of each output unit at most lambda times its weight norm, which counts as eps at least",
        "NFNets (Brock et al. 2021), optax adaptive_grad_clip",
    ),
    PolicyRule(
        "autoclip",
        (Argument("percentile", at_most=100.0),),
        "max_norm is this percentile of the norms so far, the step's own included",
        "AutoClip (Seetharaman et al. 2020)",
    ),
    PolicyRule(
        "zclip",
        (Argument("z"), Argument("alpha", default=0.97, at_most=math.nextafter(1.0, 0.0))),
        "norms more than z standard deviations above their moving mean are pulled towards it; never above 1.0",
        "ZClip (Kumar et al. 2025)",
    ),
    PolicyRule("skip", _MAX_NORM, "the whole step is dropped when a clip group's norm exceeds max_norm", "Megatron-LM"),
)
