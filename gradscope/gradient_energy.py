"""One parameter's optimizer state -> the energy of its recent gradients.  Every formula of the forensics is here.

An adaptive optimizer averages the squared gradient element by element.  Summed over the elements that is an average of
‖g‖², the gradient's energy, over the last steps; the average of the gradient itself gives the norm of its mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from gradscope.optimizer_state import ParameterState, StoredMoment

COARSE_DTYPES = frozenset({"bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"})
DECOUPLED_WEIGHT_DECAY = frozenset({"AdamW", "Adafactor", "Lion", "Muon"})
OF_ITS_PARAMETERS_SHAPE = frozenset(
    {"exp_avg", "exp_avg_sq", "square_avg", "grad_avg", "sum", "variance", "momentum_buffer"}
)
# Below this many steps the first gradient outweighs the rest of exp_avg, and noise alone gives more than f.
LARGEST_TAIL_FOR_CONSISTENCY = 0.1

NO_STEP = "the optimizer has taken no step on it"
NO_ENERGY = {
    "Adamax": "Adamax keeps the largest recent gradient of each element, not a mean of squares",
    "Lion": "Lion keeps a mean gradient only, no squared gradients",
    "Muon": "Muon keeps a momentum buffer only, no squared gradients",
    "8-bit": "8-bit optimizer states are quantised block by block and hold no exact squared gradients",
    "SparseAdam": "SparseAdam averages each row over its own steps",
    "Rprop": "Rprop keeps step sizes and gradient signs, no squared gradients",
    "ASGD": "ASGD averages the weights, not the gradients",
    "LBFGS": "LBFGS keeps differences of gradients, no squared gradients",
    "damaged": "its state is damaged: state and param_groups are not what PyTorch writes",
    "unknown": "its state is of no optimizer that gradscope knows",
}


@dataclass(frozen=True, slots=True)
class GradientEnergy:
    """What one parameter's optimizer state says about its recent gradients.

    ``recent`` is the weighted mean of ‖g‖² and ``mean`` the squared norm of the weighted mean of g, over ``window``
    and ``mean_window`` steps; ``noise_floor`` is the m²/r² that independent noise alone would give, and None where it
    cannot be told.  ``momentum`` is the squared norm of a momentum buffer.  Where ``recent`` is None, ``unavailable``
    says why.  ``rounding`` bounds the error of ``recent`` where a starting value was subtracted.  ``weighting`` tells
    apart averages that weigh the steps differently.
    """

    recent: float | None = None
    rounding: float = 0.0
    mean: float | None = None
    momentum: float | None = None
    window: float | None = None
    mean_window: float | None = None
    noise_floor: float | None = None
    weighting: tuple[str, float, float | None] | None = None
    unavailable: str | None = None
    qualifications: tuple[str, ...] = ()


class _UntoldError(Exception):
    """The state lacks what a formula needs."""


def gradient_energy(optimizer: str, parameter: ParameterState, group: Mapping[str, Any]) -> GradientEnergy:
    """The energy of ``parameter``'s recent gradients, as an optimizer of type ``optimizer`` keeps it.

    ``group`` holds the hyper-parameters.  Never raises: what the state does not hold is None, with the reason.
    """
    rule = _RULES.get(optimizer)
    if rule is None:
        reason = NO_ENERGY.get(optimizer, f"{optimizer} is not an optimizer whose state gradscope knows how to read")
        return GradientEnergy(unavailable=reason)
    if not parameter.moments and optimizer != "SGD":
        return GradientEnergy(unavailable=NO_STEP)
    try:
        return rule(optimizer, parameter, group)
    except _UntoldError as untold:
        return GradientEnergy(unavailable=str(untold))


@dataclass(frozen=True, slots=True)
class _Average:
    """An exponential average after ``steps`` updates with decay ``decay``; ``tail`` is decay**steps.

    ``steps`` is None where the file does not tell it: the average is then taken to have forgotten its start.
    """

    decay: float
    steps: float | None

    @property
    def tail(self) -> float:
        return 0.0 if self.steps is None else self.decay**self.steps

    @property
    def weight(self) -> float:
        """The sum of all the weights that gradients have received: Adam's bias correction."""
        return 1.0 - self.tail

    @property
    def window(self) -> float:
        """Over about how many steps the average runs, once it has taken that many: 1000 at 0.999, not 999.999…."""
        return float(1 / (1 - Fraction(str(self.decay))))

    @property
    def noise_floor(self) -> float | None:
        """(1 − β)/(1 + β): the sum of the squared weights, which is what averaging leaves of independent noise."""
        if self.decay == 0.0 or self.tail > LARGEST_TAIL_FOR_CONSISTENCY:
            return None
        return (1.0 - self.decay) / (1.0 + self.decay)


