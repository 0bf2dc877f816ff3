"""Several hypotheses tested at once, so that all of them together are seldom wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence


def holm(probabilities: Sequence[float], level: float) -> list[bool]:
    """Which of several hypotheses fall at ``level`` for all of them together (Holm 1979); NaN: not tested.

    ``probabilities`` are those of what was seen, or of more, if the hypothesis is true.
    """
    tested = sorted((p, i) for i, p in enumerate(probabilities) if not math.isnan(p))
    fall = [False] * len(probabilities)
    for done, (p, i) in enumerate(tested):
        if p > level / (len(tested) - done):
            break
        fall[i] = True
    return fall
