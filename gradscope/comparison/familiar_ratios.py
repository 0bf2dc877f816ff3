"""What a ratio between two runs' gradients may be, where it is a number that training setups make."""

from __future__ import annotations

import math

from gradscope.notation import count, number

LEAST_LOSS_SCALE = 256
MOST_LOSS_SCALE = 2**32
MOST_PARTS = 16
# Sums over more parts than MOST_PARTS are said of powers of two alone, of which numbers there are few.
MOST_RANKS = 2**14
# How near a ratio that is known exactly must come: float16 and bfloat16 gradients are rounded by about this.
EXACT = 0.004


def familiar_ratios(
    ratio: float, low: float, high: float, ranks: tuple[int | None, int | None] = (None, None), exact: bool = False
) -> tuple[str, ...]:
    """What B/A = ``ratio``, surely between ``low`` and ``high``, may come from; each completes "that may be".

    ``ranks`` are the numbers of processes, where known: they decide between a number of ranks and anything else.
    ``exact``: the ratio holds at every step, so it is no matter of how noise averages out.
    """
    if not 0.0 < ratio < math.inf or low <= 1.0 <= high:
        return ()
    larger = "B" if ratio > 1.0 else "A"
    if ratio < 1.0:
        ratio, low, high = 1.0 / ratio, 1.0 / high, 1.0 / low
    low, high = min(low, ratio * (1.0 - EXACT)), max(high, ratio * (1.0 + EXACT))
    own = _by_known_ranks(low, high, ranks, larger)
    if own:
        return own
    # A process alone has nothing to sum over.
    several = None in ranks or max(rank or 0 for rank in ranks) > 1
    found = []
    scale = _nearest_power(ratio)
    if LEAST_LOSS_SCALE <= scale <= MOST_LOSS_SCALE and low <= scale <= high:
        found.append(f"a loss scale of {count(scale)} that {larger} still carries")
    parts = _parts(ratio, low, high)
    if parts is not None:
        unknown_ranks = several and None in ranks
        found.append(
            f"{count(parts)} accumulation steps{f' or {count(parts)} ranks' if unknown_ranks else ''} "
            f"that {larger} sums over, not averages"
        )
    square = _parts(ratio * ratio, low * low, high * high)
    if square is not None and exact:
        found.append(f"√{count(square)}, if a side scales by the root of {count(square)} parts")
    elif square is not None:
        found.append(
            f"√{count(square)}: noise averaged over {count(square)} times as many samples in "
            f"{'A' if larger == 'B' else 'B'} (batch, accumulation{' or ranks' if several else ''})"
        )
    return tuple(found)


def _by_known_ranks(low: float, high: float, ranks: tuple[int | None, int | None], larger: str) -> tuple[str, ...]:
    other = "A" if larger == "B" else "B"
    of = dict(zip("AB", ranks, strict=True))
    mine, others = of[larger], of[other]
    for n in dict.fromkeys(rank for rank in (mine, others) if rank is not None and rank > 1):
        whose = "both train" if mine == others else f"{larger if mine == n else other} trains"
        if low <= n <= high:
            return (
                f"the {count(n)} ranks on which {whose}: {larger} sums over them, or {other} divides by them twice",
            )
        if low <= math.sqrt(n) <= high:
            return (f"√{count(n)}, of the {count(n)} ranks on which {whose}: averaged over ranks, noise shrinks so",)
    if mine and others and mine != others:
        apart = max(mine, others) / min(mine, others)
        if low <= apart <= high:
            return (f"{count(mine)} ranks in {larger} against {count(others)} in {other}",)
        if low <= math.sqrt(apart) <= high:
            return (f"√{number(apart)}, of {count(mine)} ranks in {larger} against {count(others)} in {other}",)
    return ()


def _parts(ratio: float, low: float, high: float) -> int | None:
    """The power of two, else the small whole number, that lies between ``low`` and ``high``."""
    power, whole = _nearest_power(ratio), round(ratio)
    if 2 <= power <= MOST_RANKS and low <= power <= high:
        return power
    return whole if 2 <= whole <= MOST_PARTS and low <= whole <= high else None


def _nearest_power(ratio: float) -> int:
    """The power of two that is nearest on a logarithmic scale; 1 below that."""
    return int(2 ** max(0, min(64, round(math.log2(ratio)))))
