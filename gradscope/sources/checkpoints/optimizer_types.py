"""Which optimizer wrote a state: PyTorch does not store the class, but its keys give it away."""

from __future__ import annotations

from collections.abc import Collection

UNKNOWN = "unknown"
DAMAGED = "damaged"

# Keys that mark a state, or the hyper-parameters beside it, as one optimizer's: the first match counts.
_STATE_MARKS: tuple[tuple[str, str], ...] = (
    ("absmax1", "8-bit"),
    ("state1", "8-bit"),
    ("mu_product", "NAdam"),
    ("exp_inf", "Adamax"),
    ("row_var", "Adafactor"),
    ("variance", "Adafactor"),
    ("exp_avg_sq_row", "Adafactor"),
    ("acc_delta", "Adadelta"),
    ("square_avg", "RMSprop"),
    ("sum", "Adagrad"),
    ("step_size", "Rprop"),
    ("ax", "ASGD"),
    ("func_evals", "LBFGS"),
)
_HYPER_MARKS: tuple[tuple[str, str], ...] = (
    ("ns_steps", "Muon"),
    ("use_muon", "Muon"),
    ("momentum_decay", "NAdam"),
    ("decay_rate", "Adafactor"),
    ("beta2_decay", "Adafactor"),
    ("rho", "Adadelta"),
    ("lambd", "ASGD"),
    ("alpha", "RMSprop"),
    ("lr_decay", "Adagrad"),
    ("etas", "Rprop"),
    ("tolerance_grad", "LBFGS"),
)
# All that Adam, AdamW, RAdam and their fused forms keep.  Another key means another optimizer with another average.
_ADAM_STATE = frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param"})
# apex and DeepSpeed name this one; it concerns their update, not their averages.
_ADAM_ONLY = frozenset({"amsgrad", "fused", "bias_correction", "correct_bias"})


def optimizer_type(state_keys: Collection[str], hyper: Collection[str], decoupled: bool) -> str:
    """The optimizer's class name in PyTorch's spelling, ``"8-bit"`` for quantised states, else ``"unknown"``.

    ``state_keys`` are the keys of any parameter's state, ``hyper`` those of its parameter group; ``decoupled`` is the
    group's ``decoupled_weight_decay``.
    """
    for key, name in _STATE_MARKS:
        if key in state_keys:
            return name
    for key, name in _HYPER_MARKS:
        if key in hyper:
            return name
    if "betas" in hyper:
        return _adam_like(frozenset(state_keys), frozenset(hyper), decoupled)
    if "momentum" in hyper and "dampening" in hyper:
        return "SGD"
    return UNKNOWN


def _adam_like(state_keys: frozenset[str], hyper: frozenset[str], decoupled: bool) -> str:
    if state_keys and "exp_avg_sq" not in state_keys:
        return "Lion" if state_keys <= {"exp_avg", "step"} else UNKNOWN
    if not state_keys <= _ADAM_STATE:
        return UNKNOWN
    if not hyper & _ADAM_ONLY and "decoupled_weight_decay" in hyper:
        return "RAdam"
    # Hugging Face's own AdamW, decoupled like PyTorch's, is the only one with this hyper-parameter.
    return "AdamW" if decoupled or "correct_bias" in hyper else "Adam"


def class_name(text: object) -> str | None:
    """``"RMSpropTFLike"`` from ``"<class 'stable_baselines3...rmsprop_tf_like.RMSpropTFLike'>"``."""
    if not isinstance(text, str) or not text.startswith("<class '") or not text.endswith("'>"):
        return None
    return text[len("<class '") : -len("'>")].rsplit(".", 1)[-1] or None