def _adam(optimizer: str, parameter: ParameterState, group: Mapping[str, Any]) -> GradientEnergy:
    """exp_avg_sq and exp_avg, each divided by its bias correction (Kingma & Ba 2015, algorithm 1).

    NAdam corrects exp_avg differently when it updates, but keeps the same average.
    """
    square = _moment(parameter, "exp_avg_sq")
    beta1, beta2 = _betas(group)
    squares, means = _Average(beta2, _steps(parameter)), _Average(beta1, _steps(parameter))
    mean = None
    if "exp_avg" in parameter.moments:
        mean = _moment(parameter, "exp_avg").spectrum.sum_squares / means.weight**2
    return GradientEnergy(
        recent=square.spectrum.sum_abs_total / squares.weight,
        mean=mean,
        window=squares.window,
        mean_window=None if mean is None else means.window,
        noise_floor=None if mean is None else means.noise_floor,
        weighting=("exponential", beta2, parameter.step),
        qualifications=_qualifications(optimizer, parameter, group, square),
    )


def _adamax(optimizer: str, parameter: ParameterState, group: Mapping[str, Any]) -> GradientEnergy:
    means = _Average(_betas(group)[0], _steps(parameter))
    first = _moment(parameter, "exp_avg")
    return GradientEnergy(
        mean=first.spectrum.sum_squares / means.weight**2,
        mean_window=means.window,
        unavailable=NO_ENERGY["Adamax"],
        qualifications=_qualifications(optimizer, parameter, group, first),
    )


def _rmsprop(optimizer: str, parameter: ParameterState, group: Mapping[str, Any]) -> GradientEnergy:
    """(Σ square_avg − αᵗ·N·start)/(1 − αᵗ): PyTorch starts square_avg at zeros, SB3's RMSpropTFLike at ones."""
    square = _moment(parameter, "square_avg")
    average = _Average(_decay(group, "rho" if optimizer == "Adadelta" else "alpha"), _steps(parameter))
    start = 1.0 if optimizer == "RMSpropTFLike" else 0.0
    left_of_start = start * average.tail * math.prod(square.shape)
    energy = (square.spectrum.sum_abs_total - left_of_start) / average.weight
    mean = None
    if "grad_avg" in parameter.moments:
        mean = _moment(parameter, "grad_avg").spectrum.sum_squares / average.weight**2
    return GradientEnergy(
        recent=max(energy, 0.0),
        rounding=left_of_start / average.weight * _rounding(square, parameter.step),
        mean=mean,
        window=average.window,
        mean_window=None if mean is None else average.window,
        noise_floor=None if mean is None else average.noise_floor,
        weighting=("exponential", average.decay, parameter.step),
        qualifications=_qualifications(optimizer, parameter, group, square),
    )


def _adagrad(optimizer: str, parameter: ParameterState, group: Mapping[str, Any]) -> GradientEnergy:
    """(Σ sum − N·start)/t: Adagrad adds up the squares of all its steps (Duchi et al. 2011)."""
    total = _moment(parameter, "sum")
    steps = _steps(parameter)
    start = _number(group, "initial_accumulator_value", default=0.0)
    if steps is None:
        raise _UntoldError("the number of steps behind Adagrad's sum is not stored")
    energy = (total.spectrum.sum_abs_total - start * math.prod(total.shape)) / steps
    return GradientEnergy(
        recent=max(energy, 0.0),
        window=steps,
        weighting=("uniform", 1.0, steps),
        qualifications=_qualifications(optimizer, parameter, group, total),
    )


def _adafactor(optimizer: str, parameter: ParameterState, group: Mapping[str, Any]) -> GradientEnergy:
    """Row means of g² times the number of columns (Shazeer & Stern 2018); PyTorch's and Hugging Face's layouts.

    Its decay at step t is 1 − t^c (c = −0.8), which is 0 at the first step, so no bias is left.  Hugging Face adds
    eps₁ to each square.
    """
    steps = _steps(parameter)
    if steps is None:
        raise _UntoldError("the number of steps behind Adafactor's averages is not stored")
    key = "beta2_decay" if "beta2_decay" in group else "decay_rate"
    exponent = _number(group, key, default=-0.8)
    if not -1.0 <= exponent <= 0.0:
        raise _UntoldError(f"its {key} is not a number from -1 to 0")
    rows = parameter.moments.get("row_var") or parameter.moments.get("exp_avg_sq_row")
    if rows is not None:
        columns = _moment(parameter, "col_var" if "row_var" in parameter.moments else "exp_avg_sq_col").shape
        factor, square = (columns[-1] if columns else 1), _finite(rows, "the row means")
    else:
        factor, square = 1, _moment(parameter, "variance" if "variance" in parameter.moments else "exp_avg_sq")
    added = _first_eps(group) * math.prod(square.shape) if "decay_rate" in group else 0.0
    return GradientEnergy(
        recent=max(0.0, square.spectrum.sum_abs_total - added) * factor,
        window=steps**-exponent,
        weighting=("adafactor", exponent, steps),
        qualifications=_qualifications(optimizer, parameter, group, square),
    )


