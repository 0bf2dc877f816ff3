"""What Adam and AdamW store of a parameter, as far as their next update can be computed from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from gradscope.optimizer_state import AdamMoments
from gradscope.sources.checkpoints.stored_optimizer import StoredOptimizer, StoredParameter
from gradscope.sources.stored import StoredTensor, read


def adam_moments(
    optimizer: StoredOptimizer, parameter: StoredParameter, weight: StoredTensor | None
) -> AdamMoments | None:
    """The moments of ``parameter``, which has the values ``weight``.

    None where the update is another than that of PyTorch's ``Adam`` and ``AdamW``, or the file does not tell it: other
    optimizers, AMSGrad, ``maximize``, no bias correction, coupled weight decay without the weights.
    """
    group = optimizer.param_groups[parameter.param_group]
    hyper = _hyper_parameters(optimizer.type, group)
    first, second = parameter.moments.get("exp_avg"), parameter.moments.get("exp_avg_sq")
    if hyper is None or (hyper.weight_decay and weight is None) or (first is None) != (second is None):
        return None
    shape = parameter.shape if weight is None else weight.info.shape
    if first is not None and second is not None:
        if parameter.step is None or not first.info.shape == second.info.shape == shape:
            return None
        hyper = replace(hyper, exp_avg=partial(read, first), exp_avg_sq=partial(read, second), step=parameter.step)
    return hyper if weight is None else replace(hyper, weight=partial(read, weight))


def _hyper_parameters(optimizer: str, group: Mapping[str, Any]) -> AdamMoments | None:
    """The hyper-parameters, without the moments."""
    if optimizer not in ("Adam", "AdamW") or not _plain(group):
        return None
    betas = group.get("betas")
    if not isinstance(betas, tuple):
        return None
    numbers = (*betas, group.get("lr"), group.get("eps"), group.get("weight_decay", 0.0))
    if len(numbers) != 5 or not all(type(number) in (int, float) for number in numbers):
        return None
    beta1, beta2, lr, eps, decay = map(float, numbers)
    coupled = 0.0 if optimizer == "AdamW" else decay
    return AdamMoments(None, None, 0.0, lr, (beta1, beta2), eps, coupled)


def _plain(group: Mapping[str, Any]) -> bool:
    """Whether nothing asks for another update than that of the paper."""
    asked = group.get("amsgrad") or group.get("maximize")
    return not asked and group.get("bias_correction", True) is True and group.get("correct_bias", True) is True