def _sgd(optimizer: str, parameter: ParameterState, group: Mapping[str, Any]) -> GradientEnergy:
    if "momentum_buffer" not in parameter.moments:
        return GradientEnergy(unavailable="SGD without momentum keeps nothing of its gradients")
    buffer = _moment(parameter, "momentum_buffer")
    return GradientEnergy(
        momentum=buffer.spectrum.sum_squares,
        unavailable="SGD keeps a momentum buffer only, no squared gradients",
        qualifications=_qualifications(optimizer, parameter, group, buffer),
    )


_RULES: dict[str, Callable[[str, ParameterState, Mapping[str, Any]], GradientEnergy]] = {
    "Adam": _adam,
    "AdamW": _adam,
    "NAdam": _adam,
    "RAdam": _adam,
    "Adamax": _adamax,
    "RMSprop": _rmsprop,
    "RMSpropTFLike": _rmsprop,
    "Adadelta": _rmsprop,
    "Adagrad": _adagrad,
    "Adafactor": _adafactor,
    "SGD": _sgd,
}


# --- what the formulas need of the file ------------------------------------------------------------------------------


def _moment(parameter: ParameterState, key: str) -> StoredMoment:
    moment = parameter.moments.get(key)
    if moment is None:
        raise _UntoldError(f"its state holds no {key}")
    shape = parameter.shape
    # Sharded training stores its state flat.
    if shape is not None and moment.shape not in (shape, (math.prod(shape),)) and key in OF_ITS_PARAMETERS_SHAPE:
        raise _UntoldError(
            f"it is damaged: {key} of {parameter.name} has the shape {moment.shape}, the parameter has {shape}"
        )
    return _finite(moment, key)


def _finite(moment: StoredMoment, key: str) -> StoredMoment:
    if moment.spectrum.nonfinite:
        raise _UntoldError(f"{key} holds {moment.spectrum.nonfinite:,} NaN or infinite elements")
    if moment.negative:
        raise _UntoldError(f"it is damaged: {key} holds negative numbers, which means of squares never are")
    return moment


def _steps(parameter: ParameterState) -> float | None:
    if parameter.step is None:
        return None
    if not (math.isfinite(parameter.step) and parameter.step >= 1):
        raise _UntoldError(NO_STEP)
    return parameter.step


def _betas(group: Mapping[str, Any]) -> tuple[float, float]:
    betas = group.get("betas")
    if not isinstance(betas, (tuple, list)) or len(betas) < 2:
        raise _UntoldError("its betas are not stored")
    return _decay_rate(betas[0], "betas"), _decay_rate(betas[1], "betas")


def _decay(group: Mapping[str, Any], key: str) -> float:
    return _decay_rate(group.get(key), key)


def _decay_rate(value: object, key: str) -> float:
    if not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise _UntoldError(f"its {key} are not stored as numbers from 0 to 1")
    return float(value)


def _number(group: Mapping[str, Any], key: str, default: float) -> float:
    value = group.get(key, default)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _UntoldError(f"its {key} is not stored as a number")
    return float(value)


def _first_eps(group: Mapping[str, Any]) -> float:
    eps = group.get("eps")
    first = eps[0] if isinstance(eps, (tuple, list)) and eps else None
    return float(first) if isinstance(first, (int, float)) else 0.0


def _rounding(moment: StoredMoment, steps: float | None) -> float:
    """Bound on the relative rounding error of a value that was multiplied by a rounded decay once a step."""
    unit = 2.0**-53 if moment.dtype == "float64" else 2.0**-24
    return 3.0 * (steps or 0.0) * unit


# --- where a formula's premise fails ---------------------------------------------------------------------------------


def _qualifications(
    optimizer: str, parameter: ParameterState, group: Mapping[str, Any], moment: StoredMoment
) -> tuple[str, ...]:
    said = []
    if decay := _coupled_weight_decay(optimizer, group):
        said.append(
            f"Weight decay {decay:g} is added to the gradient before {optimizer} averages it, so the norms include it"
        )
    if moment.dtype in COARSE_DTYPES:
        said.append(
            f"The optimizer state is {moment.dtype}, too coarse to average over many steps, so the norms are rough"
        )
    if parameter.step is None and optimizer not in ("SGD", "Lion", "Muon"):
        said.append("The step count is not stored, so the norms are too low if few steps were taken")
    return tuple(said)


def _coupled_weight_decay(optimizer: str, group: Mapping[str, Any]) -> float:
    decay = group.get("weight_decay", 0.0)
    if optimizer in DECOUPLED_WEIGHT_DECAY or group.get("decoupled_weight_decay") is True:
        return 0.0
    return float(decay) if isinstance(decay, (int, float)) else 0.0
